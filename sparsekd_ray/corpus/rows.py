"""From files to documents: rows through a template over their columns, plain text cut at blank lines."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from functools import cache
from string import Formatter
from typing import Any

from sparsekd_ray.errors import CorpusError

TEXT_DOCUMENT = 2_000  # characters in a text file's document, at least
ENDINGS = (".parquet", ".jsonl", ".txt")


def file_documents(fs: Any, path: str, template: str) -> Iterator[str | None]:
    """Documents of one .parquet, .jsonl or .txt file of an fsspec file system; None for a row with a null."""
    if path.endswith(".txt"):
        with fs.open(path, "r", encoding="utf-8", newline="") as lines:  # newline="": as they are in the file
            yield from text_documents(lines)
        return
    rows = _parquet_rows if path.endswith(".parquet") else _json_rows
    for row in rows(fs, path, columns(template)):
        yield document(template, row, path)


def text_documents(lines: Iterable[str]) -> Iterator[str]:
    """Cuts a text after blank lines, into `TEXT_DOCUMENT` characters or more; joined, they are the text."""
    pieces: list[str] = []
    size, blank = 0, False
    for line in lines:
        if blank and size >= TEXT_DOCUMENT and not line.isspace():
            yield "".join(pieces)
            pieces, size = [], 0
        pieces.append(line)
        blank = line.isspace()
        size += len(line) if size or not blank else 0  # blank lines alone make no document
    yield "".join(pieces)


@cache
def columns(template: str) -> frozenset[str]:
    r"""Column names in a template: "{question}\n{answer[0]}" → {"question", "answer"}."""
    try:
        fields = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise CorpusError(f"source.text {template!r} is not a template: {error}") from None
    names = {re.split(r"[.\[]", field)[0] for field in fields}
    if not names or "" in names:
        raise CorpusError(f'source.text {template!r} must name columns, as "{{question}}\\n{{answer}}" does')
    return frozenset(names)


def document(template: str, row: dict[str, Any], origin: str) -> str | None:
    """The row's text; None where one of its columns is null."""
    _require(columns(template), row, origin)
    if any(row[column] is None for column in columns(template)):
        return None
    try:
        text = template.format_map(row)
        text.encode()  # JSON can smuggle in half a surrogate pair, which no tokenizer takes
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise CorpusError(f"{origin}: source.text {template!r} does not fit a row: {error!r}") from None
    return text


def _require(wanted: frozenset[str], found: Iterable[str], origin: str) -> None:
    if missing := wanted - set(found):
        raise CorpusError(
            f"{origin} has no column {sorted(missing)}, only {sorted(found)}; adapt source.text"
        )


def _parquet_rows(fs: Any, path: str, wanted: frozenset[str]) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    with fs.open(path, "rb") as file:
        parquet = pq.ParquetFile(file)
        _require(wanted, parquet.schema_arrow.names, path)
        for batch in parquet.iter_batches(batch_size=1024, columns=sorted(wanted)):
            yield from batch.to_pylist()


def _json_rows(fs: Any, path: str, wanted: frozenset[str]) -> Iterator[dict[str, Any]]:
    with fs.open(path, "r", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.isspace():
                yield _json_object(line, f"{path}, line {number}")


def _json_object(line: str, origin: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise CorpusError(f"{origin}: not JSON ({error}); a .jsonl file holds one object per line") from None
    if not isinstance(row, dict):
        raise CorpusError(f"{origin}: found a {type(row).__name__}; a .jsonl file holds one object per line")
    return row
