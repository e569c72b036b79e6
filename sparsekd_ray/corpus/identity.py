"""The identity of a source, and checks that it can be read. Both run before any work."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekd_ray.config import Corpus, Source
from sparsekd_ray.corpus import embedded
from sparsekd_ray.corpus.files import ENDINGS
from sparsekd_ray.corpus.matching import matching_files, readable
from sparsekd_ray.corpus.sources import EMBEDDED, HUB, JUDGED_ROWS, beginning, hub_name, test_source
from sparsekd_ray.corpus.splits import quotas
from sparsekd_ray.corpus.template import columns
from sparsekd_ray.corpus.tokens import check_context, load_encoder
from sparsekd_ray.errors import CorpusError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


def identify(source: Source) -> dict[str, Any]:
    """Everything about a source that decides the tokens: its settings and the contents of its files, not their place.

    A local file counts by its sha256, a remote file by its server's checksum (S3: the ETag), a hub data set by id and
    revision (no network needed), and embedded text by the version of Python. Raises CorpusError if no file matches,
    or if the first rows of a file cannot be read as `source` says.
    """
    held_out = test_source(source)
    settings = source.model_dump(include={"name", "weight", "text", "repeat", "join"})
    return settings | {"content": _content(source), "test": _content(held_out) if held_out else None}


def check_settings(corpus: Corpus, model: Path | None) -> None:
    """Raises CorpusError for settings that cannot work. Reads no text.

    model: the directory of the dense model, if it is already known.
    """
    quotas(corpus)
    if model is not None:
        check_context(model, corpus.seq_len)
        if corpus.separator is not None:
            load_encoder(model, corpus.separator)


def check_hub(corpus: Corpus) -> None:
    """Raises CorpusError unless every hub data set of the corpus gives a document. `identify` reads only files."""
    for source in (*corpus.sources, *corpus.exclude):
        for part in (source, test_source(source)):
            if part is not None and part.path.startswith(HUB):
                _check_beginning(part)


def _content(source: Source) -> dict[str, Any]:
    columns(source.text)
    if source.path.startswith(EMBEDDED):
        embedded.check(source.path.removeprefix(EMBEDDED))
        return {"embedded": source.path.removeprefix(EMBEDDED), "python": platform.python_version()}
    if not source.path.startswith(HUB):
        digests = _digests(source.path, ENDINGS)
        _check_beginning(source)
        return {"files": digests}
    name, config = hub_name(source.path)
    if name.startswith("/"):
        digests = _digests(f"{name}/**", ("",))
        _check_beginning(source)
        return {"files": digests, "split": source.split}
    return {"hub": name, "config": config, "split": source.split, "revision": source.revision}


def _check_beginning(source: Source) -> None:
    """Reads the first documents to find faults of all rows: a missing column, a wrong encoding, rows that are lines."""
    if not beginning(source, JUDGED_ROWS):
        raise CorpusError(
            f"corpus source {source.name} ({source.path}) is empty: it holds no document with text"
        )


def _digests(path: str, endings: tuple[str, ...]) -> list[dict[str, Any]]:
    fs, files = matching_files(path, endings)
    with readable(path):
        return [
            {"name": file.rpartition("/")[2], "size": size, **_digest(fs, file)}
            for file, size in files.items()
        ]


def _digest(fs: AbstractFileSystem, file: str) -> dict[str, str]:
    from fsspec.implementations.local import LocalFileSystem

    if not isinstance(fs, LocalFileSystem):
        return {"checksum": str(fs.checksum(file))}
    with open(file, "rb") as stream:
        return {"sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
