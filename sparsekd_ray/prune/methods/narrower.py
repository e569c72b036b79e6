"""Methods that leave fewer neurons in every layer: chosen by activations, or by gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparsekd_ray.prune.methods.spec import MethodSpec, Shapes

if TYPE_CHECKING:
    from sparsekd_ray.config import Prune
    from sparsekd_ray.prune.preview import Row
    from sparsekd_ray.prune.task import Student, Task
    from sparsekd_ray.runtime.tasks import TaskMap


def check_width(shapes: Shapes, settings: Prune, sparsities: Sequence[float]) -> None:
    """ConfigError if no width below the present one comes near a sparsity."""
    from sparsekd_ray.prune import neurons

    (hidden, width), *others = [shape for name, shape in shapes.items() if name.endswith("down_proj")]
    dense, layers = sum(m * n for m, n in shapes.values()), 1 + len(others)
    for sparsity in sparsities:
        width = neurons.width(dense, sparsity, hidden, layers, settings.align, present=width)


def _preview(task: Task, task_map: TaskMap) -> list[Row]:
    from sparsekd_ray.prune import preview, structured

    return preview.narrower(task, structured.width_of(task))


def _by_activations(task: Task, task_map: TaskMap) -> Student:
    from sparsekd_ray.prune import structured

    return structured.by_activations(task, task_map)


def _by_gradients(task: Task, task_map: TaskMap) -> Student:
    from sparsekd_ray.prune import structured

    return structured.by_gradients(task, task_map)


METHODS = (
    MethodSpec(
        name="neurons",
        form="narrower",
        card="Pruned by removing the MLP neurons that the others can best stand in for on calibration text, as many "
        "in every layer, and refitting the others by least squares",
        settings=("align", "score"),
        student=_by_activations,
        preview=_preview,
        check=check_width,
        inputs=("statistics",),
        variants=("", "+leverage"),
    ),
    MethodSpec(
        name="sdm",
        form="narrower",
        card="Pruned by removing the MLP neurons that matter least to cross-entropy and self-distillation loss "
        "(SDMPrune), as many in every layer, and refitting the others by least squares",
        settings=("align", "alpha", "temperature"),
        student=_by_gradients,
        preview=_preview,
        check=check_width,
        inputs=("statistics", "texts", "cache"),
    ),
)
