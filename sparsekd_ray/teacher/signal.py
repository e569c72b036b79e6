"""A teacher's probabilities at one position, as one of two sparse signals that feed one loss.

`topk`     the k likeliest ids with log-probabilities, and log Z_T = log Σ_v p_v^{1/T} over the whole vocabulary, which
           makes every kept probability at temperature T, and the mass of all others together (the tail), exact:
           p_T(i) = p_i^{1/T} / Z_T. Guessing Z_T from the kept values is wrong by an order of magnitude.
`sampled`  an unbiased estimate of p_T itself, with no tail. Every p_i ≥ τ is kept as it is. The smaller ones are
           sampled: id i is drawn with probability p_i / τ and has weight τ. So E[t̂] = p_T, and the expected gradient is
           exact.
           (random sampling distillation: arXiv 2503.16870; here with a threshold and one systematic draw per position)

Pure functions of logits. Shapes: N positions, D hidden size, V vocabulary, K kept ids, T temperatures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

GROUP = 32  # neighbouring ids that share one maximum in the search for the k largest
NOTHING = -1e4  # log-probability of the ids that pad a position: its exponential is 0


class TopK(NamedTuple):
    ids_NK: torch.Tensor
    """int32, by falling probability."""
    logprobs_NK: torch.Tensor
    """float32, natural logarithm at temperature 1."""
    log_z_NT: torch.Tensor
    """float32, log Σ_v p_v^{1/T} for each stored temperature."""


class Sampled(NamedTuple):
    ids_NK: torch.Tensor
    """int32: first the exact ones by falling probability, then the drawn ones by rising id, then padding."""
    logprobs_NK: torch.Tensor
    """float32 at the sampler's temperature: log p, or log τ for drawn ids; NOTHING for padding."""
    exact_N: torch.Tensor
    """int32, how many of the ids are exact."""
    drawn_N: torch.Tensor
    """int32, how many were drawn."""


class Target(NamedTuple):
    """A teacher at one temperature, from either signal: the input of the loss."""

    ids_NK: torch.Tensor
    """Integers; a position with fewer ids is padded with any id."""
    logprobs_NK: torch.Tensor
    """float32; NOTHING for padding."""
    tail_N: torch.Tensor
    """Probability of all other ids together; 0 for an unbiased sample."""


def joined(parts: Sequence[Target]) -> Target:
    """The parts in order as one target, padded to the widest."""
    width = max(part.ids_NK.shape[1] for part in parts)
    return Target(
        torch.cat([padded(part.ids_NK, width, 0) for part in parts]),
        torch.cat([padded(part.logprobs_NK, width, NOTHING) for part in parts]),
        torch.cat([part.tail_N for part in parts]),
    )


def padded(values_NK: torch.Tensor, width: int, value: float) -> torch.Tensor:
    """[N, width], filled up with `value`."""
    return torch.nn.functional.pad(values_NK, (0, width - values_NK.shape[1]), value=value)


def topk(logits_NV: torch.Tensor, k: int, temperatures: tuple[float, ...]) -> TopK:
    """The k likeliest ids with log-probabilities, and log Z_T for each temperature."""
    logits_NV = logits_NV.float()
    values_NK, ids_NK = largest(logits_NV, k)
    log_sum = _log_sums(logits_NV, values_NK[:, :1], {1.0, *temperatures})
    log_z = [log_sum[t] - log_sum[1.0] / t for t in temperatures]
    log_z_NT = torch.stack(log_z, -1) if log_z else values_NK.new_zeros(len(values_NK), 0)
    return TopK(ids_NK.int(), values_NK - values_NK[:, :1] - log_sum[1.0][:, None], log_z_NT)


def _log_sums(
    logits_NV: torch.Tensor, top_N1: torch.Tensor, temperatures: set[float]
) -> dict[float, torch.Tensor]:
    """log Σ_v exp((x_v − top) / t) for each t. At twice the temperature the terms are square roots, which cost a third
    of exponentials."""
    log_sums: dict[float, torch.Tensor] = {}
    # one buffer for all temperatures: the first touch of fresh memory costs more than the arithmetic
    terms_NV = torch.empty_like(logits_NV)
    for t in sorted(temperatures):
        if t / 2 in temperatures:
            continue
        torch.sub(logits_NV, top_N1, out=terms_NV).div_(t).exp_()
        log_sums[t] = terms_NV.sum(-1).log_()
        while 2 * t in temperatures:
            t *= 2
            log_sums[t] = terms_NV.sqrt_().sum(-1).log_()
    return log_sums


def largest(values_NV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of every row and their columns, as `torch.topk`, in a fraction of its time.

    The k largest lie in the k groups with the largest maxima: a pass over the row finds those, and only their
    members are sorted.
    """
    groups = values_NV.shape[1] // GROUP
    if groups <= 4 * k:  # the members of k groups would be a good part of the row
        return values_NV.topk(k, dim=-1)
    whole_NGg = values_NV[:, : groups * GROUP].unflatten(1, (groups, GROUP))
    best_NK = whole_NGg.amax(-1).topk(k, dim=-1, sorted=False).indices
    columns_NC = (best_NK[:, :, None] * GROUP + torch.arange(GROUP, device=best_NK.device)).flatten(1)
    rest_R = torch.arange(groups * GROUP, values_NV.shape[1], device=best_NK.device)
    columns_NC = torch.cat([columns_NC, rest_R.expand(len(columns_NC), -1)], 1)
    values_NK, places_NK = values_NV.gather(1, columns_NC).topk(k, dim=-1)
    return values_NK, columns_NC.gather(1, places_NK)


def sampled(logits_NV: torch.Tensor, temperature: float, threshold: float, draw_N: torch.Tensor) -> Sampled:
    """The threshold sample of softmax(logits / temperature); `draw_N` holds one uniform number in [0, 1) a position.

    Systematic: the small probabilities stand in a row of their sum's length, and the ids at the marks τ·u, τ·(1 + u),
    … are taken. Their number then varies by one at most, whatever u is, and no id can be taken
    twice.
    """
    p_NV = (logits_NV.float() / temperature).softmax(-1)
    # no more than 1 / τ can be exact: looking for so many takes less than comparing all with τ
    exact_NE, exact_ids_NE = largest(p_NV, min(int(1 / threshold) + 1, p_NV.shape[1]))
    is_exact_NE = exact_NE >= threshold
    exact_N = is_exact_NE.sum(-1)
    p_NV.scatter_(1, exact_ids_NE, exact_NE.masked_fill(is_exact_NE, 0))
    drawn_ids_ND, drawn_N = _systematic(p_NV, threshold, draw_N.double())
    place_D = torch.arange(drawn_ids_ND.shape[1], device=p_NV.device)
    kept_NK = torch.cat([is_exact_NE, place_D < drawn_N[:, None]], 1)
    # exact ids, then drawn ids, then all others
    order_NK = (~kept_NK).byte().sort(dim=-1, stable=True).indices[:, : int(kept_NK.sum(-1).max())]
    kept_NK = kept_NK.gather(1, order_NK)
    weights_ND = exact_NE.new_full(drawn_ids_ND.shape, math.log(threshold))
    logprobs_NK = torch.cat([exact_NE.clamp(min=1e-30).log(), weights_ND], 1).gather(1, order_NK)
    ids_NK = torch.cat([exact_ids_NE, drawn_ids_ND], 1).gather(1, order_NK)
    ids_NK, logprobs_NK = ids_NK.masked_fill(~kept_NK, 0), logprobs_NK.masked_fill(~kept_NK, NOTHING)
    return Sampled(ids_NK.int(), logprobs_NK, exact_N.int(), drawn_N.int())


def _systematic(p_NV: torch.Tensor, threshold: float, u_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns where Σ_{j ≤ i} p_j passes τ·u, τ·(1 + u), … [N, D], by rising column, and their number [N].

    The search has two levels, since a running sum over a vocabulary costs more than all the rest. The sums of groups
    tell in which group a mark lies, and only that group's members are summed up one by one. Running
    sums are in fp64: the rounding of fp32 would move marks.
    """
    sums_NG = _group_sums(p_NV)
    ends_NG = sums_NG.double().cumsum(-1)
    count_N = (ends_NG[:, -1] / threshold - u_N).nan_to_num(0).ceil().clamp(min=0).long()
    steps_D = torch.arange(int(count_N.max()), device=p_NV.device)
    marks_ND = threshold * (u_N[:, None] + steps_D)
    group_ND = torch.searchsorted(ends_NG, marks_ND, right=True).clamp(max=ends_NG.shape[1] - 1)
    column_NDg = group_ND[:, :, None] * GROUP + torch.arange(GROUP, device=p_NV.device)
    member_NDg = p_NV.gather(1, column_NDg.clamp(max=p_NV.shape[1] - 1).flatten(1)).view(column_NDg.shape)
    line_NDg = member_NDg.masked_fill(column_NDg >= p_NV.shape[1], 0).double().cumsum(-1)
    left_ND = marks_ND - (ends_NG - sums_NG).gather(1, group_ND)
    # where the two levels' rounding disagrees, the mark belongs to the last member that has any probability
    before_NDg = (line_NDg <= left_ND[:, :, None]) & (line_NDg < line_NDg[:, :, -1:])
    return group_ND * GROUP + before_NDg.sum(-1), count_N


def _group_sums(p_NV: torch.Tensor) -> torch.Tensor:
    """Sums of `GROUP` neighbours [N, G], the last one of what remains."""
    whole = p_NV.shape[1] // GROUP * GROUP
    sums_NG: torch.Tensor = p_NV[:, :whole].unflatten(1, (-1, GROUP)).sum(-1)
    if whole == p_NV.shape[1]:
        return sums_NG
    return torch.cat([sums_NG, p_NV[:, whole:].sum(-1, keepdim=True)], 1)


def tempered(
    logprobs_NK: torch.Tensor, log_z_N: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact log-probabilities of the kept ids at `temperature` [N, K], and the tail's probability [N]."""
    tempered_NK = logprobs_NK / temperature - log_z_N[:, None]
    return tempered_NK, (1 - tempered_NK.exp().sum(-1)).clamp(min=0)
