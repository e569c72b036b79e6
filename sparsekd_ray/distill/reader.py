"""Batches for the loop from the teacher's cache: any row of any shard, with a window of shards in memory.

Shapes: B sequences, L tokens, N = B · (L − 1) predictions, K kept ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from sparsekd_ray.distill.schedule import SHARDS_IN_WINDOW
from sparsekd_ray.errors import ConfigError, ModelError
from sparsekd_ray.store import Ref, Store
from sparsekd_ray.teacher import shards
from sparsekd_ray.teacher.manifest import MANIFEST, read_manifest
from sparsekd_ray.teacher.signal import Target, joined


class Batch(NamedTuple):
    input_ids_BL: torch.Tensor
    labels_N: torch.Tensor
    target: Target


class SampleReader:
    """Rows of a cache by (shard, row), the teacher at one temperature; a shard is verified before its first use."""

    def __init__(self, store: Store, cache: Ref, temperature: float) -> None:
        self.manifest = read_manifest(store.fetch(cache, [MANIFEST]))
        if self.manifest.seq_len is None:
            raise ConfigError(
                f"{store.url(cache.key)} holds sequences of unequal length, and a batch takes one length: "
                "train on a corpus packed to corpus.seq_len"
            )
        self.shard_rows = self.manifest.shard_rows
        self.samples, self.seq_len = sum(self.shard_rows), self.manifest.seq_len

        @lru_cache(maxsize=SHARDS_IN_WINDOW)
        def shard(index: int) -> shards.Rows:
            name = shards.shard_name(index)
            return shards.read(store.fetch(cache, [name]) / name, self.manifest, temperature)

        self._shard = shard

    def targets(self, places: Sequence[int], samples: Sequence[str]) -> list[Target]:
        """The teacher at every position of these rows.

        places: row numbers, counted over all shards. samples: the names that these rows must have, or ModelError.
        """
        ends, targets = np.cumsum(self.shard_rows), []
        for place, sample in zip(places, samples, strict=True):
            index = int(np.searchsorted(ends, place, side="right"))
            rows, row = self._shard(index), int(place - ends[index] + self.shard_rows[index])
            if rows.sample_ids[row] != sample:
                raise ModelError(
                    f"row {place} of the cache is {rows.sample_ids[row]!r}, of the corpus {sample!r}: capture it again"
                )
            # clones, because a view would keep its whole shard in memory
            targets.append(Target(*(column.clone() for column in rows.part(row))))
        return targets

    def batch(self, samples: list[tuple[int, int]], device: torch.device | str) -> Batch:
        """The samples as one batch on `device`."""
        rows = [(self._shard(shard), row) for shard, row in samples]
        tokens = [torch.from_numpy(shard.tokens(row)).long() for shard, row in rows]
        input_ids_BL = torch.stack(tokens)
        target = joined([shard.part(row) for shard, row in rows])
        return Batch(
            input_ids_BL.to(device),
            input_ids_BL[:, 1:].flatten().to(device),
            Target(*(column.to(device) for column in target)),
        )
