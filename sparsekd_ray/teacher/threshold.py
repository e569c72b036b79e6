"""The sampler's threshold from a size: the smallest τ at which the signal of a pilot takes at most so many bytes.

It is found once per cache and stored with its shards, so every actor and every later attempt draws from the same law.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from sparsekd_ray.errors import ConfigError
from sparsekd_ray.teacher import shards
from sparsekd_ray.teacher.forward import Forward, lengths
from sparsekd_ray.teacher.manifest import CacheManifest
from sparsekd_ray.teacher.payload import MANY
from sparsekd_ray.teacher.signal import Sampled, TopK

SMALLEST, LARGEST = 1 / (MANY - 1), 1.0  # at most 1/τ ids are exact, and 1/τ + 1 drawn
BISECTIONS = 10  # within 0.7 % of τ


def fit(size: Callable[[float], float], bytes_per_token: float) -> float:
    """τ for `bytes_per_token`. `size(τ)` gives the bytes per token of a sample; they fall with τ.

    ConfigError if even the coarsest sample, a single drawn id a position, takes more.
    """
    if (smallest := size(LARGEST)) > bytes_per_token:
        raise ConfigError(
            f"teacher.bytes_per_token is {bytes_per_token:g}; the smallest sampled cache of this text takes "
            f"{smallest:.1f} bytes per token, its input ids included: ask for more"
        )
    low, high = SMALLEST, LARGEST
    for _ in range(BISECTIONS):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if size(middle) <= bytes_per_token else (middle, high)
    return high


def fit_teacher(forward: Forward, pilot: pa.Table, manifest: CacheManifest, bytes_per_token: float) -> float:
    """τ for the rows of `pilot`. All of the file but its fixed footer counts."""

    def size(threshold: float) -> float:
        drawn = replace(manifest, threshold=threshold)
        return file_size(pilot, forward.signal(pilot, drawn), drawn)[0]

    return fit(size, bytes_per_token)


def file_size(rows: pa.Table, signal: TopK | Sampled, manifest: CacheManifest) -> tuple[float, io.BytesIO]:
    """Bytes per token of a shard's columns, and the shard."""
    file = io.BytesIO()
    shards.write(file, rows, signal, manifest)
    file.seek(0)
    return sum(column_sizes(file).values()) / int(lengths(rows).sum()), file


def column_sizes(file: Path | IO[bytes]) -> dict[str, int]:
    """Bytes of every column of a Parquet file, compressed."""
    metadata = pq.ParquetFile(file).metadata
    sizes: dict[str, int] = {}
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            column = metadata.row_group(group).column(index)
            name = column.path_in_schema.split(".")[0]
            sizes[name] = sizes.get(name, 0) + column.total_compressed_size
    return sizes
