"""The teacher's signal on disk: Parquet shards that any program can read, and the manifest that binds them.

A cache is a directory of `00000.parquet`, `00001.parquet`, … , one for each train shard of the corpus and in its order.
One row is one sequence of L tokens, hence L − 1 predictions:

    sample_id   string        the corpus's id
    domain      string        the corpus's domain
    input_ids   list<int32>   L token ids (compact: input_class, input_bits binary, a class for each token)
    …           the signal of its L − 1 positions, see `payload.py`

Rows may differ in L, which is the length of that list (or of the classes). `manifest.json` binds the shards to their
teacher and text (see `manifest.py`).

Shapes: B rows, N positions of all rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparsekd_ray.errors import IntegrityError
from sparsekd_ray.teacher import codec, payload
from sparsekd_ray.teacher.manifest import FORMAT, CacheManifest
from sparsekd_ray.teacher.signal import Sampled, Target, TopK


class Rows(NamedTuple):
    """A decoded shard. Row b has the tokens from `first_B1[b]` to `first_B1[b + 1]`, and one position fewer."""

    sample_ids: list[str]
    domains: list[str]
    input_ids: np.ndarray
    """int32, of all rows"""
    first_B1: np.ndarray
    target: Target

    def part(self, row: int) -> Target:
        """The row's positions."""
        positions = slice(int(self.first_B1[row]) - row, int(self.first_B1[row + 1]) - row - 1)
        return Target(*(column[positions] for column in self.target))

    def tokens(self, row: int) -> np.ndarray:
        return self.input_ids[self.first_B1[row] : self.first_B1[row + 1]]


def shard_name(index: int) -> str:
    return f"{index:05d}.parquet"


def write(
    path: Path | IO[bytes], corpus_rows: pa.Table, signal: TopK | Sampled, manifest: CacheManifest
) -> None:
    """Writes one shard: `corpus_rows` (sample_id, domain, input_ids) and the signal of their positions, in order."""
    ids = corpus_rows["input_ids"].combine_chunks()
    lengths_B = np.diff(ids.offsets.to_numpy())
    _expected(lengths_B, manifest)
    if len(signal.ids_NK) != (lengths_B - 1).sum():
        raise IntegrityError(
            f"a signal of {len(signal.ids_NK)} positions for {len(lengths_B)} rows of {lengths_B.sum()} tokens"
        )
    columns = {name: corpus_rows[name].combine_chunks() for name in ("sample_id", "domain")}
    if manifest.codec == "compact":
        classes, bits = codec.encode_ids(ids.flatten().to_numpy(), lengths_B)
        columns |= {
            "input_class": payload.cells(classes, lengths_B),
            "input_bits": pa.array(bits, pa.binary()),
        }
    else:
        columns["input_ids"] = payload.never_null(ids.offsets, ids.values)
    columns |= payload.encode(signal, lengths_B - 1, manifest)
    schema = pa.schema([pa.field(name, column.type, nullable=False) for name, column in columns.items()])
    table = pa.table(columns, schema)
    # no dictionaries: values hardly repeat; no statistics: the smallest and largest cell would be stored again
    pq.write_table(
        table.replace_schema_metadata({"format": FORMAT}),
        path,
        compression="zstd" if manifest.codec == "compact" else "lz4",  # lz4 is read twice as fast
        use_dictionary=["domain"],
        write_statistics=False,
        row_group_size=len(table),
    )


def read(path: Path | IO[bytes], manifest: CacheManifest, temperature: float) -> Rows:
    """Decodes one shard at one temperature; `IntegrityError` if it is damaged or does not fit the manifest."""
    try:
        table = pq.ParquetFile(path).read(use_threads=False)  # half the time of read_table
    except (pa.ArrowException, OSError) as error:
        raise IntegrityError(
            f"{path} is not a readable Parquet shard: {error}. Remove the cache's directory."
        ) from None
    if (table.schema.metadata or {}).get(b"format") != FORMAT.encode():
        raise IntegrityError(
            f"{path} is not a shard of format {FORMAT}: it was written by another program or version"
        )
    try:
        ids, lengths_B = _tokens(table, manifest)
        target = payload.decode(table, lengths_B - 1, manifest, temperature)
    except (IntegrityError, KeyError, ValueError, IndexError) as error:
        raise IntegrityError(f"{path}: {error}. Remove the cache's directory.") from None
    first_B1 = np.concatenate([[0], np.cumsum(lengths_B)])
    return Rows(table["sample_id"].to_pylist(), table["domain"].to_pylist(), ids, first_B1, target)


def _tokens(table: pa.Table, manifest: CacheManifest) -> tuple[np.ndarray, np.ndarray]:
    """The input ids of all rows, and each row's number of them."""
    compact = manifest.codec == "compact"
    lengths_B = payload.lengths(table, "input_class" if compact else "input_ids")
    _expected(lengths_B, manifest)
    if compact:
        classes = payload.bytes_of(table, "input_class")
        return codec.decode_ids(classes, lengths_B, payload.bytes_of(table, "input_bits")), lengths_B
    return payload.numbers(table, "input_ids", lengths_B), lengths_B


def _expected(lengths_B: np.ndarray, manifest: CacheManifest) -> None:
    """IntegrityError for rows of other lengths than the manifest allows."""
    seq_len = manifest.seq_len
    if (lengths_B < 2).any() or (seq_len is not None and (lengths_B != seq_len).any()):
        raise IntegrityError(
            f"rows of {sorted(set(lengths_B.tolist()))} tokens, where the manifest says {seq_len or 'at least 2'}"
        )
