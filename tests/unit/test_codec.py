"""The compact codec: exact ids, bounded errors of everything else."""

import numpy as np
import pytest

from sparsekd_ray.teacher import codec


def naive_ids(ids, counts):
    """Bit by bit, as the module's docstring says."""
    classes, rows, place = [], [], 0
    for count in counts:
        bits = []
        for i in ids[place : place + count]:
            if i < 16:
                classes.append(i)
                continue
            e = int(i).bit_length() - 1
            classes.append(16 + 8 * (e - 4) + ((int(i) >> (e - 3)) & 7))
            bits += [(int(i) >> b) & 1 for b in range(e - 3)]
        bits += [0] * (-len(bits) % 8)
        rows.append(
            bytes(sum(bit << b for b, bit in enumerate(bits[i : i + 8])) for i in range(0, len(bits), 8))
        )
        place += count
    return classes, rows


@pytest.mark.parametrize("vocabulary", [3, 17, 2048, 151_936, 200_064, 262_144, 2**20])
@pytest.mark.parametrize("counts", [[1], [0, 5, 0, 0, 64, 1, 0], [300, 301]])
def test_ids_are_exact_and_as_defined(vocabulary, counts):
    rng = np.random.default_rng(vocabulary)
    ids = np.where(rng.random(sum(counts)) < 0.5, rng.integers(0, vocabulary, sum(counts)), vocabulary - 1)
    ids[::3] = np.minimum(np.exp(rng.uniform(0, np.log(vocabulary), len(ids[::3]))), vocabulary - 1).astype(
        int
    )
    classes, rows = codec.encode_ids(ids.astype(np.int32), np.array(counts))
    assert (classes.tolist(), rows) == naive_ids(ids, counts)
    packed = np.frombuffer(b"".join(rows), np.uint8)
    assert np.array_equal(codec.decode_ids(classes, np.array(counts), packed), ids)


@pytest.mark.parametrize("bad", [-1, 2**20])
def test_ids_beyond_the_format_are_refused(bad):
    with pytest.raises(ValueError, match=str(bad)):
        codec.encode_ids(np.array([0, bad], np.int32), np.array([2]))


def test_low_bits_of_another_size_are_refused():
    classes, rows = codec.encode_ids(np.array([1000, 2000], np.int32), np.array([2]))
    with pytest.raises(ValueError, match="low bits"):
        codec.decode_ids(classes, np.array([2]), np.frombuffer(rows[0] + b"\0", np.uint8))


def test_levels_are_near_where_probability_is_large():
    logprobs = -np.sort(np.random.default_rng(0).exponential(6, (500, 32)).astype(np.float32), axis=-1)
    logprobs = np.maximum(logprobs, -codec.DEEPEST)
    error = np.abs(codec.decode_logprobs(codec.encode_logprobs(logprobs)) - logprobs)
    assert error.max() <= codec.COARSE / 2 + 1e-5
    assert error[logprobs > -3].max() <= codec.FINE / 2 + 1e-5
    below = np.array([[0.0, -200.0, -300.0]], np.float32)
    assert codec.decode_logprobs(codec.encode_logprobs(below))[0, 2] <= -codec.DEEPEST


def test_tails_are_within_their_bound():
    tails = np.concatenate([np.linspace(0, 1, 5001), [1e-7, 1e-4]]).astype(np.float32)[:, None]
    found = codec.decode_tails(*codec.encode_tails(tails))
    assert np.abs(found - tails).max() <= 2.5e-4
    assert found[0] == 0 and found[5000] == 1
