"""The figures of a running distillation: validation, live rows, and lines of progress."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from sparsekd_ray.distill.job import Training
from sparsekd_ray.evaluate.perplexity import perplexity, window_nll, windows
from sparsekd_ray.runtime import collectives, metrics


def validation_perplexities(training: Training) -> tuple[float, dict[str, float]]:
    """Perplexity in all and by domain, on disjoint windows that the workers share; the same on every worker."""
    rank, world = collectives.rank_and_world()
    model, size = training.model, training.reader.seq_len
    model.eval()
    sums = torch.zeros(len(training.valid), 2, dtype=torch.float64)
    for row, stream in enumerate(training.valid.values()):
        share = windows(stream, size, size)[rank::world]
        scored = sum(window.scored for window in share)
        sums[row] = torch.tensor([math.fsum(window_nll(model, share)), scored], dtype=torch.float64)
    model.train()
    nll, counts = collectives.total(sums).T.tolist()
    domains = {d: perplexity([part], n) for d, part, n in zip(training.valid, nll, counts, strict=True)}
    return perplexity(nll, sum(counts)), domains


def loss_figures(sums: Tensor, positions: int) -> dict[str, object]:
    kl, ce = (sums / positions).tolist()
    return {"kl": kl, "ce": ce}


def log_row(training: Training, figures: Mapping[str, object]) -> None:
    """One row of live figures, from worker 0."""
    if collectives.rank_and_world()[0]:
        return
    step = training.progress.step
    metrics.log(
        training.job.title,
        metrics.TRAINING,
        step=step,
        steps=training.steps,
        tokens=step * training.positions,
        lr=training.learning_rate(max(0, step - 1)),
        memory_gb=metrics.memory_gb(training.engine.device),
        **figures,
    )


def progress_line(training: Training) -> str:
    progress, validation = training.progress, training.progress.history[-1]
    trained = validation["tokens"] - training.first_step * training.positions
    rate = trained / (time.monotonic() - training.started)
    kl, ce = validation["loss"]
    return (
        f"{training.job.title}: step {progress.step}/{training.steps}  KL {kl:.3f}  CE {ce:.3f}  "
        f"lr {training.learning_rate(max(0, progress.step - 1)):.1e}  valid ppl {validation['valid_ppl']:.2f}  "
        f"{rate:,.0f} tokens/s"
    )
