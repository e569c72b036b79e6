"""Renders a row of a source as text by a template over its columns, such as `{question}\\n{answer}`.

Columns hold strings or numbers, since other values have no spelling that every tool agrees on. A template names whole
columns and cannot look inside them. A row has no text if one of the columns is null, absent, or NaN (as pandas writes
null).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from functools import cache
from string import Formatter

from sparsekd_ray.errors import CorpusError

CHAT_KEYS = ({"role", "content"}, {"from", "value"})


@cache
def parts(template: str) -> tuple[tuple[str, str | None], ...]:
    """(text before, column) pairs of a template; the column is None for text at its end."""
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise CorpusError(f"source.text {template!r} is not a template: {error}") from None
    names = [name for _, name, _, _ in parsed if name is not None]
    if not names or "" in names:
        raise CorpusError(f'source.text {template!r} must name columns, as "{{question}}\\n{{answer}}" does')
    if any(form or conversion for _, _, form, conversion in parsed):
        raise CorpusError(
            f"source.text {template!r} formats a column (a ! or : inside the braces): name the column alone, "
            "and write { as {{"
        )
    return tuple((before, name) for before, name, _, _ in parsed)


def columns(template: str) -> frozenset[str]:
    r"""Column names in a template: "{question}\n{answer}" → {"question", "answer"}."""
    return frozenset(name for _, name in parts(template) if name is not None)


def render(template: str, row: Mapping[str, object], place: str) -> str | None:
    """The text of a row; None if one of the columns is empty.

    Raises CorpusError for a value that is neither text nor a number. place: file and row, for the message.
    """
    pieces: list[str] = []
    for before, column in parts(template):
        pieces.append(before)
        if column is not None:
            value = row.get(column)
            if value is None or (isinstance(value, float) and math.isnan(value)):
                return None
            pieces.append(_spelled(value, column, place))
    return "".join(pieces)


def missing_columns(wanted: frozenset[str], present: object, place: str) -> CorpusError:
    inside = sorted(name for name in wanted if "." in name or "[" in name)
    hint = f" ({inside[0]!r}: a template names whole columns and cannot look inside one)" if inside else ""
    return CorpusError(f"{place} has no column {sorted(wanted)}, only {present}; adapt source.text{hint}")


def _spelled(value: object, column: str, place: str) -> str:
    if isinstance(value, str):
        if not value.isascii():
            _check_surrogates(value, column, place)
        return value
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise CorpusError(
                f"{place}: column {column!r} holds bytes that are not UTF-8 (byte {error.start}); convert it to text"
            ) from None
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        return str(value)
    raise CorpusError(f"{place}: column {column!r} holds {_kind(value)}; {_way_out(value)}")


def _check_surrogates(value: str, column: str, place: str) -> None:
    """Raises CorpusError for half of a surrogate pair. JSON can hold one, and no tokenizer takes it."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{place}: column {column!r} holds half of a surrogate pair (character {error.start}), which is no text; "
            "mend or drop the row"
        ) from None


def _kind(value: object) -> str:
    if _is_chat(value):
        return "a list of chat messages"
    return f"a {type(value).__name__}"


def _way_out(value: object) -> str:
    if _is_chat(value):
        return (
            "a corpus source takes text. Render the messages once with the model's tokenizer "
            "(apply_chat_template(messages, tokenize=False)), write them as a text column, and name that one"
        )
    return "source.text takes columns of text and numbers. Write what you mean into a text column, and name that one"


def _is_chat(value: object) -> bool:
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and any(keys <= set(first) for keys in CHAT_KEYS)
