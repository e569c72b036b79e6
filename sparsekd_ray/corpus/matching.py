"""Finds the files that a path, glob or fsspec URL names, and turns errors of their storage into CorpusError."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import TYPE_CHECKING

from botocore.exceptions import BotoCoreError  # s3fs lets its client's errors through

from sparsekd_ray.errors import CorpusError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


def matching_files(path: str, endings: tuple[str, ...]) -> tuple[AbstractFileSystem, dict[str, int]]:
    """The file system and {file: bytes} in sorted order. Raises CorpusError for no file or an unknown ending.

    As in a shell, a wildcard matches nothing that begins with a dot: no swap files, no `.ipynb_checkpoints`.
    """
    import fsspec

    with readable(path):
        fs, pattern = fsspec.url_to_fs(path)
        entries = fs.glob(pattern, detail=True)
    files = {name: int(info["size"] or 0) for name, info in entries.items() if info["type"] != "directory"}
    shown = {name: files[name] for name in sorted(files) if not _hidden(name, pattern)}
    if not shown:
        raise CorpusError(
            f"corpus source {path}: {_nothing(path, bool(files), bool(entries))}. "
            "A relative path starts where the run starts"
        )
    if strange := [name for name in shown if not name.endswith(endings)]:
        raise CorpusError(f"corpus source {strange[0]}: known kinds of file are {', '.join(endings)}")
    return fs, shown


def _nothing(path: str, files: bool, entries: bool) -> str:
    if files:
        return "only hidden files match, and hidden files must be named"
    if entries:
        return f"no such file; it is a directory, name files in it as {path.rstrip('/')}/*.parquet"
    return "no such file"


def _hidden(name: str, pattern: str) -> bool:
    """Whether a wildcard of `pattern` matched a part of the name that begins with a dot."""
    parts = pattern.split("/")
    fixed = len(list(takewhile(lambda part: not set(part) & set("*?["), parts)))
    if any(part.startswith(".") for part in parts[fixed:]):
        return False  # the pattern names hidden files itself
    return any(part.startswith(".") for part in name.split("/")[fixed:])


@contextmanager
def readable(path: str, *more: type[Exception]) -> Iterator[None]:
    """Turns an error of a disk, an object store or a decoder into a CorpusError that names the source."""
    try:
        yield
    except (OSError, ValueError, ImportError, BotoCoreError, *more) as error:
        advice = (
            "its name, the network and the credentials" if "://" in path else "that it is whole and readable"
        )
        raise CorpusError(f"cannot read {path} ({type(error).__name__}: {error}). Check {advice}") from None
