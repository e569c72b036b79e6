"""One pruning: its settings, its inputs and the results of its subtasks. A `Task` can be pickled and runs anywhere.

A subtask publishes its tensors as one file under `checkpoints/` of the unfinished artifact. A pruning that was killed
goes on with the subtasks that are missing, and the commit deletes the files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from sparsekd_ray.config import Calibrate, Prune
from sparsekd_ray.errors import ModelError
from sparsekd_ray.model import loading, weights
from sparsekd_ray.model.mlp import require_finite
from sparsekd_ray.prune import calibrate
from sparsekd_ray.store import Ref, Store
from sparsekd_ray.store.artifacts import CHECKPOINTS

Tensors = dict[str, torch.Tensor]
Metadata = Mapping[str, object]
"""The values, beside the task itself, on which a subtask's result depends; as JSON values."""


class Student(NamedTuple):
    """A pruned model, and facts about it for the artifact's record."""

    model: PreTrainedModel
    facts: dict[str, object]


@dataclass(frozen=True)
class Task:
    """Prune `model` into `out`. `sparsity` is the share of `dense_mlp_params` that is absent afterwards."""

    store: Store
    model: Ref
    out: Ref
    settings: Prune
    sparsity: float
    dense_mlp_params: int
    calibrate: Calibrate | None = None
    """Seed and size of the calibration text's sample. None unless the method has `texts` among its inputs, which puts
    them into the identity of its students."""
    statistics: Ref | None = None
    texts: Ref | None = None
    cache: Ref | None = None
    gpu: bool = False

    def __post_init__(self) -> None:
        assert (self.calibrate is None) == (self.texts is None), (
            "a sample is drawn from a text, by its settings"
        )

    @property
    def device(self) -> str:
        return "cuda" if self.gpu else "cpu"

    def folder(self) -> Path:
        """The model's directory on this machine."""
        return self.store.fetch(self.model)

    def load(self, device: str = "cpu") -> PreTrainedModel:
        """The model in the type it is stored in. ModelError, naming the tensor, if a weight is not finite."""
        model = loading.load(self.folder(), dtype="auto", device=device)
        for name, tensor in model.state_dict().items():
            require_finite(name, tensor)
        return model

    def layer_statistics(self, index: int) -> Tensors:
        """One layer's statistics (`statistics.collect`). ModelError if they are another model's."""
        return calibrate.layer(self._statistics(calibrate.layer_name(index)), index)

    def stack_statistics(self) -> Tensors:
        """The statistics of the stack of layers (`statistics.stack`). ModelError if they are another model's."""
        return calibrate.stack(self._statistics(calibrate.STACK))

    def _statistics(self, name: str) -> Path:
        """The directory of the statistics with this file in it."""
        assert self.statistics is not None, f"{self.settings.method} has statistics among its inputs"
        folder = self.store.fetch(self.statistics, [calibrate.MANIFEST, name])
        calibrate.check(calibrate.read(folder), self.model.fingerprint)
        return folder

    def publish(self, name: str, tensors: Tensors, metadata: Metadata) -> None:
        """Stores a subtask's result, with the values on which it depends."""
        with self.store.publishing(self.out, _checkpoint(name)) as path:
            contiguous = {key: tensor.contiguous().cpu() for key, tensor in tensors.items()}
            save_file(contiguous, path, {"metadata": _text(metadata)})
        if self.store.remote:  # any machine fetches it from the store, so no local copy is kept
            self.store.local(f"{self.out.key}/{_checkpoint(name)}").unlink(missing_ok=True)

    def published(self, name: str, metadata: Metadata) -> Tensors | None:
        """A subtask's result, if there is one that depends on the same values."""
        path = self.store.pull(self.out, _checkpoint(name))
        if path is None:
            return None
        with safe_open(path, "pt") as file:
            same = (file.metadata() or {}).get("metadata") == _text(metadata)
        if not same:  # other last bits on another machine may have changed a rank
            self.store.discard(self.out, _checkpoint(name))
            return None
        return load_file(path)


def _checkpoint(name: str) -> str:
    return f"{CHECKPOINTS}/{name}.safetensors"


def _text(metadata: Metadata) -> str:
    return json.dumps(metadata, sort_keys=True)


def tensors_below(folder: Path, name: str) -> Tensors:
    """The tensors of one module of a model directory, by the rest of their names. Nothing else is read.

    ModelError, naming the tensor, if one is not finite.
    """
    tensors = weights.read_tensors(folder, f"{name}.")
    for key, tensor in tensors.items():
        require_finite(key, tensor)
    return {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items()}


@contextmanager
def named_errors(name: str) -> Iterator[None]:
    """Turns errors of pure functions on a matrix into a ModelError that begins with the matrix's name."""
    try:
        yield
    except (ValueError, torch.linalg.LinAlgError) as error:
        raise ModelError(f"{name}: {error}") from None
