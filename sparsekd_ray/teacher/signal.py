"""What a teacher says about a token: its k likeliest successors and the log-normalisers of tempered softmaxes.

Keeping log Z_T = log Σ_v p_v^{1/T} over the whole vocabulary makes every kept probability, and the mass of all
the others together (the tail), exact at temperature T: p_T(i) = p_i^{1/T} / Z_T. Guessing it from the k kept
values is wrong by an order of magnitude. (methods: the teacher's signal; SparseKD §III for the top-k cache.)

Shapes: N positions, D hidden size, V vocabulary, K kept ids, T temperatures.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

ROWS_PER_CHUNK = (
    512  # rows of logits in memory at once: large enough for a good GEMM, 400 MB in fp32 at V = 200,064
)


class Signal(NamedTuple):
    ids_NK: torch.Tensor
    """int32, by falling probability."""
    logprobs_NK: torch.Tensor
    """float32, natural logarithm at temperature 1."""
    log_z_NT: torch.Tensor
    """float32, log Σ_v p_v^{1/T} for each stored temperature."""


def topk(logits_NV: torch.Tensor, k: int, temperatures: tuple[float, ...]) -> Signal:
    """The k likeliest ids with log-probabilities, and log Z_T for each temperature."""
    logits_NV = logits_NV.float()
    lse_N = logits_NV.logsumexp(-1)
    values_NK, ids_NK = logits_NV.topk(k, dim=-1)
    log_z = [(logits_NV / t).logsumexp(-1) - lse_N / t for t in temperatures]
    log_z_NT = torch.stack(log_z, -1) if log_z else lse_N.new_zeros(len(lse_N), 0)
    return Signal(ids_NK.int(), values_NK - lse_N[:, None], log_z_NT)


def topk_from_hidden(
    hidden_ND: torch.Tensor, head_VD: torch.Tensor, k: int, temperatures: tuple[float, ...]
) -> Signal:
    """`topk` of hidden @ headᵀ, a chunk of rows at a time, so that [N, V] never exists."""
    parts = [topk(rows @ head_VD.T, k, temperatures) for rows in hidden_ND.split(ROWS_PER_CHUNK)]
    return Signal(*(torch.cat(column) for column in zip(*parts, strict=True)))


def tempered(
    logprobs_NK: torch.Tensor, log_z_N: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact log-probabilities of the kept ids at `temperature` [N, K], and the tail's probability [N]."""
    tempered_NK = logprobs_NK / temperature - log_z_N[:, None]
    return tempered_NK, (1 - tempered_NK.exp().sum(-1)).clamp(min=0)
