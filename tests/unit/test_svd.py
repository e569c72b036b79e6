"""Truncated SVD, plain and whitened: the optimum that theory gives, and competitors that do not beat it."""

import pytest
import torch

from sparsekd_ray.prune.svd import centred, energy_rank, mean_bias, singular_values, truncated_factors

torch.set_num_threads(1)

WIDE, SQUARE, TALL = (7, 13), (9, 9), (13, 7)
SHAPES = [WIDE, SQUARE, TALL, (1, 6), (6, 1), (65, 33), (33, 130)]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(n: int, tokens: int, seed: int) -> torch.Tensor:
    """X_nT of unequal, correlated inputs; singular if there are fewer tokens than inputs."""
    return torch.diag(torch.linspace(0.1, 3, n, dtype=torch.float64)) @ normal(n, n, seed=seed) @ normal(
        n, tokens, seed=seed + 1
    )  # fmt: skip


def error(D_m: torch.Tensor, W_mn: torch.Tensor, other_mn: torch.Tensor, X_nT: torch.Tensor) -> float:
    """‖D (W − Ŵ) X‖, by its definition."""
    return float(torch.linalg.norm(D_m[:, None] * ((W_mn - other_mn) @ X_nT)))


def naive_spectrum(D_m: torch.Tensor, W_mn: torch.Tensor, X_nT: torch.Tensor) -> torch.Tensor:
    """Singular values of D W X, which are those of D W S^½, with zeros up to min(m, n)."""
    sigma = torch.linalg.svdvals(D_m[:, None] * (W_mn @ X_nT))
    k = min(W_mn.shape)
    return torch.cat([sigma, sigma.new_zeros(max(0, k - len(sigma)))])[:k]


# plain


@pytest.mark.parametrize(("m", "n", "rank"), [(7, 13, 1), (13, 7, 5), (9, 9, 9), (1, 6, 1), (6, 1, 1)])
def test_factors_reach_the_eckart_young_distance(m: int, n: int, rank: int) -> None:
    W_mn = normal(m, n, seed=m * n)
    B_mr, A_rn = truncated_factors(W_mn, rank)
    assert B_mr.shape == (m, rank) and A_rn.shape == (rank, n)
    assert torch.linalg.norm(W_mn - B_mr @ A_rn) == pytest.approx(
        float(singular_values(W_mn)[rank:].square().sum().sqrt()), abs=1e-12
    )
    assert torch.linalg.norm(B_mr) == pytest.approx(float(torch.linalg.norm(A_rn)))


# whitened


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", ["many", "few", "one"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_whitened_error_is_the_optimum(shape: tuple[int, int], tokens: str, weighted: bool) -> None:
    m, n = shape
    W_mn, X_nT = normal(m, n), inputs(n, {"many": 4 * n, "few": max(1, n // 2), "one": 1}[tokens], seed=1)
    weight_m = normal(m, seed=3).abs() + 0.01 if weighted else None
    D_m = torch.ones(m, dtype=torch.float64) if weight_m is None else weight_m
    gram_nn, true_k = X_nT @ X_nT.T, naive_spectrum(D_m, W_mn, X_nT)
    sigma_k = singular_values(W_mn, gram_nn, weight_m)
    assert sigma_k.shape == true_k.shape and (sigma_k.diff() <= 0).all()
    # squares are exact to rounding of the largest, and so is an error that should be zero
    torch.testing.assert_close(
        sigma_k.square(), true_k.square(), rtol=1e-10, atol=1e-13 * float(true_k[0]) ** 2
    )
    for rank in sorted({1, (len(true_k) + 1) // 2, len(true_k)}):
        B_mr, A_rn = truncated_factors(W_mn, rank, gram_nn, weight_m)
        optimum = float(true_k[rank:].square().sum().sqrt())
        found = error(D_m, W_mn, B_mr @ A_rn, X_nT)
        assert found == pytest.approx(optimum, rel=1e-6, abs=1e-7 * float(true_k[0]))
        torch.testing.assert_close(torch.linalg.norm(B_mr, dim=0), torch.linalg.norm(A_rn, dim=1))


@pytest.mark.parametrize("shape", [WIDE, TALL])
@pytest.mark.parametrize("weighted", [False, True])
def test_no_other_factors_of_that_rank_come_closer(shape: tuple[int, int], weighted: bool) -> None:
    """Alternating least squares on D (W − B A) X from random starts is a competitor without decompositions."""
    m, n = shape
    W_mn, X_nT, rank = normal(m, n), inputs(n, 5, seed=5), 3
    D_m = normal(m, seed=2).abs() + 0.1 if weighted else torch.ones(m, dtype=torch.float64)
    B_mr, A_rn = truncated_factors(W_mn, rank, X_nT @ X_nT.T, D_m)
    best = error(D_m, W_mn, B_mr @ A_rn, X_nT)
    for start in range(20):
        A = normal(rank, n, seed=100 + start)
        for _ in range(50):
            B = W_mn @ X_nT @ torch.linalg.pinv(A @ X_nT)  # row by row, so D does not enter
            A = torch.linalg.pinv(D_m[:, None] * B) @ (D_m[:, None] * W_mn)
        assert error(D_m, W_mn, B @ A, X_nT) >= best * (1 - 1e-9)
    assert error(D_m, W_mn, B @ A, X_nT) == pytest.approx(best, rel=0.2)  # a competitor worth the name


@pytest.mark.parametrize("shape", SHAPES)
def test_an_identity_gram_is_plain_svd(shape: tuple[int, int]) -> None:
    W_mn, rank = normal(*shape), min(shape) // 2 + 1
    eye_nn = torch.eye(shape[1], dtype=torch.float64)
    torch.testing.assert_close(singular_values(W_mn, eye_nn), singular_values(W_mn))
    for one, other in zip(truncated_factors(W_mn, rank, eye_nn), truncated_factors(W_mn, rank), strict=True):
        torch.testing.assert_close(one, other)


def test_full_rank_reproduces_the_matrix_where_the_text_never_went() -> None:
    for m, n in (WIDE, SQUARE, TALL):
        W_mn, X_nT = normal(m, n), inputs(n, 2, seed=7)
        B_mr, A_rn = truncated_factors(W_mn, min(m, n), X_nT @ X_nT.T)
        torch.testing.assert_close(B_mr @ A_rn, W_mn)


@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_rows_without_weight_become_their_own_best_fit(shape: tuple[int, int]) -> None:
    m, n = shape
    W_mn, X_nT, rank = normal(m, n), inputs(n, 40, seed=8), 3
    weight_m = torch.ones(m, dtype=torch.float64)
    weight_m[[0, m // 2]] = torch.tensor([0.0, 1e-12], dtype=torch.float64)
    B_mr, A_rn = truncated_factors(W_mn, rank, X_nT @ X_nT.T, weight_m)
    fit_mr = W_mn @ X_nT @ torch.linalg.pinv(A_rn @ X_nT)
    torch.testing.assert_close(B_mr, fit_mr)


@pytest.mark.parametrize("shape", [WIDE, SQUARE, TALL])
@pytest.mark.parametrize("gram", [False, True])
def test_zero_weights_zero_rows_and_zero_matrices_give_no_nan(shape: tuple[int, int], gram: bool) -> None:
    m, n = shape
    X_nT = inputs(n, 20, seed=9)
    gram_nn = X_nT @ X_nT.T if gram else None
    zero_rows = normal(m, n)
    zero_rows[::2] = 0
    for W_mn in (zero_rows, torch.zeros(m, n), torch.ones(m, n)):
        for weight_m in (None, torch.zeros(m), torch.linspace(0, 1, m)):
            for rank in (1, min(m, n)):
                B_mr, A_rn = truncated_factors(W_mn, rank, gram_nn, weight_m)
                assert torch.isfinite(B_mr).all() and torch.isfinite(A_rn).all()
                assert ((B_mr @ A_rn).abs() < 1e-12)[W_mn.abs().sum(1) == 0].all()
                assert torch.isfinite(singular_values(W_mn, gram_nn, weight_m)).all()
    B_mr, A_rn = truncated_factors(torch.zeros(m, n), 2, torch.zeros(n, n))
    assert not B_mr.any() and not A_rn.any()


# what both share


@pytest.mark.parametrize("gram", [False, True])
def test_signs_are_fixed_and_the_type_is_kept(gram: bool) -> None:
    W_mn = normal(10, 4, seed=1).float()
    gram_nn = torch.diag(torch.arange(1.0, 5.0)) if gram else None
    B_mr, A_rn = truncated_factors(W_mn, 3, gram_nn)
    assert B_mr.dtype == A_rn.dtype == torch.float32
    assert (B_mr.gather(0, B_mr.abs().argmax(0, keepdim=True)) > 0).all()
    other_B, other_A = truncated_factors(-W_mn, 3, gram_nn)  # whose own signs would differ
    torch.testing.assert_close(other_B, B_mr)
    torch.testing.assert_close(other_A, -A_rn)
    again_B, again_A = truncated_factors(W_mn, 3, gram_nn)
    assert torch.equal(again_B, B_mr) and torch.equal(again_A, A_rn)


def test_what_does_not_fit_is_refused() -> None:
    W_mn = torch.zeros(5, 3)
    for rank in (0, 4):
        with pytest.raises(ValueError, match="allowed: 1 to 3"):
            truncated_factors(W_mn, rank)
    with pytest.raises(ValueError, match=r"Gram of shape \(5, 5\) for 3 inputs"):
        singular_values(W_mn, torch.eye(5))
    for weight_m in (torch.ones(3), torch.tensor([1, 1, 1, 1, -1.0]), torch.full((5,), torch.nan)):
        with pytest.raises(ValueError, match="needed: 5 numbers, none negative"):
            truncated_factors(W_mn, 1, None, weight_m)


@pytest.mark.parametrize("shape", [WIDE, SQUARE, TALL])
def test_centred_factors_and_bias_are_the_best_affine_map(shape: tuple[int, int]) -> None:
    m, n = shape
    W_mn, rank, tokens = normal(m, n), 2, 50
    X_nT = inputs(n, tokens, seed=11) + 5 * normal(n, 1, seed=12)
    mean_n = X_nT.mean(1)
    gram_nn = centred(X_nT @ X_nT.T, X_nT.sum(1), tokens)
    torch.testing.assert_close(gram_nn, (X_nT - mean_n[:, None]) @ (X_nT - mean_n[:, None]).T)
    B_mr, A_rn = truncated_factors(W_mn, rank, gram_nn)
    bias_m = mean_bias(W_mn, B_mr, A_rn, mean_n)
    U_mr = torch.linalg.qr(B_mr).Q
    torch.testing.assert_close(bias_m, W_mn @ mean_n - U_mr @ U_mr.T @ (W_mn @ mean_n))
    missed = torch.linalg.norm(W_mn @ X_nT - B_mr @ (A_rn @ X_nT) - bias_m[:, None])
    optimum = (
        naive_spectrum(torch.ones(m).double(), W_mn, X_nT - mean_n[:, None])[rank:].square().sum().sqrt()
    )
    assert float(missed) == pytest.approx(float(optimum), rel=1e-6)
    plain_B, plain_A = truncated_factors(W_mn, rank, X_nT @ X_nT.T)
    assert missed < torch.linalg.norm(W_mn @ X_nT - plain_B @ (plain_A @ X_nT))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tau", [1e-9, 0.3, 0.5, 0.95, 1.0])
def test_energy_rank_is_the_first_that_retains_enough(seed: int, tau: float) -> None:
    sigma_k = normal(17, seed=seed).abs().sort(descending=True).values
    energy_k = sigma_k.square()
    kept = [float(energy_k[:r].cumsum(0)[-1]) for r in range(1, 18)]
    assert energy_rank(sigma_k, tau) == next(r for r in range(1, 18) if kept[r - 1] >= tau * kept[-1])


def test_energy_rank_by_hand() -> None:
    assert energy_rank(torch.tensor([3.0, 4.0, 0.0]).sort(descending=True).values, 16 / 25) == 1
    assert energy_rank(torch.tensor([4.0, 3.0, 0.0]), 0.641) == 2
    assert energy_rank(torch.tensor([4.0, 3.0, 0.0]), 1) == 2
    assert energy_rank(torch.zeros(4), 0.9) == 1
    with pytest.raises(ValueError, match="above 0, up to 1"):
        energy_rank(torch.ones(3), 0)
