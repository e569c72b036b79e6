"""The split of each document, by a hash of its text, and the share of each source, by weight.

A document's split depends on its text alone. So a document that occurs twice, or in two corpora with the same
`held_out` (a stand-in's training text and the calibration mix), is in one split only.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

from sparsekd_ray.config import Corpus
from sparsekd_ray.errors import CorpusError

SPLITS = ("train", "valid", "test")


def side(text: str, held_out: float) -> str:
    """A document's split by its hash in [0, 1): below held_out / 2 test, below held_out valid, else train."""
    place = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64
    return "test" if place < held_out / 2 else "valid" if place < held_out else "train"


def quotas(corpus: Corpus) -> dict[str, dict[str, int]]:
    """Numbers of sequences, {source: {split: rows}}. Raises CorpusError if a source would get none."""
    names = [source.name for source in corpus.sources]
    weights = [source.weight for source in corpus.sources]
    by_source: dict[str, dict[str, int]] = {name: {} for name in names}
    for split, key in zip(SPLITS, ("samples", "valid_samples", "test_samples"), strict=True):
        total = getattr(corpus, key)
        for name, rows in zip(names, shares(total, weights), strict=True):
            by_source[name][split] = rows
            if not rows:
                raise CorpusError(f"corpus.{key} is {total}, too few for one sequence of {name}; raise it")
    return by_source


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to `weights` that sum to `total` (largest remainder, ties to the first)."""
    exact = [total * weight / sum(weights) for weight in weights]
    whole = [int(number) for number in exact]
    neediest = sorted(range(len(exact)), key=lambda i: whole[i] - exact[i])
    for i in neediest[: total - sum(whole)]:
        whole[i] += 1
    return whole
