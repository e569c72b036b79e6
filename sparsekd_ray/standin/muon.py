"""Muon: gradient descent with orthogonal steps, for the matrices inside a model's blocks.

The momentum of a weight matrix is dominated by a few directions, and a step along it hardly moves the
others. Muon keeps the singular vectors of the momentum U S Vᵀ and sets its singular values to about one, so
that all directions learn alike (K. Jordan and others, 2024, https://kellerjordan.github.io/posts/muon/).
U Vᵀ comes out of a few Newton–Schulz steps, which are products of matrices only. Embedding and norms are no
such matrices: they are left to AdamW.

Written out here in fp32, since `torch.optim.Muon` casts to bf16, which most CPUs can only emulate.

Shapes: B matrices of one shape with M outputs and N inputs; K = min(M, N).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# A step is X ← a X + b (X Xᵀ) X + c (X Xᵀ)² X. Jordan's values rise so steeply at zero that five steps bring
# all singular values above 0.003 of the Frobenius norm to between 0.68 and 1.21, though never to 1 exactly.
QUINTIC = (3.4445, -4.7750, 2.0315)
STEPS = 5


def orthogonalise(matrices_BMN: Tensor) -> Tensor:
    """For each matrix U S Vᵀ about U Vᵀ.

    Works on the K × K Gram matrix A = X Xᵀ of the short side: with P = a + b A + c A² a step is X ← P X,
    hence A ← P A P, and X itself needs only the product of all P's, at the end.
    """
    if matrices_BMN.shape[-2] > matrices_BMN.shape[-1]:
        return orthogonalise(matrices_BMN.mT).mT
    x_BKN = matrices_BMN / matrices_BMN.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-12)
    gram_BKK = x_BKN @ x_BKN.mT
    total_BKK = step_BKK = _step(gram_BKK)
    for _ in range(STEPS - 1):
        gram_BKK = step_BKK @ gram_BKK @ step_BKK
        step_BKK = _step(gram_BKK)
        total_BKK = step_BKK @ total_BKK
    orthogonal_BKN: Tensor = total_BKK @ x_BKN
    return orthogonal_BKN


def _step(gram_BKK: Tensor) -> Tensor:
    a, b, c = QUINTIC
    step_BKK = torch.baddbmm(gram_BKK, gram_BKK, gram_BKK, beta=b, alpha=c)
    step_BKK.diagonal(dim1=-2, dim2=-1).add_(a)
    return step_BKK


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal, times lr · √max(1, M/N).

    Matrices of one group and shape go through together: few products of stacks instead of many small ones. A
    group of fused matrices (queries, keys and values; gate and up) names the sizes of their row blocks in "parts";
    each block is made orthogonal by itself, which learns better than the whole.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, momentum: float = 0.95) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "parts": None})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for matrix in group["params"]:
                shapes.setdefault(matrix.shape, []).append(matrix)
            for same in shapes.values():
                self._update(same, group["lr"], group["momentum"], group["parts"])

    def _update(self, same: list[Tensor], lr: float, momentum: float, parts: list[int] | None) -> None:
        gradients = [matrix.grad for matrix in same if matrix.grad is not None]
        averages = [self.state[m].setdefault("momentum", torch.zeros_like(m)) for m in same]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        ahead_BMN = torch.stack(gradients).lerp_(torch.stack(averages), momentum)
        blocks = ahead_BMN.split(parts or [ahead_BMN.shape[1]], dim=1)
        steps_BMN = torch.cat([_scaled(block) for block in blocks], dim=1)
        torch._foreach_add_(same, list(steps_BMN.unbind()), alpha=-lr)


def _scaled(matrices_BMN: Tensor) -> Tensor:
    outputs, inputs = matrices_BMN.shape[1:]
    scale: float = max(1.0, outputs / inputs) ** 0.5
    return orthogonalise(matrices_BMN) * scale
