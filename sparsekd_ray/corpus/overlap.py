"""Finds documents that repeat test text, so that no model is trained on them.

Texts are compared as words: lower case, without punctuation, white space and line breaks. A document repeats the test
text if it

- has the same words as a test document,
- shares `RUN` words in a row with a test document, or
- is, with `SHORTEST` words or more but fewer than `RUN`, a passage of the test text, or contains a test document that
  is as short as that.

Twenty words in a row hardly ever agree by accident. Runs that do agree may be the form of the text and not its content
(a licence header, the frame of a prompt), so a run that stands in more than a tenth of a source's test documents is
ignored. A passage is found wherever either text was cut.

Every word is hashed to 64 bits, and a run of words to the value of a polynomial in these hashes, so N words cost a few
passes over arrays. Shapes: N words of a document, M runs in all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

RUN, SHORTEST = 20, 8
# A run is the form of the text if it stands in more than this share of a source's test documents,
COMMON = 0.1
COMMON_LEAST = 2  # and in more than this number of them.
# Scripts without spaces between words: each of their letters is a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64

Hashes = NDArray[np.uint64]


class TestIndex:
    """The runs of words of all test documents."""

    __test__ = False  # pytest would collect it as a class of tests because of its name

    def __init__(self, sources: Iterable[Iterable[str]]) -> None:
        """sources: the test documents of each source."""
        self.numbers: dict[str, int] = {}
        self.same: set[bytes] = set()
        runs, passages, short = [], [], []
        for texts in sources:
            sets = [words for text in texts if (words := self._add(text)) is not None]
            runs.append(_uncommon([np.unique(_runs(words, RUN)) for words in sets]))
            passages += [_runs(words, SHORTEST) for words in sets]
            short += [words for words in sets if SHORTEST <= len(words) < RUN]
        self.runs = _sorted(runs)
        self.passages = _sorted(passages)
        self.short = {
            length: _sorted([_runs(words, length) for words in short if len(words) == length])
            for length in sorted({len(words) for words in short})
        }

    def repeats(self, text: str) -> bool:
        """Whether a document may not be trained on."""
        words = _words(text)
        if _digest(words, text) in self.same:
            return True
        ids = np.fromiter((self.numbers.get(word, 0) for word in words), np.uint64, len(words))
        if len(words) < SHORTEST or not ids.any():
            return False
        if len(words) < RUN and bool(_among(_runs(ids, SHORTEST), self.passages).all()):
            return True
        sets = {RUN: self.runs, **self.short}
        return any(bool(_among(_runs(ids, length), known).any()) for length, known in sets.items())

    def _add(self, text: str) -> Hashes | None:
        """The hashes [N] of the words of one test document; None if the document was added before."""
        words = _words(text)
        if (digest := _digest(words, text)) in self.same:
            return None
        self.same.add(digest)
        for word in set(words) - self.numbers.keys():
            self.numbers[word] = int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "big")
        return np.fromiter(map(self.numbers.__getitem__, words), np.uint64, len(words))


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _digest(words: Sequence[str], text: str) -> bytes:
    return blake2b((" ".join(words) or text).encode(), digest_size=16).digest()


def _runs(words_N: Hashes, length: int) -> Hashes:
    """A hash of every `length` consecutive words [max(0, N − length + 1)]: their polynomial, at the same power."""
    if len(words_N) < length:
        return np.empty(0, np.uint64)
    powers, inverses = _powers(len(words_N))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(words_N * powers, dtype=np.uint64)])
    runs: Hashes = (sums[length:] - sums[:-length]) * inverses[: len(sums) - length]
    return runs


_tables: list[tuple[Hashes, Hashes]] = []


def _powers(count: int) -> tuple[Hashes, Hashes]:
    """Powers of the base and of its inverse, modulo 2^64. They are cached, and extended for a longer document."""
    if not _tables or len(_tables[-1][0]) < count:
        size = max(4096, 2 * count)
        table = [
            np.cumprod(np.concatenate([np.ones(1, np.uint64), np.full(size - 1, number, np.uint64)]))
            for number in (_BASE, pow(_BASE, -1, 2**64))
        ]
        _tables[:] = [(table[0], table[1])]
    powers, inverses = _tables[-1]
    return powers[:count], inverses[:count]


def _uncommon(documents: Sequence[Hashes]) -> Hashes:
    """The runs that stand in few of the documents. Each document lists a run once."""
    if not documents:
        return np.empty(0, np.uint64)
    runs, counts = np.unique(np.concatenate(documents), return_counts=True)
    return runs[counts <= max(COMMON_LEAST, COMMON * len(documents))]


def _sorted(parts: Sequence[Hashes]) -> Hashes:
    return np.unique(np.concatenate(parts)) if parts else np.empty(0, np.uint64)


def _among(values: Hashes, known_M: Hashes) -> NDArray[np.bool_]:
    """Whether each value stands in the sorted array `known_M`."""
    if not len(known_M):
        return np.zeros(len(values), np.bool_)
    places = np.searchsorted(known_M, values)
    is_known: NDArray[np.bool_] = known_M[np.minimum(places, len(known_M) - 1)] == values
    return is_known
