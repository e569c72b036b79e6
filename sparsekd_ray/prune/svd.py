"""One weight matrix by its spectrum: the best approximation of a given rank, written as two thin factors.

W = U diag(σ) Vᵀ, and by Eckart-Young (1936) the sum of the first r terms is the closest rank-r matrix in
the Frobenius norm, at the distance sqrt(Σ_{i>r} σ_i²). SparseKD prunes every MLP matrix this way. A linear
layer y = W x then costs r (m + n) parameters and multiplications per token instead of m n.

Shapes: m rows (outputs), n columns (inputs), r rank, k = min(m, n).
"""

import torch


def singular_values(W_mn: torch.Tensor) -> torch.Tensor:
    """The spectrum of a matrix, largest first, [k] in float64."""
    return torch.linalg.svdvals(W_mn.double())


def truncated_factors(W_mn: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors B_mr, A_rn whose product is the best approximation of W_mn of that rank (Eckart-Young;
    SparseKD).

    Both carry sqrt(σ), so their norms are equal and one learning rate suits both. The signs, which a
    singular value decomposition leaves open, are fixed: the entry of largest magnitude in each column of B
    is positive. Computed in float64, returned in W's type.
    """
    k = min(W_mn.shape)
    if not 1 <= rank <= k:
        raise ValueError(f"rank {rank} for a {tuple(W_mn.shape)} matrix; allowed: 1 to {k}")
    U_mk, sigma_k, Vt_kn = torch.linalg.svd(W_mn.double(), full_matrices=False)
    U_mr, root_r, Vt_rn = U_mk[:, :rank], sigma_k[:rank].sqrt(), Vt_kn[:rank]
    peak_r = U_mr.gather(0, U_mr.abs().argmax(0, keepdim=True))[0]
    sign_r = torch.where(peak_r < 0, -1.0, 1.0)
    B_mr = U_mr * (sign_r * root_r)
    A_rn = Vt_rn * (sign_r * root_r)[:, None]
    return B_mr.to(W_mn.dtype).contiguous(), A_rn.to(W_mn.dtype).contiguous()
