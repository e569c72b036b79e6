"""The description of a pruning method. The rest of the package reads from it whatever differs between methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from sparsekd_ray.config import Prune
    from sparsekd_ray.prune.preview import Row
    from sparsekd_ray.prune.task import Student, Task
    from sparsekd_ray.runtime.tasks import TaskMap

Form = Literal["low-rank", "narrower", "shallower", "masked"]
Input = Literal["statistics", "texts", "cache"]
Shapes = Mapping[str, tuple[int, int]]
"""(m, n) = (outputs, inputs) of every MLP matrix of the dense model, by name."""

FORMS: dict[Form, str] = {  # description of a student of each form
    "low-rank": "low-rank factors of every matrix",
    "narrower": "fewer neurons in every layer (a stock model)",
    "shallower": "fewer layers (a stock model)",
    "masked": "zeros held through training (no model is faster for it)",
}


def check_nothing(shapes: Shapes, settings: Prune, sparsities: Sequence[float]) -> None:
    """The limits of a method that reaches every sparsity."""


@dataclass(frozen=True)
class MethodSpec:
    """One pruning method. Its functions import torch when they are called, and not before."""

    name: str
    form: Form
    card: str
    """What the method did to the model, for model cards: a sentence without its full stop."""
    settings: tuple[str, ...]
    """The fields of `config.Prune`, beside `method`, that the method reads. They enter its fingerprint."""
    student: Callable[[Task, TaskMap], Student]
    """Prunes the model of a task."""
    preview: Callable[[Task, TaskMap], list[Row]]
    """The plan of `student`: a row for each matrix or layer. No model is made."""
    check: Callable[[Shapes, Prune, Sequence[float]], None] = check_nothing
    """Raises ConfigError if the method cannot cut the dense model to these sparsities, one after the other."""
    energy: Callable[[Task, float, TaskMap], float] | None = None
    """The sparsity that one energy threshold stands for. None for a method without singular values."""
    inputs: tuple[Input, ...] = ()
    """Inputs beside the model: statistics of the model, the calibration text, the dense teacher's cache."""
    inputs_where: Mapping[tuple[str, str], tuple[Input, ...]] = field(default_factory=dict)
    """Further inputs where a setting has a value: {(setting, value): inputs}."""
    variants: tuple[str, ...] = ("",)
    """The variants that a comparison shows by default, as suffixes of the method's name; "" for the plainest one."""

    def inputs_for(self, settings: Prune) -> tuple[Input, ...]:
        """Inputs beside the model, with these settings."""
        conditional = [
            inputs for (key, value), inputs in self.inputs_where.items() if getattr(settings, key) == value
        ]
        return (*self.inputs, *(name for inputs in conditional for name in inputs))

    def only_read(self, settings: Prune) -> Prune:
        """The settings that the method reads, the others at their defaults."""
        return type(settings)(**settings.model_dump(include={*self.settings}) | {"method": self.name})
