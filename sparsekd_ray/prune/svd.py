"""The spectrum of a weight matrix, and from it the best approximation of a given rank, written as two thin factors.

Plain: W = U diag(σ) Vᵀ, and by Eckart-Young (1936) the sum of the first r terms is the closest rank-r matrix in
the Frobenius norm, at the distance sqrt(Σ_{i>r} σ_i²). SparseKD prunes every MLP matrix this way.

Whitened: the layer's output on text counts. With X the calibration inputs and S = X Xᵀ their Gram matrix, the error
‖D (W − Ŵ) X‖ is minimised, D being optional weights of the output rows. Let U_r be the leading
left singular vectors of D W S^½; then Ŵ = D⁻¹ U_r U_rᵀ D W, at the distance sqrt(Σ_{i>r} σ_i²) of that matrix's
own spectrum. Nothing of S is inverted or Cholesky-factorised (as SVD-LLM does), so fewer tokens than inputs, and
inputs that never fire, are no special case. S^½ is not formed either: with m ≤ n, U and σ² are the eigenvectors and
eigenvalues of D W S Wᵀ D, which is m by m; with m > n, D W = Q R and U is Q times those of R S Rᵀ, n by n.

The computation yields the squares σ², and only these are needed. They are exact to rounding of the largest one,
10⁻¹⁶ σ_1². So a discarded share of the energy of 10⁻¹⁰ is still known to 10⁻⁶, and an optimal error below 10⁻⁸ σ_1
reads as zero.

Shapes: m rows (outputs), n columns (inputs), r rank, k = min(m, n). Decompositions are in float64.
"""

import torch

UNWEIGHTED = 1e-6  # of the largest row weight: division by a smaller one would leave only rounding of a row


def singular_values(
    W_mn: torch.Tensor, gram_nn: torch.Tensor | None = None, weight_m: torch.Tensor | None = None
) -> torch.Tensor:
    """The spectrum of D W S^½, largest first, [k] in float64; S = I and D = I where they are not given.

    gram_nn: S, summed over tokens, any floating type. weight_m: the diagonal of D, for instance the roots of the
    Fisher sensitivities of gate and up. Raises ValueError for shapes that do not fit or a negative weight.
    """
    DW_mn = _weighted(W_mn, gram_nn, weight_m)
    if gram_nn is None:
        sigma_k: torch.Tensor = torch.linalg.svdvals(DW_mn)
        return sigma_k
    core_nn = DW_mn if DW_mn.shape[0] <= DW_mn.shape[1] else torch.linalg.qr(DW_mn, mode="r").R
    energy_k: torch.Tensor = torch.linalg.eigvalsh(_sandwich(core_nn, gram_nn)).flip(0)
    return energy_k.clamp(min=0).sqrt()


def truncated_factors(
    W_mn: torch.Tensor,
    rank: int,
    gram_nn: torch.Tensor | None = None,
    weight_m: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors B_mr, A_rn with the least ‖D (W − B A) S^½‖ of all of that rank, in W's type.

    Arguments and errors as in `singular_values`; a centred Gram leaves the mean to `mean_bias`. Column i of B and row
    i of A have equal norms, so one learning rate suits both. The signs, which a decomposition leaves open, are fixed:
    the entry of largest magnitude in each column of B is positive. Rows whose weight is (nearly) zero, which the
    error does not see, become their own least-squares fit on the inputs that A keeps.
    """
    if not 1 <= rank <= min(W_mn.shape):
        raise ValueError(f"rank {rank} for a {tuple(W_mn.shape)} matrix; allowed: 1 to {min(W_mn.shape)}")
    DW_mn = _weighted(W_mn, gram_nn, weight_m)
    U_mr, energy_r = _leading(DW_mn, gram_nn, rank)
    A_rn = U_mr.T @ DW_mn
    B_mr = U_mr if weight_m is None else _unweighted(U_mr, A_rn, energy_r, W_mn, gram_nn, weight_m)
    B_mr, A_rn = _balanced(B_mr, A_rn)
    return B_mr.to(W_mn.dtype).contiguous(), A_rn.to(W_mn.dtype).contiguous()


def mean_bias(
    W_mn: torch.Tensor, B_mr: torch.Tensor, A_rn: torch.Tensor, mean_n: torch.Tensor
) -> torch.Tensor:
    """The mean output that the factors miss, (W − B A) μ, [m] in W's type, μ being the mean input.

    With factors of the centred Gram this is (I − U Uᵀ) μ_y, and both together are the best affine map of that rank.
    """
    mean_n = mean_n.double()
    missed_m = W_mn.double() @ mean_n - B_mr.double() @ (A_rn.double() @ mean_n)
    return missed_m.to(W_mn.dtype)


def centred(gram_nn: torch.Tensor, sum_n: torch.Tensor, tokens: int) -> torch.Tensor:
    """Σ (x − μ)(x − μ)ᵀ in float64, from Σ x xᵀ, Σ x and the number of tokens they were summed over."""
    sum_n = sum_n.double()
    return gram_nn.double() - torch.outer(sum_n, sum_n / tokens)


def energy_rank(sigma_k: torch.Tensor, tau: float) -> int:
    """The smallest rank r ≥ 1 with Σ_{i≤r} σ² ≥ τ Σ σ² (SparseKD's retained energy), 0 < τ ≤ 1."""
    if not 0 < tau <= 1:
        raise ValueError(f"retained energy {tau}; allowed: above 0, up to 1")
    kept_k = sigma_k.double().square().cumsum(0)
    return int(torch.searchsorted(kept_k, tau * kept_k[-1])) + 1


def _weighted(
    W_mn: torch.Tensor, gram_nn: torch.Tensor | None, weight_m: torch.Tensor | None
) -> torch.Tensor:
    m, n = W_mn.shape
    if gram_nn is not None and gram_nn.shape != (n, n):
        raise ValueError(f"a Gram of shape {tuple(gram_nn.shape)} for {n} inputs; needed: {(n, n)}")
    if weight_m is None:
        return W_mn.double()
    if weight_m.shape != (m,) or not (weight_m >= 0).all():
        raise ValueError(f"row weights of shape {tuple(weight_m.shape)}; needed: {m} numbers, none negative")
    return weight_m.double()[:, None] * W_mn.double()


def _sandwich(core_kn: torch.Tensor, gram_nn: torch.Tensor) -> torch.Tensor:
    return core_kn @ gram_nn.double() @ core_kn.T


def _leading(
    DW_mn: torch.Tensor, gram_nn: torch.Tensor | None, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `rank` left singular vectors of D W S^½ and the squares of their singular values."""
    if gram_nn is None:
        U_mk, sigma_k, _ = torch.linalg.svd(DW_mn, full_matrices=False)
        return U_mk[:, :rank], sigma_k[:rank].square()
    if DW_mn.shape[0] <= DW_mn.shape[1]:
        energy_k, U_mk = torch.linalg.eigh(_sandwich(DW_mn, gram_nn))  # rising
        return U_mk[:, -rank:].flip(1), energy_k[-rank:].flip(0)
    Q_mn, R_nn = torch.linalg.qr(DW_mn)
    U_nr, energy_r = _leading(R_nn, gram_nn, rank)
    return Q_mn @ U_nr, energy_r


def _unweighted(
    U_mr: torch.Tensor,
    A_rn: torch.Tensor,
    energy_r: torch.Tensor,
    W_mn: torch.Tensor,
    gram_nn: torch.Tensor | None,
    weight_m: torch.Tensor,
) -> torch.Tensor:
    """B = D⁻¹ U; for rows without weight W S Aᵀ (A S Aᵀ)⁻¹, in which A S Aᵀ is the diagonal of σ²."""
    weight_m1 = weight_m.double()[:, None]
    unseen_m = (weight_m1 <= UNWEIGHTED * weight_m1.max())[:, 0]
    B_mr = U_mr / weight_m1.masked_fill(unseen_m[:, None], 1)
    AS_rn = A_rn if gram_nn is None else A_rn @ gram_nn.double()
    noise = torch.finfo(torch.float64).eps * max(W_mn.shape) * energy_r[0]
    inverse_r = torch.where(energy_r > noise, 1 / energy_r, 0)
    B_mr[unseen_m] = W_mn[unseen_m].double() @ AS_rn.T * inverse_r
    return B_mr


def _balanced(B_mr: torch.Tensor, A_rn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product with equal norms of each column of B and its row of A, and with fixed signs."""
    norm_B_r, norm_A_r = torch.linalg.norm(B_mr, dim=0), torch.linalg.norm(A_rn, dim=1)
    common_r = (norm_B_r * norm_A_r).sqrt()
    peak_r = B_mr.gather(0, B_mr.abs().argmax(0, keepdim=True))[0]
    sign_r = torch.where(peak_r < 0, -1.0, 1.0)
    scale_B_r, scale_A_r = (
        sign_r * torch.where(norm > 0, common_r / norm, 0) for norm in (norm_B_r, norm_A_r)
    )
    return B_mr * scale_B_r, A_rn * scale_A_r[:, None]
