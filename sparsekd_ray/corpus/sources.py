"""Documents from a source: the Python installation, a hub data set, or files by any fsspec URL.

Nothing is read before it is asked for, and at most `WINDOW` documents are held: a source may be larger than
memory, or have no end.
"""

from __future__ import annotations

import hashlib
import platform
import random
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from botocore.exceptions import BotoCoreError  # s3fs lets its client's errors through

from sparsekd_ray.config import Source
from sparsekd_ray.corpus import embedded
from sparsekd_ray.corpus.rows import ENDINGS, columns, document, file_documents
from sparsekd_ray.errors import CorpusError

WINDOW = 10_000  # documents shuffled together,
WINDOW_CHARACTERS = 64_000_000  # or fewer where they are long
EMBEDDED, HUB = "embedded:", "hf://"


def documents(source: Source, seed: int | None) -> Iterator[str]:
    """Documents of `source.path` that hold text, shuffled by `seed` within a window, or as they come (None).

    Rows with a null in a column of the template are left out. Raises `CorpusError` where the source cannot be
    read, nothing matches its path, or a column of the template is missing.
    """
    if source.path.startswith(EMBEDDED):
        return embedded.documents(source.path.removeprefix(EMBEDDED), seed)
    found = _hub_documents(source) if source.path.startswith(HUB) else _file_documents(source)
    return _shuffled((text for text in found if text and not text.isspace()), seed)


def test_source(source: Source) -> Source | None:
    """The source of held-out documents that `source.test` names; None where they come from `path` itself."""
    if source.test is None:
        return None
    another_split = source.path.startswith(HUB) and not re.search(r"[:/]", source.test)
    where = {"split": source.test} if another_split else {"path": source.test}
    return source.model_copy(update={**where, "test": None})


def identify(source: Source) -> dict[str, Any]:
    """What of a source decides the tokens: its settings, and its files' contents rather than their place.

    Local files count with their sha256, remote ones with the store's own checksum (S3: the ETag), hub data
    sets with id and revision (no network needed), embedded text with the version of Python. `CorpusError`
    where nothing matches.
    """
    held_out = test_source(source)
    settings = source.model_dump(include={"name", "weight", "text", "repeat"})
    return settings | {"content": _content(source), "test": _content(held_out) if held_out else None}


def _content(source: Source) -> dict[str, Any]:
    columns(source.text)
    if source.path.startswith(EMBEDDED):
        embedded.check(source.path.removeprefix(EMBEDDED))
        return {"embedded": source.path.removeprefix(EMBEDDED), "python": platform.python_version()}
    if not source.path.startswith(HUB):
        return {"files": _digests(source.path)}
    name, config = _hub_name(source.path)
    if name.startswith("/"):
        return {"files": _digests(f"{name}/**", endings=("",)), "split": source.split}
    return {"hub": name, "config": config, "split": source.split, "revision": source.revision}


def _digests(path: str, endings: tuple[str, ...] = ENDINGS) -> list[dict[str, Any]]:
    fs, files = _matches(path, endings)
    with _readable(path):
        return [
            {"name": file.rpartition("/")[2], "size": fs.size(file), **_digest(fs, file)} for file in files
        ]


def _digest(fs: Any, file: str) -> dict[str, str]:
    from fsspec.implementations.local import LocalFileSystem

    if not isinstance(fs, LocalFileSystem):
        return {"checksum": str(fs.checksum(file))}
    with open(file, "rb") as stream:
        return {"sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _matches(path: str, endings: tuple[str, ...] = ENDINGS) -> tuple[Any, list[str]]:
    """The file system and the sorted files that a path, glob or fsspec URL names."""
    import fsspec

    with _readable(path):
        fs, pattern = fsspec.url_to_fs(path)
        found = {name: info["type"] for name, info in fs.glob(pattern, detail=True).items()}
    files = sorted(name for name, kind in found.items() if kind != "directory")
    if not files:
        hint = f"; it is a directory, name files in it as {path.rstrip('/')}/*.parquet" if found else ""
        raise CorpusError(
            f"corpus source {path}: no such file{hint}. A relative path starts where the run starts"
        )
    if strange := [name for name in files if not name.endswith(endings)]:
        raise CorpusError(f"corpus source {strange[0]}: known kinds of file are {', '.join(ENDINGS)}")
    return fs, files


def _file_documents(source: Source) -> Iterator[str | None]:
    fs, files = _matches(source.path)
    for file in files:
        with _readable(file):
            yield from file_documents(fs, file, source.text)


def _hub_documents(source: Source) -> Iterator[str | None]:
    """Streams a data set; `hf:///a/directory` reads one laid out as on the hub from the disk."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # of its HTTP client, whichever that is

    name, config = _hub_name(source.path)
    with _readable(source.path, RuntimeError, DatasetsError, HTTPError):
        # Asking for the commit fails at once without a network, where load_dataset tries for half a minute.
        local = name.startswith("/")
        commit = None if local else HfApi().dataset_info(name, revision=source.revision, timeout=30).sha
        for row in load_dataset(name, config, split=source.split, revision=commit, streaming=True):
            yield document(source.text, row, source.path)


def _hub_name(path: str) -> tuple[str, str | None]:
    """`hf://owner/dataset/config` → ("owner/dataset", "config")."""
    name = path.removeprefix(HUB)
    if name.startswith("/"):
        return name, None
    parts = name.split("/", 2)
    if len(parts) < 2 or not all(parts):
        raise CorpusError(f"corpus source {path}: write hf://owner/dataset or hf://owner/dataset/config")
    return "/".join(parts[:2]), parts[2] if len(parts) > 2 else None


def _shuffled(texts: Iterable[str], seed: int | None) -> Iterator[str]:
    """Shuffles a stream window by window; with no seed, lets it through."""
    if seed is None:
        yield from texts
        return
    rng = random.Random(seed)
    window: list[str] = []
    size = 0
    for text in texts:
        window.append(text)
        size += len(text)
        if len(window) == WINDOW or size >= WINDOW_CHARACTERS:
            yield from rng.sample(window, len(window))
            window, size = [], 0
    yield from rng.sample(window, len(window))


@contextmanager
def _readable(path: str, *more: type[Exception]) -> Iterator[None]:
    """Turns what a disk, an object store or a decoder raises into one `CorpusError` that names the source."""
    try:
        yield
    except (OSError, ValueError, ImportError, BotoCoreError, *more) as error:
        why = f"{type(error).__name__}: {error}"
        raise CorpusError(
            f"cannot read {path} ({why}). Check its name, the network and the credentials"
        ) from None
