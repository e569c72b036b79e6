"""Sets test documents of every source aside, then chooses training documents that do not repeat them.

The amount of test text is counted in characters, so no tokenizer is needed. Therefore the stand-in's tokenizer, its
pretraining text and the calibration mix leave out the same documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from sparsekd_ray.config import Corpus, Source
from sparsekd_ray.corpus.documents import Document
from sparsekd_ray.corpus.overlap import TestIndex
from sparsekd_ray.corpus.sources import Tally, interleave, read, read_in_order, test_source
from sparsekd_ray.corpus.splits import shares, side

PASSAGE = 0.25  # largest share of a held-out split's rows that one document gives
CHARACTERS = 8  # characters set aside for each test token; a token of text has three to five
KEPT_OUT = (
    32_000_000  # characters of a test set that training text may not repeat, used for evaluation or not
)


@dataclass(frozen=True)
class SetAside:
    """The test documents of one source, in order."""

    documents: list[Document]
    complete: bool = False
    """Whether `documents` are the whole test set: `source.test` was read to its end."""
    others: Sequence[Document] = ()
    """Further documents of the test set that no figure here uses. They are kept out of training too, because later
    evaluations may use them."""


@dataclass
class LeftOut:
    """The documents of one source that were kept from training because they repeat test text."""

    documents: int = 0
    characters: int = 0
    read_characters: int = 0
    """Characters of all documents on the training side, including those left out."""


def longest(rows: int, seq_len: int) -> int:
    """Tokens that one document may give to a split that was held out by a hash."""
    return max(1, int(rows * PASSAGE)) * seq_len


def set_aside(corpus: Corpus, seed: int) -> dict[str, SetAside]:
    """The test documents of each source, enough for its share of `corpus.test_samples`."""
    rows = shares(corpus.test_samples, [source.weight for source in corpus.sources])
    return {
        source.name: _set_aside(source, share, corpus, seed)
        for source, share in zip(corpus.sources, rows, strict=True)
    }


def _set_aside(source: Source, rows: int, corpus: Corpus, seed: int) -> SetAside:
    characters = rows * corpus.seq_len * CHARACTERS
    separate_test = test_source(source)
    if separate_test is not None:
        documents, complete = read_in_order(separate_test, characters)
        return SetAside(documents, complete, () if complete else read_in_order(separate_test, KEPT_OUT)[0])
    taken: list[Document] = []
    for document in read(source, seed):
        if characters <= 0:
            break
        if side(document.text, corpus.held_out) == "test":
            taken.append(document)
            characters -= min(len(document.text), longest(rows, corpus.seq_len) * CHARACTERS)
    return SetAside(taken)


def test_index(corpus: Corpus, test_documents: dict[str, SetAside], seed: int) -> TestIndex:
    """Index of the test text that no training text may repeat: of the corpus's sources and of `corpus.exclude`.

    An excluded source's share of the test samples is not known here. It gives as many documents as all of
    `corpus.test_samples` could need.
    """
    others = [_set_aside(source, corpus.test_samples, corpus, seed) for source in corpus.exclude]
    sets = (chain(part.documents, part.others) for part in (*test_documents.values(), *others))
    return TestIndex((document.text for document in documents) for documents in sets)


def split_documents(
    source: Source,
    corpus: Corpus,
    seed: int,
    index: TestIndex,
    left_out: LeftOut | None = None,
    tally: Tally | None = None,
) -> Iterator[tuple[str, Document]]:
    """("train" or "valid", document) for the documents of a source that do not repeat test text."""
    counts = left_out or LeftOut()
    for document in read(source, seed, tally):
        split = side(document.text, corpus.held_out)
        if split == "test":
            if source.test is None:
                continue
            split = "train"
        counts.read_characters += len(document.text)
        if index.repeats(document.text):
            counts.documents += 1
            counts.characters += len(document.text)
        else:
            yield split, document


def train_documents(corpus: Corpus, seed: int) -> Iterator[str]:
    """Training documents of all sources, interleaved by weight (in characters).

    A tokenizer is trained on them, so that it sees no held-out text. A source that ends drops out. A source without
    end never does, so the caller takes only as many documents as it needs.
    """
    index = test_index(corpus, set_aside(corpus, seed), seed)

    def stream(source: Source) -> Iterator[Document]:
        pairs = split_documents(source, corpus, seed, index)
        return (document for split, document in pairs if split == "train")

    streams = [lambda source=source: stream(source) for source in corpus.sources]
    weights = [source.weight for source in corpus.sources]
    return (document.text for _, document in interleave(streams, weights))
