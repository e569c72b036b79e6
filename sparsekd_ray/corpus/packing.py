"""Packs documents of one domain and split into rows of equal length: joins them and cuts the result."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sparsekd_ray.corpus.documents import Document
from sparsekd_ray.corpus.tokens import Encoder
from sparsekd_ray.runtime.logging import log_progress

logger = logging.getLogger(__name__)

BATCH = 64  # documents tokenised together

Tokens = NDArray[np.int32]


@dataclass
class Packer:
    """Collects the rows of one domain and split. It takes documents until `quota` rows are full."""

    quota: int
    seq_len: int
    longest: int
    """Largest number of tokens that one document gives."""
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
        """Adds one document. Its last token is the separator."""
        if self.full:
            return
        passage = _passage(ids, self.longest)
        self.pieces.append(passage)
        self.tokens += len(passage)
        self.left_out += len(ids) - len(passage)
        self.documents += 1

    def rows(self) -> Tokens:
        """int32 [count, seq_len]."""
        tokens = np.concatenate(self.pieces)[: self.count * self.seq_len]
        return tokens.reshape(self.count, self.seq_len)


def fill(
    source: str, packers: dict[str, Packer], stream: Iterator[tuple[str, Document]], encode: Encoder
) -> None:
    """Tokenises (split, document) into `packers` until all are full or the stream ends."""
    while not all(packer.full for packer in packers.values()):
        batch = list(itertools.islice(stream, BATCH))
        if not batch:
            return
        wanted = [(packers[s], d.text) for s, d in batch if s in packers and not packers[s].full]
        for (packer, _), ids in zip(wanted, encode([text for _, text in wanted]), strict=True):
            packer.add(ids)
        counts = ", ".join(f"{split} {packer.count}/{packer.quota}" for split, packer in packers.items())
        log_progress(logger, f"corpus {source}: {counts} sequences")


def _passage(ids: Tokens, longest: int) -> Tokens:
    """The middle of a document that is too long, with its separator."""
    if len(ids) <= longest:
        return ids
    start = (len(ids) - longest) // 2
    return np.append(ids[start : start + longest - 1], ids[-1])
