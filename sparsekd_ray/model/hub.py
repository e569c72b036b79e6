"""The source of the dense model: its identity before any work, and its copy in the store."""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import tempfile
import unicodedata
from pathlib import Path

from sparsekd_ray.config import Model, Shape
from sparsekd_ray.errors import ModelError
from sparsekd_ray.model import loading, origin, spec, tokenizer, weights
from sparsekd_ray.runtime.logging import log_progress

logger = logging.getLogger(__name__)

SHAPE_KEYS = {
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "vocab": "vocab_size",
}
CONFIG_FILES = ("config.json", "generation_config.json")
DESCRIPTIONS = (*CONFIG_FILES, weights.INDEX, *tokenizer.FILES, origin.CARD, *origin.LICENSE_PATTERNS)
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def local_directory(model: Model) -> Path | None:
    """The directory `model.path` names; None for a hub id. Raises ModelError if it can be neither."""
    path = Path(str(model.path)).expanduser()
    try:
        if path.is_dir():
            return path
    except OSError as error:
        raise ModelError(f"model.path {model.path!r} cannot be looked at: {error}") from error
    if path.is_absolute() or str(model.path).startswith(".") or not HUB_ID.fullmatch(str(model.path)):
        actual = "a file" if path.is_file() else "no directory"
        raise ModelError(f"model.path {model.path!r} is {actual}: give a Hugging Face directory or a hub id")
    return None


def label(model: Model) -> str:
    """A short name for the model's artifacts, made of the last part of `model.path`: letters, digits and ``_ . -``."""
    path = Path(str(model.path)).expanduser()
    name = path.resolve().name if path.is_dir() else path.name
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", ascii_name).strip("-._")[:48].rstrip("-._") or "model"


def identify(model: Model) -> dict[str, object]:
    """The identity of weights and tokenizer: digests of a local directory's files, or a hub id with its revision.

    Cards and licences are left out, because they change no number. Raises ModelError for a directory that cannot
    become a dense model: unsupported, incomplete, or under a licence that forbids students.
    """
    directory = local_directory(model)
    if directory is None:
        return {"hub": model.path, "revision": model.revision}
    weights.weight_files(directory)
    _check_descriptions(directory)
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


def config_of(shape: Shape) -> dict[str, object]:
    """The fields of a config.json that `shape` states."""
    values = {theirs: getattr(shape, ours) for ours, theirs in SHAPE_KEYS.items()}
    return values | {
        "model_type": shape.family,
        "head_dim": shape.head_dim,
        "tie_word_embeddings": shape.tied,
    }


def import_model(model: Model, out: Path) -> dict[str, int | str]:
    """Copies the dense model into the store's directory `out`, so that every node reads the same bytes.

    Returns its parameters, `params`, those of its MLP matrices, `mlp_params`, and the `commit` of a hub model.
    The tokenizer is written in its portable form, so that corpus, students and exports share its tokens. Raises
    ModelError if the model cannot be obtained, is not supported, is not what `model.shape` states, has no fitting
    tokenizer, or is under a licence that forbids students.
    """
    directory = local_directory(model)
    source = directory or _download(model)
    values = spec.config_dict(source)
    spec.check_supported(values)
    if model.shape is not None:
        _check_shape(model.shape, values)
    stated = origin.read(source, _hub_id(model))
    origin.check_license(source, stated)
    tokenizer.save(source, out)
    _check_tokenizer(out, *spec.sizes(values, "vocab_size"))
    origin.write(stated, out)
    for path in (*_model_files(source), *origin.license_files(source), *_card(source)):
        log_progress(logger, f"copies {path.name}, {path.stat().st_size / 1e6:,.0f} MB")
        shutil.copyfile(path, out / path.name)
    loading.load(out, dtype="auto")
    counts = {"params": spec.total_parameters(values), "mlp_params": spec.mlp_parameters(values)}
    return {**counts} if directory else {**counts, "commit": source.name}


def _hub_id(model: Model) -> str | None:
    return str(model.path) if local_directory(model) is None else None


def _download(model: Model) -> Path:
    """A local snapshot of the needed files of the hub's repository. All checks without weights come first.

    The name of the directory is the commit. Raises ModelError if the hub does not give it, or the cache cannot be
    written.
    """
    folder = _snapshot(model, DESCRIPTIONS)
    _check_descriptions(folder, str(model.path))
    # a repository may hold other weights too, and only the index tells which ones belong to the model
    index = folder / weights.INDEX
    names = weights.files_in_index(index) if index.is_file() else []
    pinned = model.model_copy(update={"revision": folder.name})  # a branch may move on meanwhile
    return _snapshot(pinned, (*DESCRIPTIONS, weights.SINGLE, *names))


def _check_descriptions(directory: Path, hub_id: str | None = None) -> None:
    """ModelError for a model that config.json, tokenizer, card or licence show to be unfit. Reads no weights."""
    from sparsekd_ray.model import probe

    values = spec.config_dict(directory)
    spec.check_supported(values)
    origin.check_license(directory, origin.read(directory, hub_id))
    _check_tokenizer(directory, *spec.sizes(values, "vocab_size"))
    probe.small_numbers(spec.stock_values(values))


def _snapshot(model: Model, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(str(model.path), revision=model.revision, allow_patterns=list(patterns))
        )
    except (OSError, ValueError) as error:  # the hub's own errors are among them
        raise ModelError(
            f"model.path {model.path!r} is no local directory, and the hub did not give it (revision "
            f"{model.revision or 'main'}): {error}; check spelling, network and access rights{_cache_advice()}, or "
            "give a directory"
        ) from error


def _cache_advice() -> str:
    """Advice for a hub cache that cannot be written; empty if it can be."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f", set HF_HOME to a directory that can be written ({folder}: {error.strerror})"


def _files(directory: Path) -> list[Path]:
    """Configuration, weights and tokenizer; never pickles, never code."""
    return _model_files(directory) + _present(directory, tokenizer.FILES)


def _model_files(directory: Path) -> list[Path]:
    files = weights.weight_files(directory)
    return (
        _present(directory, (*CONFIG_FILES, *([] if files[0].name == weights.SINGLE else [weights.INDEX])))
        + files
    )


def _card(directory: Path) -> list[Path]:
    return _present(directory, (origin.CARD,))


def _present(directory: Path, names: tuple[str, ...]) -> list[Path]:
    return [path for name in names if (path := directory / name).is_file()]


def _check_shape(shape: Shape, values: dict[str, object]) -> None:
    expected = {key: value for key, value in config_of(shape).items() if value is not None}
    wrong = {key: (value, values.get(key)) for key, value in expected.items() if values.get(key) != value}
    if wrong:
        listed = ", ".join(f"{key}: stated {stated}, found {found}" for key, (stated, found) in wrong.items())
        raise ModelError(f"model.shape does not describe this model ({listed}): correct model.shape")


def _check_tokenizer(directory: Path, vocab: int) -> None:
    """ModelError unless the tokenizer fits the model and can separate documents."""
    loaded = tokenizer.load(directory)
    highest = max(loaded.get_vocab().values(), default=-1)
    if highest >= vocab:
        raise ModelError(
            f"the tokenizer beside the model has ids up to {highest}, the model's vocabulary {vocab} entries: "
            "they do not belong together"
        )
    if loaded.eos_token_id is None:
        raise ModelError(
            "the model's tokenizer has no end-of-text token, which separates documents: set eos_token in its "
            "tokenizer_config.json"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
