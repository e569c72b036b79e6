"""Order of samples, shares of a batch, learning rate, stopping."""

import pytest

from sparsekd_ray.distill import schedule


@pytest.mark.parametrize("shard_rows", [(5,), (4, 4, 3), (1,) * 40, (128, 128, 7)])
def test_every_epoch_reads_every_sample_once(shard_rows):
    samples, batch = sum(shard_rows), 3
    stream = [s for step in range(3 * samples) for s in schedule.batch_at(step, batch, shard_rows, seed=7)]
    everything = sorted((shard, row) for shard, rows in enumerate(shard_rows) for row in range(rows))
    epochs = [stream[i : i + samples] for i in range(0, 3 * samples, samples)]
    assert all(sorted(epoch) == everything for epoch in epochs)
    if samples > 8:
        assert epochs[0] != epochs[1], "epochs are shuffled anew"


def test_the_order_depends_on_the_seed_alone():
    rows = (16, 16, 16)
    one = [schedule.batch_at(step, 4, rows, seed=1) for step in range(12)]
    backwards = [schedule.batch_at(step, 4, rows, seed=1) for step in reversed(range(12))]
    assert one == backwards[::-1]
    assert one != [schedule.batch_at(step, 4, rows, seed=2) for step in range(12)]


def test_a_window_bounds_the_shards_in_memory():
    rows = (2,) * (3 * schedule.SHARDS_IN_WINDOW)
    order = [s for step in range(sum(rows)) for s in schedule.batch_at(step, 1, rows, seed=0)]
    size = 2 * schedule.SHARDS_IN_WINDOW
    for first in range(0, len(order), size):
        assert len({shard for shard, _ in order[first : first + size]}) == schedule.SHARDS_IN_WINDOW


@pytest.mark.parametrize("batch, workers, micro", [(8, 2, 8), (8, 3, 2), (5, 2, 1), (7, 7, 4), (64, 3, 5)])
def test_micro_batches_add_up_and_are_equally_many(batch, workers, micro):
    sizes = schedule.micro_batches(batch, workers, micro)
    assert sum(map(sum, sizes)) == batch
    assert len({len(worker) for worker in sizes}) == 1
    assert max(max(worker) for worker in sizes) <= micro
    shares = [sum(worker) for worker in sizes]
    assert max(shares) - min(shares) <= 1


def test_learning_rate_rises_then_falls_to_a_tenth():
    rates = [schedule.learning_rate(step, 100, 1e-3, 0.1) for step in range(101)]
    assert rates[9] == rates[10] == max(rates) == 1e-3
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(1e-4)


def test_learning_rate_may_fall_to_zero_after_the_last_step():
    rates = [schedule.learning_rate(step, 100, 1.0, 0.05, floor=0.0) for step in range(101)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert 0 < rates[99] < 1e-3 and rates[100] == pytest.approx(0)
    assert schedule.learning_rate(0, 1, 1.0, 0.05, floor=0.0) == 1


@pytest.mark.parametrize(
    "perplexities, expected",
    [
        ([50.0], None),
        ([50, 40, 35, 33], None),
        ([50, 40, 41, 42, 43], "minimum"),
        ([50, 40, 39.99, 39.985, 39.98], "saturation"),
        ([50, 40, 41, 42, 39], None),
        ([30, 31, 32, 33], "minimum"),
    ],
)
def test_stops_at_the_minimum_or_at_saturation(perplexities, expected):
    assert schedule.verdict(perplexities, patience=3, min_gain=1e-3) == expected
