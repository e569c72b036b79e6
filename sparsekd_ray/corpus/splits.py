"""Who gets which document: splits by a hash of the text, shares by weight.

A document's side depends on its text alone, so one that occurs twice, or in two corpora with the same
`held_out` (a model's training text and the calibration mix), is never trained on here and judged by there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b

from sparsekd_ray.config import Corpus, Source
from sparsekd_ray.corpus.sources import documents
from sparsekd_ray.errors import CorpusError

SPLITS = ("train", "valid", "test")


def side(text: str, held_out: float) -> str:
    """A document's split: its hash in [0, 1) is below held_out/2: test, below held_out: valid, or not."""
    place = int.from_bytes(digest(text), "big") / 2**64
    return "test" if place < held_out / 2 else "valid" if place < held_out else "train"


def with_split(
    source: Source, seed: int, held_out: float, tests: frozenset[bytes] = frozenset()
) -> Iterator[tuple[str, str]]:
    """(split, document) for the documents of `source.path`.

    Where tests come from elsewhere (`source.test`) there is no test side, and documents with a digest in
    `tests` are left out.
    """
    for text in documents(source, seed):
        split = side(text, held_out)
        if source.test is None:
            yield split, text
        elif digest(text) not in tests:
            yield "valid" if split == "valid" else "train", text


def train_documents(sources: Sequence[Source], seed: int, held_out: float) -> Iterator[str]:
    """Documents on the training side of each source, interleaved by weight (in characters).

    For training a tokenizer without a look at held-out text. A source that ends drops out; one without end
    never does, so take what is needed.
    """
    streams = {source.name: _train_side(source, seed, held_out) for source in sources}
    weight = {source.name: source.weight for source in sources}
    read = dict.fromkeys(streams, 0.0)
    while streams:
        name = min(streams, key=read.__getitem__)
        text = next(streams[name], None)
        if text is None:
            del streams[name]
        else:
            read[name] += len(text) / weight[name]
            yield text


def quotas(corpus: Corpus) -> dict[str, dict[str, int]]:
    """Sequences by source and split, {source: {split: rows}}; `CorpusError` where a source would get none."""
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


def digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=8).digest()


def _train_side(source: Source, seed: int, held_out: float) -> Iterator[str]:
    return (text for split, text in with_split(source, seed, held_out) if split == "train")
