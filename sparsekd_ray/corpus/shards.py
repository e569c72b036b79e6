"""Token shards on disk: `<split>/00000.parquet`, … of sample_id, domain and input_ids (`seq_len` int32 each).

`sample_id` is `<domain>-<split>-<index>`. The index counts rows inside a domain and split in the order of the text, so
it survives the permutation of the training rows. The files hold no time and no place: equal settings give equal bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sparsekd_ray.errors import CorpusError

MANIFEST = "manifest.json"
SCHEMA = pa.schema([("sample_id", pa.string()), ("domain", pa.string()), ("input_ids", pa.list_(pa.int32()))])

Counts = dict[str, dict[str, int]]  # {split: {domain: number}}


class Repeats(TypedDict):
    """The documents of a domain that were kept from training because they repeat test text."""

    documents: int
    share: float
    """Their share of the characters read for training."""


class Manifest(TypedDict):
    """The contents of `manifest.json`: what the corpus holds."""

    seq_len: int
    vocab_size: int
    tokenizer_hash: str
    separator: str | None
    """Token after each document."""
    beginning: str | None
    """Token before each document, if the tokenizer puts one there."""
    shard_rows: int
    rows: Counts
    tokens: Counts
    dropped_tokens: Counts
    documents: Counts
    whole_test: dict[str, bool]
    """By domain: whether the raw test text (`read_test_text`) is all of `source.test`."""
    repeats_test: dict[str, Repeats]
    commits: dict[str, str | None]
    """By domain: the hub's commit that training text was read at; None for sources that are not on the hub."""
    empty_rows: dict[str, int]
    """By domain: number of rows left out because a column of the template is empty."""


def domain_table(domain: str, split: str, rows_NL: NDArray[np.int32]) -> pa.Table:
    """Rows of one domain and split (N rows of L tokens) with their sample ids."""
    count, length = rows_NL.shape
    ids = [f"{domain}-{split}-{index:06d}" for index in range(count)]
    offsets = np.arange(count + 1, dtype=np.int32) * np.int32(length)
    tokens = pa.ListArray.from_arrays(offsets, rows_NL.reshape(-1))
    return pa.Table.from_arrays(
        [pa.array(ids, pa.string()), pa.array([domain] * count, pa.string()), tokens], schema=SCHEMA
    )


def write_shards(table: pa.Table, folder: Path, shard_rows: int) -> None:
    """Writes a table as files of `shard_rows` rows. The last file holds the remaining rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, table.num_rows, shard_rows)):
        pq.write_table(table.slice(start, shard_rows), folder / f"{number:05d}.parquet", compression="zstd")


def read_manifest(directory: Path) -> Manifest:
    """The manifest of the corpus in `directory`."""
    manifest: Manifest = json.loads((directory / MANIFEST).read_text())
    return manifest


def read_shard(path: Path) -> pa.Table:
    """The rows of one shard."""
    return pq.read_table(path, schema=SCHEMA)


def read_rows(directory: Path, split: str) -> pa.Table:
    """All rows of one split of a corpus directory, in the order of its shards."""
    shards = sorted((directory / split).glob("*.parquet"))
    if not shards:
        raise CorpusError(f"{directory} holds no {split} shards; a corpus has train/, valid/ and test/")
    return pa.concat_tables([read_shard(shard) for shard in shards])


def domain_streams(directory: Path, split: str) -> dict[str, NDArray[np.int32]]:
    """Every domain's rows joined in the order of the text: {domain: int32 tokens}."""
    table = read_rows(directory, split)
    domains = np.array(table["domain"].to_pylist())
    index = np.array([int(sample.rpartition("-")[2]) for sample in table["sample_id"].to_pylist()])
    rows_NL = table["input_ids"].combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1)
    order = np.argsort(index, kind="stable")
    return {
        name: rows_NL[order[domains[order] == name]].reshape(-1) for name in dict.fromkeys(domains.tolist())
    }
