"""Documents from a source: the Python installation, a hub data set, or files by any fsspec URL.

Documents are read lazily, and at most `WINDOW` of them are in memory, so a source may be larger than memory or have no
end. Several files are read side by side, so that a small share of a source comes from all of its files.
"""

from __future__ import annotations

import logging
import random
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from sparsekd_ray.config import Source
from sparsekd_ray.corpus import embedded
from sparsekd_ray.corpus.documents import Document, joined, whole
from sparsekd_ray.corpus.files import ENDINGS, Row, rows, text_lines, with_columns
from sparsekd_ray.corpus.matching import matching_files, readable
from sparsekd_ray.corpus.template import columns, render
from sparsekd_ray.errors import CorpusError

if TYPE_CHECKING:
    from datasets import IterableDataset
    from fsspec import AbstractFileSystem

logger = logging.getLogger(__name__)

WINDOW = 10_000  # documents shuffled together,
WINDOW_CHARACTERS = 64_000_000  # or fewer where they are long
OPEN_FILES = 64  # files that are read side by side
EMBEDDED, HUB = "embedded:", "hf://"
# The first rows show whether rows are lines of one text: a fifth is blank, or half are shorter than a sentence.
JUDGED_ROWS, LEAST_ROWS = 1_000, 50
BLANK_ROWS, SHORT_ROW = 0.2, 48

Stream = Callable[[], Iterator[Document]]


@dataclass
class Tally:
    """Counts of the rows of a source that made no document."""

    empty_rows: int = 0
    """Rows in which a column of the template is empty."""
    commit: str | None = None
    """The hub's commit of a data set."""
    lengths: list[int] = field(default_factory=list)
    """Characters of the first rows, from all files: they show whether rows are lines of one text."""


def documents(source: Source, seed: int | None) -> Iterator[str]:
    """The texts of `read`."""
    return (document.text for document in read(source, seed))


def read(source: Source, seed: int | None, tally: Tally | None = None) -> Iterator[Document]:
    """Documents of `source.path` that hold text, mixed from all files and shuffled by `seed` (None: not shuffled).

    Raises CorpusError if the source cannot be read, no file matches its path, no row has a column of the template, or
    the rows are lines of one text and `source.join` is not set.
    """
    streams, sizes = _streams(source, seed, tally or Tally())
    if seed is None:
        return _with_text(document for stream in streams for document in stream())
    order = random.Random(seed).sample(range(len(streams)), len(streams))
    mixed = interleave([streams[i] for i in order], [sizes[i] for i in order])
    texts = _with_text(document for _, document in mixed)
    return texts if source.path.startswith(EMBEDDED) else _shuffled(texts, seed)


def beginning(source: Source, count: int) -> list[Document]:
    """At most `count` documents, the first ones of every file."""
    mixed = interleave(*_streams(source, None, Tally()))
    return list(islice(_with_text(document for _, document in mixed), count))


def read_in_order(source: Source, characters: float) -> tuple[list[Document], bool]:
    """Documents of at least `characters` in total, from all files, in the source's order; whether they are all."""
    taken: list[tuple[int, Document]] = []
    for index, document in interleave(*_streams(source, None, Tally())):
        if characters <= 0:
            break
        if document.text.strip():
            taken.append((index, document))
            characters -= len(document.text)
    else:
        characters = 1
    in_order = sorted(taken, key=lambda pair: pair[0])
    return [document for _, document in in_order], characters > 0


def interleave(streams: Sequence[Stream], sizes: Sequence[float]) -> Iterator[tuple[int, Document]]:
    """(index of the stream, document). The next document comes from the stream of which the smallest share was read.

    At most `OPEN_FILES` streams are open at a time; the next one is opened when one ends.
    """
    waiting = iter(range(len(streams)))
    opened = {index: streams[index]() for index in islice(waiting, OPEN_FILES)}
    share = dict.fromkeys(opened, 0.0)
    while opened:
        index = min(opened, key=share.__getitem__)
        document = next(opened[index], None)
        if document is not None:
            share[index] += len(document.text) / max(1.0, sizes[index])
            yield index, document
            continue
        del opened[index]
        if (following := next(waiting, None)) is not None:
            opened[following], share[following] = streams[following](), share[index]
        del share[index]


def test_source(source: Source) -> Source | None:
    """The source of test documents that `source.test` names; None if they come from `path` itself."""
    if source.test is None:
        return None
    another_split = source.path.startswith(HUB) and not re.search(r"[:/]", source.test)
    where = {"split": source.test} if another_split else {"path": source.test}
    return source.model_copy(update={**where, "test": None})


def hub_name(path: str) -> tuple[str, str | None]:
    """`hf://owner/dataset/config` → ("owner/dataset", "config"); `hf:///a/directory` → ("/a/directory", None)."""
    name = path.removeprefix(HUB)
    if name.startswith("/"):
        return name, None
    parts = name.split("/", 2)
    if len(parts) < 2 or not all(parts):
        raise CorpusError(f"corpus source {path}: write hf://owner/dataset or hf://owner/dataset/config")
    return "/".join(parts[:2]), parts[2] if len(parts) > 2 else None


def _streams(source: Source, seed: int | None, tally: Tally) -> tuple[list[Stream], list[float]]:
    """A stream of documents for each file of a source, and their sizes."""
    if source.path.startswith(EMBEDDED):
        texts = partial(embedded.documents, source.path.removeprefix(EMBEDDED), seed)
        return [lambda: map(whole, texts())], [1.0]
    if source.path.startswith(HUB):
        shards = _hub_shards(source, tally)
        return [partial(_hub_documents, source, shard, tally) for shard in shards], [1.0] * len(shards)
    fs, files = matching_files(source.path, ENDINGS)
    return [partial(_file_documents, source, fs, file, tally) for file in files], [
        *map(float, files.values())
    ]


def _file_documents(source: Source, fs: AbstractFileSystem, file: str, tally: Tally) -> Iterator[Document]:
    with readable(fs.unstrip_protocol(file).removeprefix("file://")):
        if not file.endswith(".txt"):
            yield from _row_documents(source, rows(fs, file, columns(source.text)), tally)
        elif source.join is False:
            yield from (whole(line.rstrip("\r\n")) for line in text_lines(fs, file))
        else:
            yield from joined(text_lines(fs, file))


def _hub_shards(source: Source, tally: Tally) -> list[IterableDataset]:
    """The shards of a streamed data set. `hf:///a/directory` reads a directory that is laid out as on the hub."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # of its HTTP client, whichever that is

    name, config = hub_name(source.path)
    with readable(source.path, RuntimeError, DatasetsError, HTTPError):
        # Asking for the commit fails at once without a network, where load_dataset tries for half a minute.
        local = name.startswith("/")
        commit = None if local else HfApi().dataset_info(name, revision=source.revision, timeout=30).sha
        tally.commit = commit
        data = load_dataset(name, config, split=source.split, revision=commit, streaming=True)
        return [data.shard(data.num_shards, index) for index in range(data.num_shards)]


def _hub_documents(source: Source, shard: IterableDataset, tally: Tally) -> Iterator[Document]:
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    with readable(source.path, RuntimeError, DatasetsError, HTTPError):
        numbered = ((f"{source.path}, row {number}", row) for number, row in enumerate(shard, 1))
        yield from _row_documents(source, with_columns(numbered, columns(source.text), source.path), tally)


def _row_documents(source: Source, numbered: Iterable[tuple[str, Row]], tally: Tally) -> Iterator[Document]:
    texts = _rendered(source.text, numbered, tally)
    if source.join:
        return joined(texts)
    return map(whole, texts if source.join is False else _refuse_lines(source, texts, tally.lengths))


def _rendered(template: str, numbered: Iterable[tuple[str, Row]], tally: Tally) -> Iterator[str]:
    for place, row in numbered:
        text = render(template, row, place)
        if text is None:
            tally.empty_rows += 1
        else:
            yield text


def _refuse_lines(source: Source, texts: Iterable[str], lengths: list[int]) -> Iterator[str]:
    """The same texts. Raises CorpusError if they are lines of one text: shuffled lines are no text to learn from.

    lengths: of the source's rows so far. All streams of the source add to it.
    """
    for text in texts:
        yield text
        if len(lengths) < JUDGED_ROWS:
            lengths.append(len(text.strip()))
            if len(lengths) == JUDGED_ROWS:
                _judge(source, lengths)
    if LEAST_ROWS <= len(lengths) < JUDGED_ROWS:
        _judge(source, lengths)


def _judge(source: Source, lengths: list[int]) -> None:
    blank = lengths.count(0) / len(lengths)
    if blank >= BLANK_ROWS:
        raise CorpusError(
            f"corpus source {source.name} ({source.path}): {blank:.0%} of its rows are blank, as where rows are the "
            "lines of one text. Set join: true to join them into documents, or join: false if each row is one"
        )
    if (median := statistics.median(lengths)) < SHORT_ROW:
        _warn_of_lines(source.name, source.path, int(median))


_warned: set[tuple[str, str]] = set()  # sources are read more than once


def _warn_of_lines(name: str, path: str, median: int) -> None:
    if (name, path) in _warned:
        return
    _warned.add((name, path))
    logger.warning(
        f"corpus source {name} ({path}): half of its rows have at most {median} characters. If they are lines of one "
        "text, set join: true; if each is a document, join: false"
    )


def _with_text(documents: Iterable[Document]) -> Iterator[Document]:
    return (document for document in documents if document.text.strip())


def _shuffled(texts: Iterable[Document], seed: int) -> Iterator[Document]:
    """Shuffles a stream window by window."""
    rng = random.Random(seed)
    window: list[Document] = []
    size = 0
    for document in texts:
        window.append(document)
        size += len(document.text)
        if len(window) == WINDOW or size >= WINDOW_CHARACTERS:
            yield from rng.sample(window, len(window))
            window, size = [], 0
    yield from rng.sample(window, len(window))
