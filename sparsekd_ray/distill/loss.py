"""The distillation loss: KL to a sparse teacher at temperature T, plus cross-entropy.

    per position   α · T² · [ Σ_K t_i log(t_i / q_i) + t_r log(t_r / q_r) ]  +  (1 − α) · (−log softmax(x)_y)

t and q are the teacher's and the student's probabilities at temperature T on the K kept ids; t_r and q_r are the
probabilities of all other ids together (the bucket). With the k likeliest ids that is an exact (K+1)-way KL, never
negative, a lower bound of the full one. An unbiased sample of t has no bucket, t_r = 0, and sums to 1 only on average.
T² keeps the gradient's scale independent of T (Hinton et al. 2015; SparseKD §IV-E).

Logits exist for a chunk of positions at a time, and their gradient is formed in the forward pass:
    dKL/dx_j = (m q_j − t_j) / T on kept ids,   q_j · (m − t_r / q_r) / T elsewhere,   m = Σ_K t_i + t_r,
so neither [N, V] logits nor their gradient is ever in memory, and nothing is recomputed.

Shapes: N positions, n positions of one chunk, D hidden size, V vocabulary, K kept ids.
"""

from __future__ import annotations

from typing import Any

import torch

from sparsekd_ray.model import head
from sparsekd_ray.teacher.signal import Target


def kd_loss(
    hidden_ND: torch.Tensor,
    head_VD: torch.Tensor,
    labels_N: torch.Tensor,
    target: Target,
    *,
    temperature: float,
    kl_weight: float,
    ce_weight: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(kl_weight · T² · Σ KL + ce_weight · Σ CE, Σ KL, Σ CE) over the positions whose label is not negative.

    Only the first value carries a gradient, to `hidden_ND` and, unless it is frozen, to `head_VD`.
    The caller chooses the weights: α / N and (1 − α) / N for the mean over N positions, on whichever workers they are.
    """
    sums: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _ChunkedKD.apply(  # type: ignore[no-untyped-call]
        hidden_ND, head_VD, labels_N, target, temperature, kl_weight, ce_weight
    )
    return sums


class _ChunkedKD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        head_VD: torch.Tensor,
        labels_N: torch.Tensor,
        target: Target,
        temperature: float,
        kl_weight: float,
        ce_weight: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        grad_hidden_ND = torch.empty_like(hidden_ND)
        # fp32 whatever the head's type: thousands of chunks are added up
        grad_head_VD = torch.zeros_like(head_VD, dtype=torch.float32) if head_VD.requires_grad else None
        kl_sum = hidden_ND.new_zeros((), dtype=torch.float32)
        ce_sum = hidden_ND.new_zeros((), dtype=torch.float32)
        start = 0
        for logits_nV in head.chunks(hidden_ND, head_VD):
            rows = slice(start, start + len(logits_nV))
            start = rows.stop
            chunk = Target(*(column[rows] for column in target))
            kl, ce, grad_nV = chunk_loss(logits_nV, labels_N[rows], chunk, temperature, kl_weight, ce_weight)
            kl_sum += kl
            ce_sum += ce
            grad_nV = grad_nV.to(hidden_ND.dtype)
            torch.mm(grad_nV, head_VD, out=grad_hidden_ND[rows])
            if grad_head_VD is not None:
                grad_head_VD += head.product(grad_nV.T, hidden_ND[rows])
        ctx.save_for_backward(grad_hidden_ND, grad_head_VD)
        ctx.head_dtype = head_VD.dtype
        ctx.mark_non_differentiable(kl_sum, ce_sum)
        return kl_weight * temperature**2 * kl_sum + ce_weight * ce_sum, kl_sum, ce_sum

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scale = grad_outputs[0]
        grad_hidden_ND, grad_head_VD = ctx.saved_tensors
        grad_head = None if grad_head_VD is None else (grad_head_VD * scale).to(ctx.head_dtype)
        return grad_hidden_ND * scale.to(grad_hidden_ND.dtype), grad_head, None, None, None, None, None


def chunk_loss(
    logits_nV: torch.Tensor,
    labels_n: torch.Tensor,
    target: Target,
    temperature: float,
    kl_weight: float,
    ce_weight: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Σ KL and Σ CE of one chunk, and the gradient of `kl_weight · T² · KL + ce_weight · CE` to its logits [n, V].

    `logits_nV` is overwritten.
    """
    valid_n = labels_n >= 0
    ids_nK = target.ids_NK.long()
    below_nV = logits_nV.sub_(logits_nV.amax(-1, keepdim=True))  # the largest is 0: nothing overflows
    smallest = torch.finfo(logits_nV.dtype).tiny

    # e = exp(x/T) up to a factor; zeroing the kept ids before the sum gives the tail without a cancelling 1 − Σ q
    e_nV = (below_nV / temperature).exp_()
    z_n = e_nV.sum(-1)
    log_q_nK = below_nV.gather(1, ids_nK) / temperature - z_n.log()[:, None]
    e_nV.scatter_(1, ids_nK, 0)
    rest_n = e_nV.sum(-1).clamp_(min=smallest)

    t_nK = target.logprobs_NK.exp()
    kept_n = (t_nK * (target.logprobs_NK - log_q_nK)).sum(-1)
    log_t_tail_n = target.tail_N.clamp(min=smallest).log()
    tail_n = target.tail_N * (log_t_tail_n - (rest_n / z_n).clamp_(min=smallest).log())
    kl_n = (kept_n + tail_n).where(valid_n, 0)

    # d(T² KL)/dx = T · (m q − t), the tail's t_r spread over its ids as the student spreads it
    mass_n = t_nK.sum(-1) + target.tail_N
    grad_nV = e_nV.mul_((mass_n / z_n - target.tail_N / rest_n)[:, None])
    grad_nV.scatter_(1, ids_nK, log_q_nK.exp() * mass_n[:, None])
    grad_nV.scatter_add_(1, ids_nK, -t_nK).mul_(kl_weight * temperature)  # padding has t = 0

    safe_n1 = labels_n.clamp(min=0)[:, None]
    label_n1 = below_nV.gather(1, safe_n1)
    p_nV = below_nV.exp_()
    sum_n1 = p_nV.sum(-1, keepdim=True)
    ce_n = (sum_n1.log() - label_n1)[:, 0].where(valid_n, 0)
    grad_nV.addcmul_(p_nV, ce_weight / sum_n1)
    grad_nV.scatter_add_(1, safe_n1, torch.full_like(sum_n1, -ce_weight))
    return kl_n.sum(), ce_n.sum(), grad_nV.mul_(valid_n[:, None])
