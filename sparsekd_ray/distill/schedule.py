"""The samples, their split over workers and the learning rate at each step: pure functions of the settings.

The order of samples depends on (seed, step, number of samples per shard) and on nothing else: not on the number of
workers, not on their speed, not on processes that were killed. The loop, the tests and a resumed run call the same
functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

SHARDS_IN_WINDOW = 16  # shards shuffled together, and so kept in memory at once by a worker


def total_steps(samples: int, batch: int, epochs: float) -> int:
    """Optimiser steps of a distillation: whole batches only."""
    return max(1, int(samples * epochs) // batch)


def batch_at(step: int, batch: int, shard_rows: tuple[int, ...], seed: int) -> list[tuple[int, int]]:
    """(shard, row) of every sample of the batch at `step`; epochs follow one another in one endless stream."""
    samples = sum(shard_rows)
    stream = range(step * batch, (step + 1) * batch)
    return [_epoch_order(shard_rows, seed, i // samples)[i % samples] for i in stream]


@lru_cache(maxsize=2)
def _epoch_order(shard_rows: tuple[int, ...], seed: int, epoch: int) -> list[tuple[int, int]]:
    """One epoch: shards in random order, rows shuffled within windows of `SHARDS_IN_WINDOW` shards."""
    rng = np.random.default_rng((seed, epoch))
    shards = [int(shard) for shard in rng.permutation(len(shard_rows))]
    order: list[tuple[int, int]] = []
    for start in range(0, len(shards), SHARDS_IN_WINDOW):
        window = [(s, row) for s in shards[start : start + SHARDS_IN_WINDOW] for row in range(shard_rows[s])]
        order += [window[i] for i in rng.permutation(len(window))]
    return order


def split(items: int, parts: int) -> list[int]:
    """Sizes of `parts` nearly equal shares of `items`, larger ones first."""
    return [items // parts + (part < items % parts) for part in range(parts)]


def micro_batches(batch: int, workers: int, micro_batch: int) -> list[list[int]]:
    """Sizes of each worker's micro-batches: equal numbers of them for all workers (ZeRO's collectives need that),
    unequal sizes, none above `micro_batch`; a size may be 0 where a batch does not divide."""
    shares = split(batch, workers)
    steps = math.ceil(max(shares) / micro_batch)
    return [split(share, steps) for share in shares]


def learning_rate(step: int, steps: int, peak: float, warmup: float, floor: float = 0.1) -> float:
    """Linear rise over the first `warmup` share of the steps, then a cosine to `floor` times the peak."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    progress = (step - rising) / max(1, steps - rising)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def verdict(perplexities: Sequence[float], patience: int, min_gain: float) -> str | None:
    """Whether to stop after these validations: past the "minimum", at "saturation", or not yet (SparseKD §IV-G).

    The first value is that of the model before its first step.
    """
    if len(perplexities) <= patience:
        return None
    best_before = min(perplexities[:-patience])
    best_recent = min(perplexities[-patience:])
    if best_recent >= best_before:
        return "minimum"
    return "saturation" if best_recent > best_before * (1 - min_gain) else None
