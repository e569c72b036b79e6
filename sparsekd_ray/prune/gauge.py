"""Gauge-fixed storage of a product of two factors: its own input columns as basis (after PIFA, 2025).

B A = (B G⁻¹)(G A) for every invertible G, so r² of the r (m + n) numbers are a choice of basis, not content. Here r of
the n columns of A are that basis: with P those columns, A = A_P [I, C] in the order P, rest, and with U = B A_P

    y = B A x = U (x_P + C x_rest),

which is r (m + n − r) parameters: fewer than the dense matrix at every rank below min(m, n), so no break-even.

Which columns: Gaussian elimination with row pivoting on Aᵀ writes Aᵀ = K T, the pivots being P, K unit lower
trapezoidal with entries of at most 1 and T triangular. C comes from K alone, K_Pᵀ C = K_restᵀ, so a rank-deficient
A (T singular) is no special case. A pivot is then swapped for the column of the largest entry of C while that
entry exceeds `BOUND`; each swap multiplies the volume |det K_P| by it, so there is an end (maxvol: Goreinov,
Oseledets, Savostyanov, Tyrtyshnikov, Zamarashkin 2010). Random matrices need none or one, worst cases a few.

Two bounds hold for any conditioning of A: |C| ≤ `BOUND` (so rounding of x is not amplified), and U [I, C]
equals B A within float64 rounding of ‖B‖ ‖A‖, here 10⁻¹² relative, and then rounding to the stored type.

Shapes: m outputs, n inputs, r rank, s = n − r remaining inputs.
"""

import torch

BOUND = 2.0  # on the entries of C; 1 is reachable in principle, with many more swaps


def gauge(B_mr: torch.Tensor, A_rn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(order_n, U_mr, C_rs): input x[order[:r]] + C x[order[r:]] times U is the output B A x, |C| ≤ `BOUND`.

    order_n is int64, rising within both parts; U and C are in B's type, computed in float64. Raises ValueError
    if the factors do not fit each other, have more than n ranks, or hold NaN or infinity.
    """
    (r, n), m_and_r = A_rn.shape, tuple(B_mr.shape)
    if m_and_r[1] != r or r > n:
        raise ValueError(f"factors {m_and_r} and {(r, n)}; needed: (m, r) and (r, n) with r up to n")
    if not (B_mr.isfinite().all() and A_rn.isfinite().all()):
        raise ValueError("the factors hold NaN or infinity; only finite ones can be re-expressed")
    A_rn = A_rn.double()
    order_n, K_nr = _eliminated(A_rn)
    order_n, C_rs = _bounded(order_n, K_nr)
    U_mr = B_mr.double() @ A_rn[:, order_n[:r]]
    return order_n, U_mr.to(B_mr.dtype), C_rs.to(B_mr.dtype).contiguous()


def _eliminated(A_rn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of A in the order in which elimination picks them, pivots first, and the unit trapezoidal K_nr."""
    packed_nr, swaps_r, _ = torch.linalg.lu_factor_ex(A_rn.T.contiguous())  # "ex": zero pivots are no error
    order = list(range(A_rn.shape[1]))
    for i, j in enumerate(swaps_r.tolist()):  # row i was exchanged with row j, counted from 1
        order[i], order[j - 1] = order[j - 1], order[i]
    K_nr = packed_nr.tril(-1)
    K_nr.diagonal().fill_(1)
    return torch.tensor(order, device=A_rn.device), K_nr


def _bounded(order_n: torch.Tensor, K_nr: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The order with pivots swapped until |C| ≤ BOUND, and C solved afresh from the final pivots."""
    r = K_nr.shape[1]
    while True:
        order_n, place_n = _sorted_parts(order_n, r)
        K_nr = K_nr[place_n]
        C_rs = torch.linalg.solve(K_nr[:r].T, K_nr[r:].T)
        if not C_rs.numel() or C_rs.abs().max() <= BOUND:
            return order_n, C_rs
        place_n = _swapped(C_rs.clone())
        order_n, K_nr = order_n[place_n], K_nr[place_n]


def _sorted_parts(order_n: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    pivots, rest = order_n[:r].sort(), order_n[r:].sort()
    return torch.cat([pivots.values, rest.values]), torch.cat([pivots.indices, r + rest.indices])


def _swapped(C_rs: torch.Tensor) -> torch.Tensor:
    """Places after exchanging pivot i and other column j, largest |C_ij| first, until none exceeds BOUND.

    An exchange changes C by one product of a column and a row; C is overwritten.
    """
    r, s = C_rs.shape
    place_n = torch.arange(r + s, device=C_rs.device)
    while True:
        i, j = divmod(int(C_rs.abs().argmax()), s)
        pivot = float(C_rs[i, j])
        if abs(pivot) <= BOUND:
            return place_n
        column_r, row_s = C_rs[:, j].clone(), C_rs[i].clone()
        column_r[i] -= 1
        row_s[j] += 1
        C_rs.addr_(column_r, row_s, alpha=-1 / pivot)
        place_n[[i, r + j]] = place_n[[r + j, i]]
