"""Fewer neurons in an MLP: which to keep, and how the down projection makes up for the others.

With h the input of down (act(gate x) · up x) and C = Σ h hᵀ over calibration tokens, a neuron whose activation is
nearly a combination of the others' is not missed: its ridge leverage score s_i = [C (C + λI)^{-1}]_ii is small.
The outputs of the neurons K that stay are then fitted to the outputs of all (MoDeGPT, Lin et al. 2024, type I):
the least squares problem min_W' Σ ‖W h − W' h_K‖² has the solution W' = W C[:,K] C_KK^{-1}. With the ridge,
    W' = W_K + W_R C_RK (C_KK + λI)^{-1},     R: the neurons that go,
that is, W' is drawn towards the plain slice W_K and not towards zero. Where the calibration text says nothing (a
neuron that never fired, too few tokens) the weights stay what they were, and keeping all neurons changes nothing.

Leverage judges each neuron with all others present, and so drops twins together. Backward elimination does not: it
takes neurons out one after the other, each time the one whose removal, after the best refit, costs least (Optimal Brain
Surgeon, Hassibi and Stork 1993, with whole columns of down). With P = (C + λI)^{-1} of the neurons still there, that is
the smallest ‖w_i‖² / P_ii; it costs no more calibration and keeps more of the model.

λ is `ridge` times the mean of C's diagonal, hence independent of the scale and of the number of tokens.

Shapes: D hidden size, I neurons, K neurons kept, R neurons removed.
"""

import math

import torch

from sparsekd_ray.errors import ConfigError, ModelError
from sparsekd_ray.model.mlp import MLP, require_finite

# Results are flat from 1e-6 to 1e-2; rounding of C in fp32 needs some 1e-5 at 8192 neurons.
RIDGE = 1e-3
ROUNDS = 256  # of an elimination; a wide layer loses several neurons in each
POOL = 4  # candidates for each neuron of a round


def width(
    dense_mlp_params: int,
    sparsity: float,
    hidden: int,
    layers: int,
    align: int,
    present: int | None = None,
) -> int:
    """Neurons per layer, a multiple of `align`, so that 3 · hidden · layers · width is nearest to the budget.

    sparsity: share of `dense_mlp_params` (the original model's MLP, before any round) absent afterwards; present:
    the width now, if it is not the dense one. Raises ConfigError, with what can be reached, if the nearest is not
    below the present width or is 0.
    """
    neuron = 3 * hidden * layers  # parameters of one neuron in each layer
    present = present or dense_mlp_params // neuron
    nearest = math.floor((1 - sparsity) * dense_mlp_params / (neuron * align) + 0.5) * align
    if 0 < nearest < present:
        return nearest
    largest = (present - 1) // align * align
    shares = [1 - reachable * neuron / dense_mlp_params for reachable in (largest, align)]
    reach = f"ask for a sparsity from {shares[0]:.4f} (width {largest}) to {shares[1]:.4f} (width {align})"
    raise ConfigError(
        f"sparsity {sparsity:.4g} of {dense_mlp_params} MLP parameters asks for {nearest} neurons in each of "
        f"{layers} layers, which have {present}; widths are multiples of {align}: "
        + (reach if largest else "no smaller one is left, lower prune.align")
    )


def leverage(gram_II: torch.Tensor, ridge: float = RIDGE) -> torch.Tensor:
    """s_i = [C (C + λI)^{-1}]_ii, from 0 to 1, in float64; 0 for every neuron if C is zero.

    Raises ModelError if C is not finite, or too noisy for so small a ridge.
    """
    gram_II, shift = _checked(gram_II, ridge)
    if shift == 0:
        return torch.zeros_like(gram_II[0])
    # C (C + λI)^{-1} = I − λ (C + λI)^{-1}
    inverse_II = torch.cholesky_inverse(_cholesky(gram_II, shift))
    return (1 - shift * inverse_II.diagonal()).clamp_(0, 1)


def keep(score_I: torch.Tensor, width: int) -> torch.Tensor:
    """Indices of the `width` highest scores, rising; among equal scores the lower index is kept."""
    require_finite("score_I", score_I)
    if not 0 < width <= len(score_I):
        raise ValueError(f"width {width} of {len(score_I)} neurons; allowed: 1 to {len(score_I)}")
    return score_I.sort(descending=True, stable=True).indices[:width].sort().values


def eliminate(down_DI: torch.Tensor, gram_II: torch.Tensor, width: int, ridge: float = RIDGE) -> torch.Tensor:
    """Indices of the `width` neurons left by backward elimination, rising; among equal ones the later are left.

    Exact one by one up to 511 neurons; beyond, I // 256 go in a round, chosen one by one among the cheapest. In
    float64, O(I² (I − width)) operations. Raises as `leverage`.
    """
    require_finite("down_DI", down_DI)
    if not 0 < width <= len(gram_II):
        raise ValueError(f"width {width} of {len(gram_II)} neurons; allowed: 1 to {len(gram_II)}")
    gram_II, shift = _checked(gram_II.to(down_DI.device), ridge)
    weight_DA = down_DI.double()  # A: the neurons still there
    inverse_AA = torch.cholesky_inverse(_cholesky(gram_II, shift or 1.0))  # if C is zero, ‖w_i‖² decides
    left_A = torch.arange(len(gram_II), device=down_DI.device)
    while len(left_A) > width:
        number = min(max(1, len(gram_II) // ROUNDS), len(left_A) - width)
        gone_G = _cheapest(weight_DA, inverse_AA, number)
        stays_A = torch.ones_like(left_A, dtype=torch.bool).index_fill_(0, gone_G, False)
        rows_GA = inverse_AA[gone_G]
        solved_GA = torch.linalg.solve(rows_GA[:, gone_G], rows_GA[:, stays_A])
        weight_DA = weight_DA[:, stays_A] - weight_DA[:, gone_G] @ solved_GA
        inverse_AA = inverse_AA[stays_A][:, stays_A] - rows_GA[:, stays_A].T @ solved_GA
        left_A = left_A[stays_A]
    return left_A


def _cheapest(weight_DA: torch.Tensor, inverse_AA: torch.Tensor, number: int) -> torch.Tensor:
    """Places of `number` neurons, eliminated one by one among the POOL times as many that cost least now."""
    cost_A = weight_DA.square().sum(0) / inverse_AA.diagonal()
    pool_P = cost_A.sort(stable=True).indices[: POOL * number]
    weight_DP, inverse_PP = weight_DA[:, pool_P], inverse_AA[pool_P][:, pool_P]
    gone: list[int] = []
    while len(gone) < number:
        cost_P = weight_DP.square().sum(0) / inverse_PP.diagonal()
        cost_P[gone] = math.inf
        i = int(cost_P.sort(stable=True).indices[0])
        row_P = inverse_PP[i] / inverse_PP[i, i]
        weight_DP = weight_DP - torch.outer(weight_DP[:, i], row_P)
        inverse_PP = inverse_PP - torch.outer(inverse_PP[:, i], row_P)
        gone.append(i)
    return pool_P[gone]


def refit(
    down_DI: torch.Tensor, gram_II: torch.Tensor, kept_K: torch.Tensor, ridge: float = RIDGE
) -> torch.Tensor:
    """The down projection [D, K] of the neurons kept that comes nearest to the old output; formula above.

    Solved in float64, returned in the weight's type. Raises ModelError if weight or C is not finite, or C is too
    noisy for so small a ridge.
    """
    require_finite("down_DI", down_DI)
    gram_II, shift = _checked(gram_II, ridge)
    kept_K = kept_K.to(down_DI.device)
    gone_I = torch.ones(len(gram_II), dtype=torch.bool, device=down_DI.device)
    gone_I[kept_K] = False
    down_DK, down_DR = down_DI[:, kept_K].double(), down_DI[:, gone_I].double()
    gram_II = gram_II.to(down_DI.device)
    if shift > 0 and gone_I.any():
        missing_KD = gram_II[kept_K][:, gone_I] @ down_DR.T
        down_DK += torch.cholesky_solve(missing_KD, _cholesky(gram_II[kept_K][:, kept_K], shift)).T
    return down_DK.to(down_DI.dtype).contiguous()


_refit = refit  # `prune_mlp` has a switch of that name


def prune_mlp(
    mlp: MLP, gram_II: torch.Tensor, kept_K: torch.Tensor, ridge: float = RIDGE, refit: bool = True
) -> MLP:
    """The MLP of the neurons kept; without `refit` its down projection is a plain slice, and C is not used."""
    kept_K = kept_K.to(mlp.down_DI.device)
    down_DK = _refit(mlp.down_DI, gram_II, kept_K, ridge) if refit else mlp.down_DI[:, kept_K]
    return MLP(mlp.gate_ID[kept_K], mlp.up_ID[kept_K], down_DK)


def _checked(gram_II: torch.Tensor, ridge: float) -> tuple[torch.Tensor, float]:
    """C in float64, and λ."""
    require_finite("gram_II", gram_II)
    if ridge <= 0:
        raise ValueError(f"ridge {ridge}: it must be positive, since C may be singular")
    gram_II = gram_II.double()
    return gram_II, ridge * float(gram_II.diagonal().mean())


def _cholesky(gram_nn: torch.Tensor, shift: float) -> torch.Tensor:
    """Lower factor of C + λI."""
    shifted_nn = gram_nn.clone()
    shifted_nn.diagonal().add_(shift)
    factor_nn, failed = torch.linalg.cholesky_ex(shifted_nn)
    if failed:
        raise ModelError(
            f"gram_II plus a ridge of {shift:.3g} is not positive definite at row {int(failed)}: its rounding errors "
            "are larger than that; use a larger ridge, or sum it in higher precision"
        )
    return factor_nn
