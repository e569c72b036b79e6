"""Where the dense model comes from: what identifies it before any work, and its copy in the store."""

from __future__ import annotations

import hashlib
import logging
import shutil
from pathlib import Path
from typing import Any

from sparsekd_ray.config import Model, Shape
from sparsekd_ray.errors import ModelError
from sparsekd_ray.model import loading, spec

logger = logging.getLogger(__name__)

SHAPE_KEYS = {
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "vocab": "vocab_size",
}


def local_directory(model: Model) -> Path | None:
    """The directory `model.path` names; None for a hub id. Raises ModelError for a path that is not there."""
    path = Path(str(model.path)).expanduser()
    if path.is_dir():
        return path
    if str(model.path).startswith(("/", "./", "../", "~")) or str(model.path).count("/") > 1:
        raise ModelError(
            f"model.path {model.path!r} is no directory: give a Hugging Face directory or a hub id"
        )
    return None


def identify(model: Model) -> dict[str, Any]:
    """The weights' identity: digests of a local directory's files, or a hub id with its revision."""
    directory = local_directory(model)
    if directory is None:
        return {"hub": model.path, "revision": model.revision}
    spec.check_supported(directory)
    return {"files": {path.name: _sha256(path) for path in _files(directory)}}


def mlp_shapes(model: Model) -> dict[str, tuple[int, int]]:
    """(out, in) of every MLP matrix, as far as known before any work; empty for a hub id without `model.shape`."""
    if model.standin is not None:
        standin = model.standin
        values = {"model_type": standin.family, "hidden_size": standin.hidden}
        values |= {"intermediate_size": standin.intermediate, "num_hidden_layers": standin.layers}
        return spec.shapes_from_config(values)
    directory = local_directory(model)
    if directory is not None:
        return spec.shapes_from_config(directory)
    return spec.shapes_from_config(config_of(model.shape)) if model.shape else {}


def config_of(shape: Shape) -> dict[str, Any]:
    """The fields of a config.json that `shape` states."""
    values = {theirs: getattr(shape, ours) for ours, theirs in SHAPE_KEYS.items()}
    return values | {
        "model_type": shape.family,
        "head_dim": shape.head_dim,
        "tie_word_embeddings": shape.tied,
    }


def import_model(model: Model, out: Path) -> dict[str, Any]:
    """Copies the dense model into the store's directory `out`, so that every node reads the same bytes."""
    source = loading.resolve_dense(str(model.path), model.revision)
    values = spec.config_dict(source)
    spec.check_supported(values)
    if model.shape is not None:
        _check_shape(model.shape, values)
    for path in _files(source):
        logger.info(f"copies {path.name}, {path.stat().st_size / 1e6:,.0f} MB")
        shutil.copyfile(path, out / path.name)
    _check_tokenizer(out, values["vocab_size"])
    loading.load(out, dtype="auto")
    return {"params": spec.total_parameters(values), "mlp_params": spec.mlp_parameters(values)}


def _files(directory: Path) -> list[Path]:
    """Weights, configuration and tokenizer; never pickles, never code."""
    names = ("config.json", "generation_config.json", *spec.TOKENIZER_FILES)
    weights = sorted(directory.glob("model*.safetensors*"))
    if not weights:
        raise ModelError(f"{directory} holds no model*.safetensors: convert its weights to safetensors first")
    return [path for name in names if (path := directory / name).is_file()] + weights


def _check_shape(shape: Shape, values: dict[str, Any]) -> None:
    expected = {key: value for key, value in config_of(shape).items() if value is not None}
    wrong = {key: (value, values.get(key)) for key, value in expected.items() if values.get(key) != value}
    if wrong:
        listed = ", ".join(f"{key}: stated {stated}, found {found}" for key, (stated, found) in wrong.items())
        raise ModelError(f"model.shape does not describe this model ({listed}): correct model.shape")


def _check_tokenizer(directory: Path, vocab: int) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    highest = max(tokenizer.get_vocab().values())
    if highest >= vocab:
        raise ModelError(
            f"the tokenizer beside the model has ids up to {highest}, the model's vocabulary {vocab} entries: "
            "they do not belong together"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the model's tokenizer has no end-of-text token, which separates documents: set eos_token"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
