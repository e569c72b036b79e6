"""The sampler's threshold from a size: the smallest τ at which the signal of a pilot takes at most so many bytes.

Found once per cache and kept beside its shards, so every actor and every later attempt draws from the same law.
"""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sparsekd_ray.errors import ConfigError
from sparsekd_ray.teacher import shards
from sparsekd_ray.teacher.forward import Forward
from sparsekd_ray.teacher.payload import MANY

SMALLEST, LARGEST = 1 / (MANY - 1), 1.0  # at most 1/τ ids are exact, and 1/τ + 1 drawn
BISECTIONS = 10  # within 0.7 % of τ


def fit(forward: Forward, pilot: pa.Table, bytes_per_token: float) -> float:
    """τ for `bytes_per_token` on the rows of `pilot`, everything in the file but its fixed footer included.

    ConfigError where even the coarsest sample, a single drawn id a position, takes more."""
    size = _size(forward, pilot, LARGEST)
    if size > bytes_per_token:
        raise ConfigError(
            f"teacher.bytes_per_token is {bytes_per_token:g}; the smallest sampled cache of this text takes "
            f"{size:.1f} bytes per token, its input ids included: ask for more"
        )
    low, high = SMALLEST, LARGEST
    for _ in range(BISECTIONS):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if _size(forward, pilot, middle) <= bytes_per_token else (middle, high)
    return high


def _size(forward: Forward, pilot: pa.Table, threshold: float) -> float:
    forward.manifest = forward.manifest | {"threshold": threshold}
    return file_size(pilot, forward.signal(pilot), forward.manifest)


def file_size(rows: pa.Table, signal: Any, manifest: dict[str, Any]) -> float:
    """Bytes per token of a shard's columns."""
    buffer = io.BytesIO()
    shards.write(buffer, rows, signal, manifest)
    return sum(column_sizes(buffer).values()) / len(rows["input_ids"].combine_chunks().flatten())


def column_sizes(file: Any) -> dict[str, int]:
    """Bytes of every column of a Parquet file, compressed."""
    metadata = pq.ParquetFile(file).metadata
    sizes: dict[str, int] = {}
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            column = metadata.row_group(group).column(index)
            name = column.path_in_schema.split(".")[0]
            sizes[name] = sizes.get(name, 0) + column.total_compressed_size
    return sizes
