"""Documents: a document is a row of its source, or a part of a text whose lines are joined.

A text with WikiText's headings (` = Title = ` between blank lines) is cut before each heading. Any other text is cut
after blank lines, into documents of at least `TEXT_DOCUMENT` characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise

TEXT_DOCUMENT = 2_000  # least characters of a document that is cut at blank lines
HEADING = re.compile(r" ?= (?!= )\S.* = ?\s*")


@dataclass(frozen=True)
class Document:
    """One document, and the rows of its source that it was made of."""

    rows: tuple[str, ...]
    """The one row, or every line of a source whose rows are joined (`source.join`). A blank line is an empty row, as
    in the data sets of the hub."""
    text: str


def whole(row: str) -> Document:
    """A row that is a document."""
    return Document((row,), row)


def joined(rows: Iterable[str]) -> Iterator[Document]:
    """Cuts a text that is given line by line into documents. Joined, the documents are the text."""
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
    """A document of these rows. Every row but the last gets a line end if it lacks one."""
    lines = [row if row.endswith(("\n", "\r")) else f"{row}\n" for row in rows[:-1]]
    return Document(tuple(row if row.strip() else "" for row in rows), "".join([*lines, rows[-1]]))
