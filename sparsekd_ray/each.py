"""How a stage's independent pieces run: one after the other in this process, or wherever the caller spreads them.

A stage hands its pieces to an `Each`; it neither knows nor imports what runs them. Large results go through the
store, so only small values return.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

Each = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], Iterator[tuple[int, Any]]]
"""(function, arguments of each piece) → (index, result) of every piece as it finishes, in any order. The function is
of a module's top level and its arguments pickle, since they may travel to another machine."""


def here(function: Callable[..., Any], pieces: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
    """In this process, in order."""
    for index, arguments in enumerate(pieces):
        yield index, function(*arguments)
