"""What the benchmarks compute, on cases with a known answer; their speeds are not tested."""

import re
from pathlib import Path

import pytest
import torch

import benchmarks
from benchmarks import synthetic
from benchmarks.__main__ import main
from benchmarks.gradient import angles, kl_gradient
from sparsekd_ray.errors import ConfigError
from sparsekd_ray.teacher import threshold

V, D = 80, 5


def student(index):
    """Hidden states with something in common, so that gradients add up over a batch."""
    return (1 + torch.randn(20, D, generator=torch.Generator().manual_seed(index))).requires_grad_()


def measured(tau, chunks=32, batches=(1, 32)):
    generator = torch.Generator().manual_seed(0)
    logits = [synthetic.logits(20, V, generator) for _ in range(chunks)]
    head = torch.nn.Parameter(0.1 * torch.randn(V, D, generator=generator))
    return angles(lambda: logits, tau, 2.0, kl_gradient(student, head, [head], 2.0), batches)


def test_a_sample_that_leaves_nothing_out_has_the_gradient_of_full_kl():
    for found in measured(1e-6):
        assert found["angle_deg"] < 0.1 and found["norm_ratio"] == pytest.approx(1, abs=1e-4)


def test_noise_averages_out_over_larger_batches():
    small, large = measured(0.05)
    assert 0.1 < large["angle_deg"] < small["angle_deg"] / 3


@pytest.mark.parametrize("budget", [2.0, 17.0, 200.0])
def test_the_threshold_is_the_smallest_within_the_budget(budget):
    found = threshold.fit(lambda tau: 1 / tau, budget)
    assert 1 / found <= budget and found == pytest.approx(max(1 / budget, threshold.SMALLEST), rel=0.01)


def test_a_budget_below_the_coarsest_sample_is_refused():
    with pytest.raises(ConfigError, match=r"is 0\.9; the smallest sampled cache of this text takes 1\.0"):
        threshold.fit(lambda tau: 1 / tau, 0.9)


def test_measurements_are_no_part_of_the_package():
    package = Path(benchmarks.__file__).parents[1] / "sparsekd_ray"
    lines = [line for path in package.rglob("*.py") for line in path.read_text().splitlines()]
    assert not [line for line in lines if re.match(r"\s*(from|import) benchmarks\b", line)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("name", ["prune", "speed"])
def test_a_gpu_that_is_not_here_is_refused_before_any_work(name, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks", name, "--gpu"])
    assert main() == 2
    assert "torch finds no GPU" in capsys.readouterr().err
