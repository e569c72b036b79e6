"""Rows of equal length: documents of one domain and split, joined and cut."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sparsekd_ray.corpus.documents import Document
from sparsekd_ray.corpus.tokens import Encoder

logger = logging.getLogger(__name__)

BATCH = 64  # documents tokenised together
SECONDS_BETWEEN_LINES = 5.0

Tokens = NDArray[np.int32]


@dataclass
class Packer:
    """The rows of one domain and split: documents are taken in until `quota` rows are full."""

    quota: int
    seq_len: int
    longest: int
    """Tokens that one document may give."""
    tokens: int = 0
    left_out: int = 0
    documents: int = 0
    pieces: list[Tokens] = field(default_factory=list)

    @property
    def full(self) -> bool:
        return self.tokens >= self.quota * self.seq_len

    @property
    def count(self) -> int:
        return min(self.quota, self.tokens // self.seq_len)

    @property
    def dropped(self) -> int:
        return self.left_out + self.tokens - self.count * self.seq_len

    def add(self, ids: Tokens) -> None:
        """Takes in one document, which ends with the separator."""
        if self.full:
            return
        kept = _passage(ids, self.longest)
        self.pieces.append(kept)
        self.tokens += len(kept)
        self.left_out += len(ids) - len(kept)
        self.documents += 1

    def rows(self) -> Tokens:
        """int32 [count, seq_len]."""
        kept = np.concatenate(self.pieces)[: self.count * self.seq_len]
        return kept.reshape(self.count, self.seq_len)


def fill(
    packers: dict[str, Packer],
    stream: Iterator[tuple[str, Document]],
    encode: Encoder,
    tell: Callable[[], None],
) -> None:
    """Tokenises (split, document) into `packers` until all are full or the stream ends."""
    while not all(packer.full for packer in packers.values()):
        batch = list(itertools.islice(stream, BATCH))
        if not batch:
            return
        wanted = [(packers[s], d.text) for s, d in batch if s in packers and not packers[s].full]
        for (packer, _), ids in zip(wanted, encode([text for _, text in wanted]), strict=True):
            packer.add(ids)
        tell()


def teller(name: str, packers: dict[str, Packer]) -> Callable[[], None]:
    """Logs how far a source is, every few seconds at most."""
    last = time.monotonic()

    def tell() -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            counts = ", ".join(f"{split} {packer.count}/{packer.quota}" for split, packer in packers.items())
            logger.info(f"corpus {name}: {counts} sequences")

    return tell


def _passage(ids: Tokens, longest: int) -> Tokens:
    """The middle of a document that is too long, with its separator."""
    if len(ids) <= longest:
        return ids
    start = (len(ids) - longest) // 2
    return np.append(ids[start : start + longest - 1], ids[-1])
