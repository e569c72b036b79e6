"""The weight files of a model directory: their names, the tensors in each of them, and reading some tensors.

The files are those that transformers loads: `model.safetensors`, or else the files that `model.safetensors.index.json`
names, whatever they are called. Other safetensors in the directory are no part of the model. torch is imported only
where tensors are read.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sparsekd_ray.errors import ModelError

if TYPE_CHECKING:
    import torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BASE_PREFIX = "model."  # of every tensor but the head, in a checkpoint of a causal language model


class Place(NamedTuple):
    file: Path
    key: str  # the tensor's name in the file


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the model's weights, sorted. Raises ModelError if there are none, or one is missing."""
    if (single := folder / SINGLE).is_file():
        return [single]
    if not (folder / INDEX).is_file():
        others = ", ".join(sorted(path.name for path in folder.glob("*.bin"))[:3])
        raise ModelError(
            f"{folder} holds neither {SINGLE} nor {INDEX}{f', but {others}' if others else ''}: save the weights as "
            "safetensors (`model.save_pretrained(directory)` does)"
        )
    files = [folder / name for name in files_in_index(folder / INDEX)]
    if missing := [path.name for path in files if not path.is_file()]:
        raise ModelError(
            f"{folder / INDEX} names {', '.join(missing)}, which the directory lacks: download it completely"
        )
    return files


def files_in_index(index: Path) -> list[str]:
    """The file names in a weight index, sorted. Raises ModelError if it is unreadable or names other directories."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is no readable index of weights ({error}): download it again") from error
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ModelError(f"{index} must name files of its own directory, and names {names[:3]}")
    return names


def tensor_places(folder: Path) -> dict[str, Place]:
    """Where each tensor lies, by its name in the causal language model.

    A checkpoint of the base model alone, whose names lack the prefix `model.`, gets it here as transformers adds it on
    loading. Raises ModelError for a file that cannot be read and for a tensor that lies in two files.
    """
    stamps = tuple(
        (path, path.stat().st_mtime_ns, path.stat().st_size) for path in weight_files(Path(folder))
    )
    return dict(_tensor_places(stamps))


@lru_cache(maxsize=16)
def _tensor_places(stamps: tuple[tuple[Path, int, int], ...]) -> dict[str, Place]:
    places: dict[str, Place] = {}
    for file, *_ in stamps:
        keys = _keys(file)
        if twice := sorted(places.keys() & keys):
            raise ModelError(f"{twice[0]} lies in {places[twice[0]].file} and in {file}: delete one of them")
        places |= {key: Place(file, key) for key in keys}
    if any(key.startswith(BASE_PREFIX) for key in places):
        return places
    return {key if key.startswith("lm_head.") else BASE_PREFIX + key: place for key, place in places.items()}


def _keys(file: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as tensors:
            return list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{file} is cut short or not safetensors ({error}): download or save it again"
        ) from error


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a directory's weight files; tied ones once."""
    from safetensors import safe_open

    shapes = {}
    for name, (file, key) in tensor_places(folder).items():
        with safe_open(file, "np") as tensors:
            shapes[name] = tuple(tensors.get_slice(key).get_shape())
    return shapes


def read_tensors(folder: Path, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with `prefix`, by their names; nothing else is read."""
    from safetensors import safe_open

    chosen = {}
    for name, (file, key) in tensor_places(folder).items():
        if name.startswith(prefix):
            with safe_open(file, "pt") as tensors:
                chosen[name] = tensors.get_tensor(key)
    return chosen
