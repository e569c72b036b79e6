"""What one pruning is asked to do and where its inputs and its pieces lie: picklable, so that pieces may run anywhere.

A piece writes its tensors as one published file under `checkpoints/` of the unfinished artifact: a killed pruning goes
on with the pieces that are missing, and the commit deletes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sparsekd_ray.config import Calibrate, Prune
from sparsekd_ray.errors import ModelError
from sparsekd_ray.model import loading
from sparsekd_ray.model.mlp import require_finite
from sparsekd_ray.prune import calibrate
from sparsekd_ray.store import Ref, Store
from sparsekd_ray.store.artifacts import CHECKPOINTS

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Task:
    """Prune `model` into `out`: `sparsity` is the share of `dense_mlp_params` that is absent afterwards."""

    store: Store
    model: Ref
    out: Ref
    settings: Prune
    sparsity: float
    dense_mlp_params: int
    calibrate: Calibrate
    statistics: Ref | None = None
    texts: Ref | None = None
    cache: Ref | None = None
    gpu: bool = False

    @property
    def device(self) -> str:
        return "cuda" if self.gpu else "cpu"

    def folder(self) -> Path:
        """The model's directory on this machine."""
        return self.store.fetch(self.model)

    def load(self, device: str = "cpu") -> Any:
        """The model in the type it is stored in; ModelError, naming the tensor, if a weight is not finite."""
        model = loading.load(self.folder(), dtype="auto", device=device)
        for name, tensor in model.state_dict().items():
            require_finite(name, tensor)
        return model

    def layer(self, index: int) -> Tensors:
        """One layer's statistics. ModelError if they are another model's."""
        assert self.statistics is not None, f"{self.settings.method} has statistics among its inputs"
        wanted = [calibrate.MANIFEST, calibrate.layer_name(index)]
        folder = self.store.fetch(self.statistics, wanted)
        calibrate.check(calibrate.read(folder), self.model.fingerprint)
        return calibrate.layer(folder, index)

    def stack(self) -> Tensors:
        """The statistics of the stack of layers, with the same check."""
        assert self.statistics is not None, f"{self.settings.method} has statistics among its inputs"
        folder = self.store.fetch(self.statistics, [calibrate.MANIFEST, calibrate.STACK])
        calibrate.check(calibrate.read(folder), self.model.fingerprint)
        return calibrate.stack(folder)

    def publish(self, name: str, tensors: Tensors, about: dict[str, Any]) -> None:
        """Keeps a piece's result; `about` says what it is the result of."""
        text = {"about": json.dumps(about, sort_keys=True)}
        with self.store.publishing(self.out, _place(name)) as path:
            save_file({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, path, text)
        if (
            self.store.remote
        ):  # whoever needs it fetches it; this machine's disk is not for other machines' pieces
            self.store.local(f"{self.out.key}/{_place(name)}").unlink(missing_ok=True)

    def published(self, name: str, about: dict[str, Any]) -> Tensors | None:
        """A piece's result, if it was kept and is of the same thing."""
        path = self.store.pull(self.out, _place(name))
        if path is None:
            return None
        with safe_open(path, "pt") as file:
            same = (file.metadata() or {}).get("about") == json.dumps(about, sort_keys=True)
        if not same:  # another machine's last bits tipped a rank
            self.store.discard(self.out, _place(name))
            return None
        return load_file(path)


def _place(name: str) -> str:
    return f"{CHECKPOINTS}/{name}.safetensors"


def tensors_below(folder: Path, name: str) -> Tensors:
    """The tensors of one module of a model directory, by the rest of their names; nothing else is read.

    ModelError, naming the tensor, if one is not finite.
    """
    found: Tensors = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118, a file is no mapping
                if key.startswith(f"{name}."):
                    found[key.removeprefix(f"{name}.")] = file.get_tensor(key)
                    require_finite(key, found[key.removeprefix(f"{name}.")])
    return found


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Puts the matrix's name before what a pure function finds wrong with it."""
    try:
        yield
    except (ValueError, torch.linalg.LinAlgError) as error:
        raise ModelError(f"{what}: {error}") from None
