"""The compact codec: token ids in fewer bits than their number needs, probabilities in about two.

**Ids.** Tokenizers number their vocabulary from frequent to rare, so small ids are common. An id is written in two
parts. The first is its class, one byte whose likely values Parquet's zstd turns into few bits. The second is the low
bits that the class leaves open. They look random and are packed as they are:

    id < 16        class = id, no further bits
    otherwise      with 2^e ≤ id < 2^(e+1): class = 16 + 8 (e − 4) + the three bits after the first, e − 3 further bits

**Log-probabilities**, of ids sorted by falling probability: −log p as a level, and from one kept id to the next the
difference of levels, one byte. Levels lie 0.08 nat apart where p is large and up to 0.5 where it is small, since an
error of δ nat costs p δ² / 2 of KL: about equally much for every id.

**Tails** at T = 1 and at each stored temperature: √(tail mass) in 4095 steps, two bytes. Decoded probabilities are
made to sum to 1 − tail, so the tail is right to 2.5e-4 at every temperature, whatever the error of the levels.

All of it is vectorised over whole shards. Shapes: M ids in B rows, row after row; N positions, K kept ids,
T temperatures.
"""

from __future__ import annotations

import numpy as np

DIRECT = 16  # ids below have a class of their own
MANTISSA = 3  # bits after the leading one that belong to the class
LARGEST_ID = 2**20 - 1
TAIL_STEPS = 4095
FINE, COARSE, DEEPEST = 0.08, 0.5, 60.0  # nat


def encode_ids(ids_M: np.ndarray, counts_B: np.ndarray) -> tuple[np.ndarray, list[bytes]]:
    """Classes [M] uint8, and each row's packed low bits. ValueError for ids that are negative or 2^20 and more."""
    if ids_M.size and (ids_M.min() < 0 or ids_M.max() > LARGEST_ID):
        raise ValueError(f"ids from {ids_M.min()} to {ids_M.max()}: only 0 to {LARGEST_ID} can be stored")
    large_M = np.maximum(ids_M, DIRECT).astype(np.int32)
    exponent_M = np.frexp(large_M.astype(np.float32))[1] - 1
    leading_M = (large_M >> (exponent_M - MANTISSA)) & (2**MANTISSA - 1)
    class_M = np.where(ids_M < DIRECT, ids_M, DIRECT + ((exponent_M - 4) << MANTISSA) + leading_M)
    class_M = class_M.astype(np.uint8)
    return class_M, _pack(ids_M - _BASE[class_M], _WIDTH[class_M], counts_B)


def decode_ids(class_M: np.ndarray, counts_B: np.ndarray, packed: np.ndarray) -> np.ndarray:
    """int32 [M]; `packed` holds the low bits of all rows, one after the other. ValueError if it has another size."""
    width_M = _WIDTH[class_M]
    start_M, row_bytes_B = _starts(width_M, counts_B)
    if row_bytes_B.sum() != len(packed):
        raise ValueError(f"{len(packed)} bytes of low bits where the classes need {row_bytes_B.sum()}")
    padded = np.concatenate([packed, np.zeros(4, np.uint8)])
    # the four bytes from every byte on: 17 bits straddle at most three
    words = np.lib.stride_tricks.as_strided(padded, (len(packed) + 1, 4), (1, 1))
    word_M = np.ascontiguousarray(words).view("<u4")[:, 0][start_M >> 3]
    low_M = (word_M >> (start_M & 7).astype(np.uint32)) & _MASK[class_M]
    ids_M: np.ndarray = _BASE[class_M] + low_M.astype(np.int32)
    return ids_M


def _pack(low_M: np.ndarray, width_M: np.ndarray, counts_B: np.ndarray) -> list[bytes]:
    """Each row's values side by side, `width` bits each, lowest bit first; rows end at whole bytes."""
    start_M, row_bytes_B = _starts(width_M, counts_B)
    word_M, byte_M, size = low_M << (start_M & 7), start_M >> 3, int(row_bytes_B.sum())
    # neighbours in a byte have no bit in common: adding them is or-ing them
    sums = [np.bincount(byte_M + i, (word_M >> 8 * i) & 255, size + 3) for i in range(3)]
    packed = np.sum(sums, axis=0).astype(np.uint8)
    ends_B = np.cumsum(row_bytes_B)
    return [packed[end - length : end].tobytes() for end, length in zip(ends_B, row_bytes_B, strict=True)]


def _starts(width_M: np.ndarray, counts_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First bit of every value [M] where each row begins at a whole byte, and the bytes of every row [B]."""
    end_M = np.concatenate([[0], np.cumsum(width_M, dtype=np.int64)])
    last_B = np.cumsum(counts_B)
    bits_B = end_M[last_B] - end_M[last_B - counts_B]
    row_bytes_B = (bits_B + 7) >> 3
    padding_B = np.cumsum(8 * row_bytes_B - bits_B) - (8 * row_bytes_B - bits_B)
    return end_M[:-1] + np.repeat(padding_B, counts_B), row_bytes_B


def encode_logprobs(logprobs_NK: np.ndarray) -> np.ndarray:
    """Falling log-probabilities → uint8 [N, K], each entry's level minus that of the entry before."""
    levels_NK = np.searchsorted(_BETWEEN, -logprobs_NK).astype(np.uint8)
    return np.diff(levels_NK, axis=-1, prepend=np.uint8(0))


def decode_logprobs(steps_NK: np.ndarray) -> np.ndarray:
    """float32 log-probabilities, not normalised."""
    return _LEVELS[np.cumsum(steps_NK, axis=-1, dtype=np.uint8)]


def encode_tails(tail_NT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities → uint8 [N, T] of high bytes, and of low bytes."""
    steps_NT = np.rint(np.sqrt(tail_NT.clip(0, 1)) * TAIL_STEPS).astype(np.uint16)
    return (steps_NT >> 8).astype(np.uint8), steps_NT.astype(np.uint8)


def decode_tails(high_NT: np.ndarray, low_NT: np.ndarray) -> np.ndarray:
    """float32 [N, T]."""
    steps_NT = high_NT.astype(np.int32) << 8 | low_NT
    tail_NT: np.ndarray = np.square(steps_NT.astype(np.float32) / TAIL_STEPS)
    return tail_NT


def _classes() -> tuple[np.ndarray, np.ndarray]:
    """Width of the low bits and smallest id of each class."""
    classes = np.arange(DIRECT + ((19 - 4 + 1) << MANTISSA))
    above = (classes - DIRECT).clip(0)
    width = np.where(classes < DIRECT, 0, 4 + (above >> MANTISSA) - MANTISSA)
    base = (2**MANTISSA + (above & (2**MANTISSA - 1))) << width
    return width.astype(np.int32), np.where(classes < DIRECT, classes, base).astype(np.int32)


def _levels() -> np.ndarray:
    """−log p of every level; fewer than 256 reach down to e^-60, below which levels do not differ."""
    levels = [0.0]
    while levels[-1] < DEEPEST:
        levels.append(levels[-1] + min(COARSE, max(FINE, FINE / 5 * np.exp(levels[-1] / 2))))
    return np.array(levels)


_WIDTH, _BASE = _classes()
_MASK = ((1 << _WIDTH) - 1).astype(np.uint32)
_BETWEEN = (_levels()[1:] + _levels()[:-1]) / 2
_LEVELS = -_levels().astype(np.float32)
assert len(_LEVELS) < 256
