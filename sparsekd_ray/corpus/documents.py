"""What a document is: a row of its source, or a stretch of a text whose lines are joined.

A text is cut where it falls into documents by itself. One with WikiText's headings (` = Title = ` between blank
lines) is cut before each of them; any other is cut after blank lines, into `TEXT_DOCUMENT` characters or more.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise

TEXT_DOCUMENT = 2_000  # characters of a document cut at blank lines, at least
HEADING = re.compile(r" ?= (?!= )\S.* = ?\s*")


@dataclass(frozen=True)
class Document:
    """One document, and the rows of its source that it was made of."""

    rows: tuple[str, ...]
    """One row, or for a source whose rows are joined (`source.join`) each line as the source gives it. A blank line
    is an empty row, as in the data sets of the hub."""
    text: str


def whole(row: str) -> Document:
    """A row that is a document."""
    return Document((row,), row)


def joined(rows: Iterable[str]) -> Iterator[Document]:
    """Documents of a text given line by line; together they are the text."""
    document: list[str] = []
    size, blank, headed = 0, True, False
    for row, following in pairwise(chain(rows, [""])):
        text = bool(row.strip())
        heading = text and blank and not following.strip() and HEADING.fullmatch(row) is not None
        if size and text and (heading or (blank and not headed and size >= TEXT_DOCUMENT)):
            yield _of_lines(document)
            document, size, headed = [], 0, False
        document.append(row)
        blank, headed = not text, headed or heading
        size += len(row) if size or text else 0  # blank lines alone make no document
    if size:
        yield _of_lines(document)


def _of_lines(rows: list[str]) -> Document:
    """Rows that lack a line end get one, but for the document's last."""
    lines = [row if row.endswith(("\n", "\r")) else f"{row}\n" for row in rows[:-1]]
    return Document(tuple(row if row.strip() else "" for row in rows), "".join([*lines, rows[-1]]))
