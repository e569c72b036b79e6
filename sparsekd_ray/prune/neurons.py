"""Fewer neurons in an MLP: the choice of those to keep, and a down projection that makes up for the others.

With h the input of down (act(gate x) · up x) and C = Σ h hᵀ over calibration tokens, a neuron whose activation is
nearly a combination of the others' is not missed: its ridge leverage score s_i = [C (C + λI)^{-1}]_ii is small.
The outputs of the neurons K that stay are then fitted to the outputs of all (MoDeGPT, Lin et al. 2024, type I):
the least squares problem min_W' Σ ‖W h − W' h_K‖² has the solution W' = W C[:,K] C_KK^{-1}. With the ridge,
    W' = W_K + W_R C_RK (C_KK + Λ_K)^{-1},     R: the neurons that go,
which draws W' towards the plain slice W_K and not towards zero. Where the calibration text says nothing (a
neuron that never fired, too few tokens) the weights stay what they were, and keeping all neurons changes nothing.

Leverage judges each neuron with all others present, and so drops twins together. Backward elimination does not: it
takes neurons out one after the other, each time the one whose removal, after the best refit, costs least (Optimal Brain
Surgeon, Hassibi and Stork 1993, with whole columns of down). With P = (C + Λ)^{-1} of the neurons still there, that is
the smallest ‖w_i‖² / P_ii; it costs no more calibration and keeps more of the model.

Λ is diagonal, `ridge` times C's own diagonal. A neuron in other units (activation times a, column of down over a), or
more tokens, therefore change nothing, and a neuron with a few massive activations does not hold the others back, as it
would if λ were one number for all. Leverage alone keeps one number, since it has no weights to tell it a neuron's
importance and must look at its size: λ is `ridge` times the median of the diagonal, which massive neurons do not move.
All is factorised in the units in which every neuron's sum of squares is 1:
    Ĉ = D^{-1/2} C D^{-1/2},     ŵ_i = w_i √D_i,     D = Λ / ridge.

Shapes: D hidden size, I neurons, K neurons kept, R neurons removed.
"""

import math

import torch

from sparsekd_ray.errors import ConfigError, ModelError
from sparsekd_ray.model.mlp import MLP, require_finite

RIDGE = 1e-3
SILENT = 1e-12  # of the median of C's diagonal: a neuron below it counts as one of that size
ROUNDING = 0.1  # of ridge · C_ii: less than this for λ would drown in rounding where C was summed in fp32
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
    """s_i = [C (C + λI)^{-1}]_ii, from 0 to 1, in float64; 0 for a neuron that never fired.

    For a neuron of more than 10 times the median's sum of squares λ is a tenth of ridge · C_ii instead, above the
    rounding of C. Raises ModelError if C is not finite, or too noisy for so small a ridge.
    """
    unit_II, size_I = _in_units(gram_II, ridge)
    shift_I = ridge * (_usual(gram_II) / size_I.square()).clamp_min(ROUNDING)
    # C (C + Λ)^{-1} = I − Λ (C + Λ)^{-1}, whose diagonal is the same in all units
    inverse_II = torch.cholesky_inverse(_cholesky(unit_II, shift_I))
    return (1 - shift_I * inverse_II.diagonal()).clamp_(0, 1)


def keep(score_I: torch.Tensor, width: int) -> torch.Tensor:
    """Indices of the `width` highest scores, rising; among equal scores the lower index is kept."""
    require_finite("score_I", score_I)
    if not 0 < width <= len(score_I):
        raise ValueError(f"width {width} of {len(score_I)} neurons; allowed: 1 to {len(score_I)}")
    return score_I.sort(descending=True, stable=True).indices[:width].sort().values


def eliminate(down_DI: torch.Tensor, gram_II: torch.Tensor, width: int, ridge: float = RIDGE) -> torch.Tensor:
    """Indices of the `width` neurons left by backward elimination, rising; among equal ones the later are left.

    Exact one by one up to 511 neurons; beyond, I // 256 go in a round, chosen one by one among the cheapest. In
    float64, O(I² (I − width)) operations. Raises the errors of `leverage`.
    """
    require_finite("down_DI", down_DI)
    if not 0 < width <= len(gram_II):
        raise ValueError(f"width {width} of {len(gram_II)} neurons; allowed: 1 to {len(gram_II)}")
    unit_II, size_I = _in_units(gram_II.to(down_DI.device), ridge)
    weight_DA = down_DI.double() * size_I  # A: the neurons still there
    inverse_AA = torch.cholesky_inverse(_cholesky(unit_II, ridge))
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
    unit_II, size_I = _in_units(gram_II.to(down_DI.device), ridge)
    kept_K = kept_K.to(down_DI.device)
    gone_I = torch.ones(len(unit_II), dtype=torch.bool, device=down_DI.device)
    gone_I[kept_K] = False
    down_DK = down_DI[:, kept_K].double()
    if gone_I.any():
        down_DR = down_DI[:, gone_I].double() * size_I[gone_I]
        missing_KD = unit_II[kept_K][:, gone_I] @ down_DR.T
        moved_KD = torch.cholesky_solve(missing_KD, _cholesky(unit_II[kept_K][:, kept_K], ridge))
        down_DK += moved_KD.T / size_I[kept_K]
    return down_DK.to(down_DI.dtype).contiguous()


def prune_mlp(mlp: MLP, gram_II: torch.Tensor, kept_K: torch.Tensor, ridge: float = RIDGE) -> MLP:
    """The MLP of the neurons kept, its down projection refitted."""
    kept_K = kept_K.to(mlp.down_DI.device)
    return MLP(mlp.gate_ID[kept_K], mlp.up_ID[kept_K], refit(mlp.down_DI, gram_II, kept_K, ridge))


def predicted_loss(
    down_DI: torch.Tensor,
    cut_DK: torch.Tensor,
    kept_K: torch.Tensor,
    gram_II: torch.Tensor,
    fisher_D: torch.Tensor,
    tokens: int,
) -> float:
    """½ Σ_d F_d · mean_t (y_d − ŷ_d)², with y = W h and ŷ = W' h_K: the rise of the loss to second order, in nat.

    cut_DK: W'; fisher_D: mean over tokens of the squared gradient of the loss in nat by y_d; tokens: how many C sums.
    Off-diagonal curvature and other layers are left out. Raises ModelError if weights or C are not finite.
    """
    for name, tensor in (
        ("down_DI", down_DI),
        ("cut_DK", cut_DK),
        ("gram_II", gram_II),
        ("fisher_D", fisher_D),
    ):
        require_finite(name, tensor)
    device = down_DI.device
    missed_DI = down_DI.double().index_add(1, kept_K.to(device), cut_DK.to(device).double(), alpha=-1)
    error_D = ((missed_DI @ gram_II.to(device).double()) * missed_DI).sum(1) / tokens
    return float(fisher_D.to(device).double() @ error_D) / 2


def _in_units(gram_II: torch.Tensor, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Ĉ, and √D: each neuron's own size, in float64."""
    require_finite("gram_II", gram_II)
    if ridge <= 0:
        raise ValueError(f"ridge {ridge}: it must be positive, since C may be singular")
    gram_II = gram_II.double()
    size_I = gram_II.diagonal().clamp_min(SILENT * _usual(gram_II)).sqrt()
    return gram_II / size_I / size_I[:, None], size_I


def _usual(gram_II: torch.Tensor) -> float:
    """The median of C's diagonal over neurons that fired, since one massive neuron is most of a mean; 1 if none did."""
    square_I = gram_II.diagonal().double()
    fired = square_I[square_I > 0]
    return float(fired.median()) if len(fired) else 1.0


def _cholesky(unit_nn: torch.Tensor, shift: float | torch.Tensor) -> torch.Tensor:
    """Lower factor of Ĉ with `shift`, one number or one for each neuron, added to its diagonal."""
    shifted_nn = unit_nn.clone()
    shifted_nn.diagonal().add_(shift)
    factor_nn: torch.Tensor
    factor_nn, failed = torch.linalg.cholesky_ex(shifted_nn)
    if failed:
        raise ModelError(
            f"gram_II with its ridge is not positive definite at row {int(failed)}: its rounding errors are larger "
            "than that; use a larger ridge, or sum it in higher precision"
        )
    return factor_nn
