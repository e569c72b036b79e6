"""How a stage's independent pieces run: one after the other in this process, or wherever the caller spreads them.

A stage hands its pieces to an `Each`; it neither knows nor imports what runs them. Large results go through the
store, so only small values return.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

TaskMap = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], Iterator[tuple[int, Any]]]
"""(function, arguments of each piece) → (index, result) of every piece as it finishes, in any order. The function is
of a module's top level and its arguments pickle, since they may travel to another machine."""


def map_local(function: Callable[..., Any], pieces: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
    """In this process, in order."""
    for index, arguments in enumerate(pieces):
        with threads_for(len(pieces)):
            result = function(*arguments)
        yield index, result


@contextmanager
def threads_for(pieces: int, threads: int | None = None) -> Iterator[None]:
    """One CPU thread for each of several pieces, `threads` (by default as many as before) for a single one.

    Wherever a piece runs it has as many: the last bits of a sum depend on it.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1 if pieces > 1 else threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
