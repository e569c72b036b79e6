"""Rows of .parquet and .jsonl files, and lines of .txt files, on any fsspec file system.

Text is UTF-8, or UTF-16 or UTF-32 with a byte order mark. Every error names the file and the row, line or byte.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sparsekd_ray.corpus.template import missing_columns
from sparsekd_ray.errors import CorpusError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

ENDINGS = (".parquet", ".jsonl", ".txt")
ROWS_TO_FIND_COLUMNS = 100
BUFFER = 2**20
MARKS = {  # longer marks come first, because the mark of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

Row = dict[str, Any]


def rows(fs: AbstractFileSystem, path: str, wanted: frozenset[str]) -> Iterator[tuple[str, Row]]:
    """(place, row) of a .parquet or .jsonl file. Raises CorpusError if no row has the columns `wanted`."""
    if path.endswith(".parquet"):
        return _parquet_rows(fs, path, wanted)
    return with_columns(_json_rows(fs, path), wanted, path)


def with_columns(
    numbered: Iterator[tuple[str, Row]], wanted: frozenset[str], path: str
) -> Iterator[tuple[str, Row]]:
    """The same rows. Raises CorpusError if the first hundred rows (or all of fewer) lack one of the columns `wanted`.

    One row may lack a key that other rows have: the key is read as null. A key that every row lacks is a mistake.
    """
    present: dict[str, None] = {}
    count = 0
    for place, row in numbered:
        yield place, row
        count += 1
        if count <= ROWS_TO_FIND_COLUMNS:
            present |= dict.fromkeys(row)
        if count == ROWS_TO_FIND_COLUMNS and not wanted <= set(present):
            break
    if count and not wanted <= set(present):
        raise missing_columns(wanted - set(present), sorted(present), path)


def text_lines(fs: AbstractFileSystem, path: str) -> Iterator[str]:
    """Lines of a text file with their line ends, without the byte order mark."""
    with fs.open(path, "rb") as file:
        beginning = file.read(4)
        file.seek(0)
        encoding = next((name for mark, name in MARKS.items() if beginning.startswith(mark)), None)
        if encoding is not None:
            yield from _marked_lines(file, encoding, path)
        else:
            yield from _utf8_lines(file, path)


def _marked_lines(file: Any, encoding: str, path: str) -> Iterator[str]:
    try:
        yield from io.TextIOWrapper(file, encoding=encoding, newline="")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path} begins as {encoding.upper()} and breaks off ({error.reason}); save it as UTF-8"
        ) from None


def _utf8_lines(file: Any, path: str) -> Iterator[str]:
    offset = 0
    for line in io.BufferedReader(file, BUFFER):
        if not offset:
            line = line.removeprefix(codecs.BOM_UTF8)
        if (zero := line.find(b"\0")) >= 0:
            raise CorpusError(
                f"{path}: byte {offset + zero} is zero, so this is no UTF-8 text (UTF-16 without a byte order mark "
                "looks so); save it as UTF-8"
            )
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise CorpusError(
                f"{path}: byte {offset + error.start} is not UTF-8 ({error.reason}); save the file as UTF-8"
            ) from None
        offset += len(line)


def _json_rows(fs: AbstractFileSystem, path: str) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(text_lines(fs, path), 1):
        if not line.isspace():
            place = f"{path}, line {number}"
            yield place, _json_object(line, place)


def _json_object(line: str, place: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise CorpusError(f"{place}: not JSON ({error}); a .jsonl file holds one object per line") from None
    if not isinstance(row, dict):
        raise CorpusError(f"{place}: found a {type(row).__name__}; a .jsonl file holds one object per line")
    return row


def _parquet_rows(fs: AbstractFileSystem, path: str, wanted: frozenset[str]) -> Iterator[tuple[str, Row]]:
    import pyarrow.parquet as pq

    with fs.open(path, "rb") as file:
        parquet = pq.ParquetFile(file)
        names = parquet.schema_arrow.names
        if missing := wanted - set(names):
            raise missing_columns(missing, sorted(names), path)
        number = 0
        for batch in parquet.iter_batches(batch_size=1024, columns=sorted(wanted)):
            for row in _batch_rows(batch, path, number):
                number += 1
                yield f"{path}, row {number}", row


def _batch_rows(batch: Any, path: str, before: int) -> list[Row]:
    try:
        values: list[Row] = batch.to_pylist()
        return values
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            try:
                batch.slice(index, 1).to_pylist()
            except UnicodeDecodeError as error:
                raise CorpusError(
                    f"{path}, row {before + index + 1}: its text is not UTF-8 (byte {error.start}); write it as UTF-8"
                ) from None
        raise
