"""How far the gradient of a sparse signal's loss points away from that of full-vocabulary KL.

Shapes: N positions, n positions of one chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from sparsekd_ray.distill.loss import kd_loss
from sparsekd_ray.teacher.signal import Sampled, Target, sampled

Chunks = Callable[[], Iterable[torch.Tensor]]
"""The same logits at every call, a chunk of positions at a time."""
Gradient = Callable[[int, Target], torch.Tensor]
"""Gradient of a loss on one chunk with respect to all weights, flattened."""


def samples(chunks: Chunks, threshold: float, temperature: float) -> Iterator[tuple[torch.Tensor, Sampled]]:
    """Every chunk with its sample: the same at every call."""
    generator = torch.Generator().manual_seed(1)
    for logits_nV in chunks():
        draw_n = torch.rand(len(logits_nV), generator=generator)
        yield logits_nV, sampled(logits_nV, temperature, threshold, draw_n)


def angles(
    chunks: Chunks, threshold: float, temperature: float, gradient: Gradient, batches: tuple[int, ...]
) -> list[dict[str, float]]:
    """Between the gradients of a sample and of full-vocabulary KL, each summed over a batch of so many chunks: for
    every size of batch, means over the batches of the angle in degrees and of the ratio of their norms."""
    found: list[list[tuple[float, float]]] = [[] for _ in batches]
    sums = [torch.zeros(2, 1) for _ in batches]
    for index, (logits_nV, drawn) in enumerate(samples(chunks, threshold, temperature)):
        none_n = torch.zeros(len(logits_nV))
        sparse = gradient(index, Target(drawn.ids_NK, drawn.logprobs_NK, none_n))
        both = torch.stack([sparse, gradient(index, whole(logits_nV, temperature))])
        for place, size in enumerate(batches):
            sums[place] = sums[place] + both
            if (index + 1) % size == 0:
                found[place].append(_compared(*sums[place]))
                sums[place] = torch.zeros(2, 1)
    means = [[statistics.mean(column) for column in zip(*pairs, strict=True)] for pairs in found]
    return [{"angle_deg": degrees, "norm_ratio": ratio} for degrees, ratio in means]


def _compared(sparse: torch.Tensor, full: torch.Tensor) -> tuple[float, float]:
    cosine = float(torch.nn.functional.cosine_similarity(sparse, full, dim=0))
    return math.degrees(math.acos(min(1.0, cosine))), float(sparse.norm() / full.norm())


def whole(logits_nV: torch.Tensor, temperature: float) -> Target:
    """The teacher's whole distribution as a target: every id is kept, in the order of the vocabulary."""
    ids_nV = torch.arange(logits_nV.shape[1], dtype=torch.int32).expand(len(logits_nV), -1)
    return Target(ids_nV, (logits_nV / temperature).log_softmax(-1), torch.zeros(len(logits_nV)))


def kl_gradient(
    student: Callable[[int], torch.Tensor],
    head_VD: torch.Tensor,
    weights: list[Any],
    temperature: float,
) -> Gradient:
    """Σ KL's gradient to `weights`, of a student whose hidden states for chunk i are `student(i)`."""

    def gradient(index: int, target: Target) -> torch.Tensor:
        hidden_nD = student(index)
        labels_n = torch.zeros(len(hidden_nD), dtype=torch.long)
        loss, _, _ = kd_loss(
            hidden_nD, head_VD, labels_n, target, temperature=temperature, kl_weight=1.0, ce_weight=0.0
        )
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights)])

    return gradient
