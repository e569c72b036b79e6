"""What is kept of a teacher, against its definition over the whole vocabulary."""

import math

import pytest
import torch

from benchmarks import synthetic
from sparsekd_ray.teacher.signal import NOTHING, largest, sampled, tempered, topk


@pytest.mark.parametrize("v", [7, 40, 1056, 1100, 151_936, 200_064, 262_144])
def test_the_largest_are_those_of_torch(v):
    k = min(32, v - 1)
    values = torch.randn(3, v, generator=torch.Generator().manual_seed(v))
    found, columns = largest(values, k)
    assert torch.equal(found, values.topk(k).values)
    assert torch.equal(values.gather(1, columns), found)


def test_log_probabilities_and_normalisers_are_exact_at_every_temperature():
    """Guessing the tail from what the kept ids leave at temperature 1 is off by a factor of ten; log Z is exact."""
    logits = torch.randn(5, 4000, generator=torch.Generator().manual_seed(0)) * 2
    signal = topk(logits, 32, (1.5, 1.0, 4.0))
    for column, t in enumerate((1.5, 1.0, 4.0)):
        full = (logits.double() / t).softmax(-1)
        logprobs, tail = tempered(signal.logprobs_NK, signal.log_z_NT[:, column], t)
        expected = full.gather(1, signal.ids_NK.long())
        torch.testing.assert_close(logprobs.exp().double(), expected, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(tail.double(), 1 - expected.sum(-1), rtol=1e-4, atol=1e-5)


def test_huge_and_equal_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0, 0.0], [3.0, 3.0, 3.0, 3.0]])
    signal = topk(logits, 2, (2.0,))
    assert torch.isfinite(signal.logprobs_NK).all() and torch.isfinite(signal.log_z_NT).all()
    torch.testing.assert_close(signal.logprobs_NK[1], torch.full((2,), math.log(0.25)))


def naive_sample(p, threshold, draw):
    """Large ids as they are; then marks at threshold · (draw + 0, 1, 2, …) on the line of the small ones."""
    exact = {i: x for i, x in enumerate(p) if x >= threshold}
    drawn, line, mark = [], 0.0, threshold * draw
    for i, x in enumerate(p):
        if x < threshold:
            line += x
            if line > mark:
                drawn.append(i)
                mark += threshold
    return exact, drawn


@pytest.mark.parametrize("v, threshold", [(11, 0.2), (60, 0.05), (60, 1.0), (64, 0.1), (400, 0.01)])
def test_a_sample_is_the_naive_one(v, threshold):
    torch.manual_seed(v)
    logits, draws = 2 * torch.randn(25, v), torch.rand(25)
    found = sampled(logits, 1.5, threshold, draws)
    for n, p in enumerate((logits.double() / 1.5).softmax(-1).tolist()):
        exact, drawn = naive_sample(p, threshold, float(draws[n]))
        ids, count = found.ids_NK[n].tolist(), int(found.exact_N[n])
        assert ids[:count] == sorted(exact, key=lambda i: -p[i])
        end = count + int(found.drawn_N[n])
        assert ids[count:end] == drawn
        assert found.logprobs_NK[n, :count].exp().tolist() == pytest.approx(
            [p[i] for i in ids[:count]], rel=1e-4
        )
        assert found.logprobs_NK[n, count:end].tolist() == pytest.approx([math.log(threshold)] * len(drawn))
        assert (found.logprobs_NK[n, end:] == NOTHING).all()


@pytest.mark.parametrize("v", [200_064, 262_151])
def test_a_sample_of_a_large_vocabulary_is_the_naive_one(v):
    """From the same probabilities: over so many ids the last bits of a softmax move marks by themselves."""
    logits = synthetic.logits(4, v, torch.Generator().manual_seed(0))
    draws, threshold = torch.tensor([0.0, 0.3, 0.7, 0.999]), 0.02
    found = sampled(logits, 2.0, threshold, draws)
    for n, p in enumerate((logits / 2).softmax(-1).tolist()):
        exact, drawn = naive_sample(p, threshold, float(draws[n]))
        count = int(found.exact_N[n])
        assert found.ids_NK[n, :count].tolist() == sorted(exact, key=lambda i: -p[i])
        assert found.ids_NK[n, count : count + int(found.drawn_N[n])].tolist() == drawn


def test_a_sample_is_right_on_average():
    """Over evenly spread draws the mean estimate is p itself, id by id: no bias, not only little."""
    logits = 2 * torch.randn(1, 50, generator=torch.Generator().manual_seed(1))
    draws = (torch.arange(4000) + 0.5) / 4000
    found = sampled(logits.expand(4000, -1), 2.0, 0.07, draws)
    estimate = torch.zeros(4000, 50).scatter_add_(1, found.ids_NK.long(), found.logprobs_NK.exp())
    torch.testing.assert_close(estimate.mean(0), (logits[0] / 2).softmax(-1), atol=3e-4, rtol=0.01)
    assert found.drawn_N.max() - found.drawn_N.min() <= 1, "systematic: the number of draws hardly varies"
