"""Gauge-fixed storage: the same product, fewer numbers, a bounded C, whatever the conditioning."""

import pytest
import torch

from sparsekd_ray.model.cost import parameters
from sparsekd_ray.model.low_rank import product
from sparsekd_ray.prune import gauge as module
from sparsekd_ray.prune.gauge import BOUND, gauge
from sparsekd_ray.prune.svd import truncated_factors

torch.set_num_threads(1)

SHAPES = [(7, 13, 4), (13, 7, 4), (9, 9, 9), (9, 9, 8), (1, 6, 1), (6, 1, 1), (65, 129, 33), (20, 300, 20)]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def stored(order_n: torch.Tensor, U_mr: torch.Tensor, C_rs: torch.Tensor) -> torch.Tensor:
    """The matrix that a model makes of it."""
    return product({"U.weight": U_mr, "C.weight": C_rs, "order": order_n})


def check(B_mr: torch.Tensor, A_rn: torch.Tensor, relative: float = 1e-12) -> None:
    """The definition: y = U (x_P + C x_rest) is B A x, column by column; a permutation; C bounded."""
    (m, r), n = B_mr.shape, A_rn.shape[1]
    order_n, U_mr, C_rs = gauge(B_mr, A_rn)
    assert order_n.dtype == torch.int64 and sorted(order_n.tolist()) == list(range(n))
    assert U_mr.shape == (m, r) and C_rs.shape == (r, n - r)
    assert U_mr.numel() + C_rs.numel() == parameters(m, n, r, gauge=True)
    X_nn = torch.eye(n, dtype=torch.float64)[order_n]
    y_mn = U_mr @ (X_nn[:r] + C_rs @ X_nn[r:])
    allowed = relative * float(torch.linalg.norm(B_mr) * torch.linalg.norm(A_rn))
    assert torch.linalg.norm(y_mn - B_mr @ A_rn) <= allowed
    torch.testing.assert_close(stored(order_n, U_mr, C_rs), y_mn)
    assert C_rs.isfinite().all() and (not C_rs.numel() or C_rs.abs().max() <= BOUND)
    assert order_n[:r].tolist() == sorted(order_n[:r].tolist())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_the_product_is_the_same(shape: tuple[int, int, int], seed: int) -> None:
    m, n, r = shape
    check(normal(m, r, seed=seed), normal(r, n, seed=seed + 10))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decay", [-6, -14, -30])
def test_ill_conditioned_factors(shape: tuple[int, int, int], decay: int) -> None:
    """Singular values over many decades, split evenly as `truncated_factors` does: error relative to the product."""
    m, n, r = shape
    root_r = torch.logspace(0, decay / 2, r, dtype=torch.float64)
    B_mr = torch.linalg.qr(normal(m, r)).Q * root_r
    A_rn = root_r[:, None] * torch.linalg.qr(normal(n, r, seed=1)).Q.T
    check(B_mr, A_rn)
    order_n, U_mr, C_rs = gauge(B_mr, A_rn)
    product_mn = B_mr @ A_rn
    missed = torch.linalg.norm(stored(order_n, U_mr, C_rs) - product_mn)
    assert missed <= 1e-12 * torch.linalg.norm(product_mn)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("true_rank", [0, 1, 3])
def test_rank_deficient_factors(shape: tuple[int, int, int], true_rank: int) -> None:
    m, n, r = shape
    check(normal(m, r), normal(r, true_rank, seed=1) @ normal(true_rank, n, seed=2))
    repeated = normal(r, 1, seed=3).expand(r, n).clone()  # one column, n times
    repeated[:, : n // 2] = 0
    check(normal(m, r), repeated)


@pytest.mark.parametrize("r", [5, 20, 40])
def test_swaps_bound_c_where_elimination_alone_does_not(r: int) -> None:
    """Each column of the basis minus all later ones: elimination finds no pivot to change, and C grows as 2^r."""
    K_nr = torch.cat([torch.eye(r).double() - torch.ones(r, r).double().tril(-1), torch.ones(3, r).double()])
    K_nr[r:, :] *= torch.tensor([1.0, -0.9, 0.8])[:, None]
    _, first_nr = module._eliminated(K_nr.T)
    first_C = torch.linalg.solve(first_nr[:r].T, first_nr[r:].T)
    assert first_C.abs().max() > min(2.0**r, 1e6) / 4
    check(normal(6, r), K_nr.T.contiguous(), 1e-9)


def test_the_storage_of_truncated_factors_in_the_stored_type_and_repeatable() -> None:
    W_mn = normal(48, 96).bfloat16()
    B_mr, A_rn = truncated_factors(W_mn, 40)
    order_n, U_mr, C_rs = gauge(B_mr, A_rn)
    assert U_mr.dtype == C_rs.dtype == torch.bfloat16
    product_mn = B_mr.double() @ A_rn.double()
    rounding = torch.linalg.norm(stored(order_n, U_mr, C_rs) - product_mn) / torch.linalg.norm(product_mn)
    assert rounding < 4 * torch.finfo(torch.bfloat16).eps
    assert all(torch.equal(a, b) for a, b in zip((order_n, U_mr, C_rs), gauge(B_mr, A_rn), strict=True))


def test_factors_that_do_not_fit_are_refused() -> None:
    for shapes in (((4, 3), (2, 5)), ((4, 6), (6, 5))):
        with pytest.raises(ValueError, match="needed: \\(m, r\\) and \\(r, n\\) with r up to n"):
            gauge(torch.zeros(shapes[0]), torch.zeros(shapes[1]))
    with pytest.raises(ValueError, match="NaN or infinity"):
        gauge(torch.ones(4, 2), torch.full((2, 5), torch.nan))
