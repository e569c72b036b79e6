"""Signals as Parquet columns and back, in two codecs: plain, for any reader, and compact (see `codec.py`).

A cell holds all positions of its row, one after the other. Lists are of numbers, binary cells of bytes (uint8).

    topk, plain       topk_ids list<int32>, topk_logprobs list<float32> (k per position, by falling probability, at
                      temperature 1), log_z list<float32> (one per stored temperature and position)
    topk, compact     id_class, id_bits binary; steps binary (levels, all of rank 1, then all of rank 2, …);
                      tail_high, tail_low binary (one byte each per position, at T = 1 and each stored temperature)
    sampled, plain    exact, drawn list<uint8> (how many ids of each sort, per position); ids list<int32>;
                      logprobs list<float32> (of the exact ids, at the sampler's temperature)
    sampled, compact  exact, drawn binary; id_class, id_bits binary (drawn ids but the first as differences);
                      steps binary (of the exact ids, −log p in 1/32 nat)

The weight of drawn ids, the threshold, is in the manifest. Shapes: B rows, N positions of all rows, K ids, T
temperatures; `positions_B` are the positions of each row.
"""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import torch

from sparsekd_ray.errors import IntegrityError
from sparsekd_ray.teacher import codec
from sparsekd_ray.teacher.manifest import CacheManifest
from sparsekd_ray.teacher.signal import NOTHING, Sampled, Target, TopK, tempered

PER_NAT = 32  # steps of the exact log-probabilities in a sample: they are few and weigh much
MANY = 255  # ids of one sort that a position can hold


def encode(signal: TopK | Sampled, positions_B: np.ndarray, manifest: CacheManifest) -> dict[str, pa.Array]:
    """The columns of a shard in the manifest's codec."""
    compact = manifest.codec == "compact"
    if isinstance(signal, TopK):
        return (_topk_compact if compact else _topk_plain)(signal, positions_B, manifest)
    return _sampled(signal, positions_B, compact)


def decode(table: pa.Table, positions_B: np.ndarray, manifest: CacheManifest, temperature: float) -> Target:
    """All positions of a shard at `temperature`.

    ModelError for a temperature that the cache does not hold. IntegrityError for a column whose size does not fit the
    rows and the manifest.
    """
    stored = manifest.normaliser_index(temperature)
    try:
        if manifest.signal == "sampled":
            return _from_sampled(table, positions_B, manifest)
        if manifest.codec == "compact":
            return _from_topk_compact(table, positions_B, manifest, temperature)
        return _from_topk_plain(table, positions_B, manifest, temperature, stored)
    except (KeyError, ValueError, IndexError) as error:
        raise IntegrityError(f"its columns do not fit its rows: {error}") from None


def _topk_plain(signal: TopK, positions_B: np.ndarray, manifest: CacheManifest) -> dict[str, pa.Array]:
    k, stored = signal.ids_NK.shape[1], signal.log_z_NT.shape[1]
    return {
        "topk_ids": _lists(signal.ids_NK.numpy(), positions_B * k),
        "topk_logprobs": _lists(signal.logprobs_NK.numpy(), positions_B * k),
        "log_z": _lists(signal.log_z_NT.numpy(), positions_B * stored),
    }


def _from_topk_plain(
    table: pa.Table, positions_B: np.ndarray, manifest: CacheManifest, temperature: float, place: int | None
) -> Target:
    k, stored = manifest.k, len(manifest.temperatures)
    ids_NK = numbers(table, "topk_ids", positions_B * k).reshape(-1, k)
    logprobs_NK = numbers(table, "topk_logprobs", positions_B * k).reshape(-1, k)
    log_z_NT = numbers(table, "log_z", positions_B * stored).reshape(-1, stored)
    log_z_N = np.zeros(len(ids_NK), np.float32) if place is None else log_z_NT[:, place]
    tempered_NK, tail_N = tempered(_tensor(logprobs_NK), _tensor(log_z_N), temperature)
    return Target(_tensor(ids_NK), tempered_NK, tail_N)


def _topk_compact(signal: TopK, positions_B: np.ndarray, manifest: CacheManifest) -> dict[str, pa.Array]:
    k, temperatures = signal.ids_NK.shape[1], manifest.readable_temperatures
    classes, bits = codec.encode_ids(signal.ids_NK.numpy().reshape(-1), positions_B * k)
    steps_NK = codec.encode_logprobs(signal.logprobs_NK.numpy())
    log_z = [_log_z(signal, manifest, t) for t in temperatures]
    tail_NT = torch.stack(
        [tempered(signal.logprobs_NK, z, t)[1] for z, t in zip(log_z, temperatures, strict=True)], -1
    )
    high_NT, low_NT = codec.encode_tails(tail_NT.numpy())
    by_rank = [part.T.reshape(-1) for part in np.split(steps_NK, np.cumsum(positions_B)[:-1])]
    return {
        "id_class": cells(classes, positions_B * k),
        "id_bits": pa.array(bits, pa.binary()),
        "steps": cells(np.concatenate(by_rank), positions_B * k),
        "tail_high": cells(high_NT, positions_B * len(temperatures)),
        "tail_low": cells(low_NT, positions_B * len(temperatures)),
    }


def _log_z(signal: TopK, manifest: CacheManifest, temperature: float) -> torch.Tensor:
    index = manifest.normaliser_index(temperature)
    return torch.zeros(len(signal.ids_NK)) if index is None else signal.log_z_NT[:, index]


def _from_topk_compact(
    table: pa.Table, positions_B: np.ndarray, manifest: CacheManifest, temperature: float
) -> Target:
    k, temperatures = manifest.k, manifest.readable_temperatures
    classes = bytes_of(table, "id_class", positions_B * k)
    ids_NK = codec.decode_ids(classes, positions_B * k, bytes_of(table, "id_bits")).reshape(-1, k)
    steps = bytes_of(table, "steps", positions_B * k)
    parts = np.split(steps, np.cumsum(positions_B * k)[:-1])
    levels_NK = np.concatenate([codec.decode_logprobs(part.reshape(k, -1).T) for part in parts])
    tail = positions_B * len(temperatures)
    high, low = (
        bytes_of(table, name, tail).reshape(-1, len(temperatures)) for name in ("tail_high", "tail_low")
    )
    place = temperatures.index(temperature)
    tail_N = _tensor(codec.decode_tails(high[:, place], low[:, place]))
    shape_NK = (_tensor(levels_NK) / temperature).log_softmax(-1)
    return Target(_tensor(ids_NK), shape_NK + (1 - tail_N).clamp(min=1e-4).log()[:, None], tail_N)


def _sampled(signal: Sampled, positions_B: np.ndarray, compact: bool) -> dict[str, pa.Array]:
    exact_N, drawn_N = signal.exact_N.numpy(), signal.drawn_N.numpy()
    assert max(exact_N.max(initial=0), drawn_N.max(initial=0)) <= MANY, "the threshold bounds them"
    place_K = np.arange(signal.ids_NK.shape[1])
    ids_M = signal.ids_NK.numpy()[place_K < (exact_N + drawn_N)[:, None]]
    logprobs_M = signal.logprobs_NK.numpy()[place_K < exact_N[:, None]]
    counts = {"exact": exact_N.astype(np.uint8), "drawn": drawn_N.astype(np.uint8)}
    ids_B, exact_B = _by_row(exact_N + drawn_N, positions_B), _by_row(exact_N, positions_B)
    if not compact:
        columns = {name: _lists(count_N, positions_B) for name, count_N in counts.items()}
        return columns | {"ids": _lists(ids_M, ids_B), "logprobs": _lists(logprobs_M, exact_B)}
    classes, bits = codec.encode_ids(_differences(ids_M, exact_N, drawn_N), ids_B)
    steps_M = np.rint(-logprobs_M * PER_NAT).clip(0, 255).astype(np.uint8)
    return {name: cells(count_N, positions_B) for name, count_N in counts.items()} | {
        "id_class": cells(classes, ids_B),
        "id_bits": pa.array(bits, pa.binary()),
        "steps": cells(steps_M, exact_B),
    }


def _from_sampled(table: pa.Table, positions_B: np.ndarray, manifest: CacheManifest) -> Target:
    compact = manifest.codec == "compact"
    read = bytes_of if compact else numbers
    exact_N, drawn_N = (read(table, name, positions_B).astype(np.int64) for name in ("exact", "drawn"))
    ids_B, exact_B = _by_row(exact_N + drawn_N, positions_B), _by_row(exact_N, positions_B)
    if compact:
        classes = bytes_of(table, "id_class", ids_B)
        coded_M = codec.decode_ids(classes, ids_B, bytes_of(table, "id_bits"))
        ids_M = _sums(coded_M, exact_N, drawn_N)
        logprobs_M = bytes_of(table, "steps", exact_B) * np.float32(-1 / PER_NAT)
    else:
        ids_M, logprobs_M = numbers(table, "ids", ids_B), numbers(table, "logprobs", exact_B)
    place_K = np.arange(int((exact_N + drawn_N).max(initial=1)))
    kept_NK, exact_NK = place_K < (exact_N + drawn_N)[:, None], place_K < exact_N[:, None]
    ids_NK = np.zeros(kept_NK.shape, np.int32)
    logprobs_NK = np.where(kept_NK, np.float32(math.log(manifest.drawn_weight)), np.float32(NOTHING))
    ids_NK[kept_NK], logprobs_NK[exact_NK] = ids_M, logprobs_M
    return Target(_tensor(ids_NK), _tensor(logprobs_NK), torch.zeros(len(ids_NK)))


def _follows(exact_N: np.ndarray, drawn_N: np.ndarray) -> np.ndarray:
    """Whether each of all ids [M] is a drawn id that follows another drawn id of its position."""
    counts_N = exact_N + drawn_N
    place_M = np.arange(counts_N.sum()) - np.repeat(np.cumsum(counts_N) - counts_N, counts_N)
    follows_M: np.ndarray = place_M > np.repeat(exact_N, counts_N)
    return follows_M


def _differences(ids_M: np.ndarray, exact_N: np.ndarray, drawn_N: np.ndarray) -> np.ndarray:
    """Drawn ids rise: all but the first of a position are written as the difference from the one before, less 1."""
    before_M = np.concatenate([[0], ids_M[:-1] + 1]).astype(np.int32)
    return np.where(_follows(exact_N, drawn_N), ids_M - before_M, ids_M)


def _sums(coded_M: np.ndarray, exact_N: np.ndarray, drawn_N: np.ndarray) -> np.ndarray:
    follows_M = _follows(exact_N, drawn_N)
    total_M = np.cumsum(coded_M.astype(np.int64) + follows_M)
    # the running total, less its value before the id from which the differences start
    start_M = np.maximum.accumulate(np.where(follows_M, 0, np.arange(len(coded_M))))
    ids_M: np.ndarray = (total_M - total_M[start_M] + coded_M[start_M]).astype(np.int32)
    return ids_M


def _by_row(count_N: np.ndarray, positions_B: np.ndarray) -> np.ndarray:
    """Σ of `count_N` over each row's positions."""
    total = np.concatenate([[0], np.cumsum(count_N, dtype=np.int64)])
    last_B = np.cumsum(positions_B)
    sums_B: np.ndarray = total[last_B] - total[last_B - positions_B]
    return sums_B


def _lists(values: np.ndarray, counts_B: np.ndarray) -> pa.ListArray:
    """A flat array as lists of these lengths, without a Python object per value."""
    return never_null(_offsets(counts_B), pa.array(values.reshape(-1)))


def never_null(offsets: pa.Array, values: pa.Array) -> pa.ListArray:
    """Lists whose values cannot be null: Parquet then stores no definition levels, and reads faster."""
    kind = pa.list_(pa.field("element", values.type, nullable=False))
    return pa.ListArray.from_arrays(offsets, values, type=kind)


def cells(values: np.ndarray, counts_B: np.ndarray) -> pa.Array:
    """uint8 values as binary cells of these lengths."""
    buffers = [None, _offsets(counts_B).buffers()[1], pa.py_buffer(np.ascontiguousarray(values))]
    return pa.Array.from_buffers(pa.binary(), len(counts_B), buffers)


def _offsets(counts_B: np.ndarray) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(counts_B)]).astype(np.int32))


def lengths(table: pa.Table, name: str) -> np.ndarray:
    """Values in every cell of a column of lists or bytes [B]."""
    column = table[name].combine_chunks()
    ends = np.frombuffer(column.buffers()[1], np.int32)[column.offset : column.offset + len(column) + 1]
    return np.diff(ends).astype(np.int64)


def numbers(table: pa.Table, name: str, counts_B: np.ndarray) -> np.ndarray:
    column = table[name].combine_chunks()
    _expect(name, lengths(table, name), counts_B)
    values: np.ndarray = column.flatten().to_numpy(zero_copy_only=False)
    return values


def bytes_of(table: pa.Table, name: str, counts_B: np.ndarray | None = None) -> np.ndarray:
    column = table[name].combine_chunks()
    _, offsets, data = column.buffers()
    ends = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
    if counts_B is not None:
        _expect(name, lengths(table, name), counts_B)
    return np.frombuffer(data or b"", np.uint8)[ends[0] : ends[-1]]


def _expect(name: str, sizes_B: np.ndarray, counts_B: np.ndarray) -> None:
    if not np.array_equal(sizes_B, counts_B):
        raise ValueError(
            f"{name} has {sizes_B.sum()} values where {counts_B.sum()} belong, or splits them otherwise"
        )


def _tensor(values: np.ndarray) -> torch.Tensor:
    """A tensor with its own memory, copied from Parquet's buffers."""
    return torch.from_numpy(np.array(values))
