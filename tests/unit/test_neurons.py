"""Leverage, choice and refit of neurons against their definitions, and narrower models of both families."""

from pathlib import Path

import pytest
import torch
from models import FAMILIES, dense_directory, dense_model, logits

from sparsekd_ray.errors import ConfigError, ModelError
from sparsekd_ray.model import loading, saving, spec
from sparsekd_ray.model.low_rank import LowRankLinear
from sparsekd_ray.model.mlp import MLP, mlp_of, view, with_width
from sparsekd_ray.prune import neurons

torch.set_num_threads(1)

TINY = 1e-11  # a ridge that changes nothing


def activations(tokens: int, inner: int, rank: int, seed: int = 0) -> torch.Tensor:
    """[tokens, inner] of this rank, scales from 1 to 30 over the neurons."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(tokens, rank, dtype=torch.float64, generator=generator)
    right = torch.randn(rank, inner, dtype=torch.float64, generator=generator)
    return left @ right * torch.logspace(0, 1.5, inner, dtype=torch.float64)


# width


@pytest.mark.parametrize("align", [1, 8, 64])
@pytest.mark.parametrize("sparsity", [0.15, 0.35, 0.5, 0.65])
def test_width_is_the_nearest_multiple(align: int, sparsity: float) -> None:
    hidden, inner, layers = 128, 352, 4
    dense = 3 * hidden * inner * layers
    width = neurons.width(dense, sparsity, hidden, layers, align)
    candidates = range(align, inner, align)
    wanted = (1 - sparsity) * dense
    assert width in candidates
    assert abs(3 * hidden * layers * width - wanted) == min(
        abs(3 * hidden * layers * w - wanted) for w in candidates
    )


def test_width_says_what_can_be_reached() -> None:
    dense = 3 * 128 * 352 * 4
    with pytest.raises(ConfigError, match=r"asks for 0 neurons.*to 0\.8182 \(width 64\)"):
        neurons.width(dense, 0.95, 128, 4, 64)
    with pytest.raises(
        ConfigError, match=r"asks for 400 neurons.*which have 352.*from 0\.4318 \(width 200\)"
    ):
        neurons.width(dense, 0.05, 128, 4, 200)
    with pytest.raises(ConfigError, match=r"which have 200.*from 0\.4347 \(width 199\)"):
        neurons.width(dense, 0.15, 128, 4, 1, present=200)
    with pytest.raises(ConfigError, match=r"lower prune\.align"):
        neurons.width(dense, 0.5, 128, 4, 512)


# leverage


@pytest.mark.parametrize("ridge", [1e-4, 1e-2, 10.0])
@pytest.mark.parametrize(("tokens", "inner", "rank"), [(50, 13, 13), (5, 13, 5), (50, 13, 1), (40, 1, 1)])
def test_leverage_is_the_diagonal_of_its_definition(tokens: int, inner: int, rank: int, ridge: float) -> None:
    h = activations(tokens, inner, rank)
    gram = h.T @ h
    score = neurons.leverage(gram, ridge)
    square_I = gram.diagonal()
    shift_I = ridge * torch.maximum(square_I.median(), square_I / 10)
    expected = (gram @ torch.linalg.inv(gram + shift_I.diag())).diagonal()
    torch.testing.assert_close(score, expected, atol=1e-8, rtol=1e-8)
    assert score.dtype == torch.float64 and (score >= 0).all() and (score <= 1).all()
    torch.testing.assert_close(
        neurons.leverage(gram * 1e6, ridge), score
    )  # no matter how many tokens, or how large


def test_leverage_of_zero_and_of_silent_and_double_neurons() -> None:
    assert neurons.leverage(torch.zeros(4, 4)).max() < 1e-12
    h = activations(60, 6, 6) / torch.logspace(0, 1.5, 6, dtype=torch.float64)
    h[:, 2], h[:, 4] = 0, h[:, 1]
    score = neurons.leverage(h.T @ h, 1e-6)
    assert score[2] < 1e-12
    torch.testing.assert_close(score[[1, 4]], torch.full((2,), 0.5, dtype=torch.float64), atol=1e-4, rtol=0)
    assert (score[[0, 3, 5]] > 0.99).all()


def test_default_ridge_carries_the_rounding_of_sums_in_fp32() -> None:
    h = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)) @ torch.ones(
        3, 300
    )  # rank 1, and long
    gram = sum((part.T @ part for part in h.split(5)), torch.zeros(300, 300))
    score = neurons.leverage(gram)
    kept = neurons.keep(score, 7)
    assert score.isfinite().all() and neurons.refit(torch.ones(2, 300), gram, kept).isfinite().all()
    broken = gram - 2 * torch.eye(300) * gram.diagonal().mean()
    with pytest.raises(ModelError, match="not positive definite"):
        neurons.leverage(broken)


def test_keep_is_rising_and_takes_the_lower_of_equal_ones() -> None:
    score = torch.tensor([1.0, 3, 1, 3, 2, 1])
    assert neurons.keep(score, 3).tolist() == [1, 3, 4]
    assert neurons.keep(score, 4).tolist() == [0, 1, 3, 4]
    assert neurons.keep(torch.ones(1000), 10).tolist() == list(range(10))
    for width in (0, 7):
        with pytest.raises(ValueError, match="allowed: 1 to 6"):
            neurons.keep(score, width)
    with pytest.raises(ModelError, match="score_I holds NaN"):
        neurons.keep(score / 0 * 0, 2)


# elimination


def refit_error(h: torch.Tensor, W: torch.Tensor, K: list[int]) -> float:
    """Of the best down projection of these neurons."""
    solution = torch.linalg.lstsq(h[:, K], h @ W.T).solution
    return float((h @ W.T - h[:, K] @ solution).square().sum())


@pytest.mark.parametrize(("hidden", "inner"), [(5, 12), (20, 9), (1, 8)])
def test_each_elimination_is_the_cheapest_there_is(hidden: int, inner: int) -> None:
    h = activations(300, inner, inner, seed=hidden)
    W = torch.randn(hidden, inner, dtype=torch.float64, generator=torch.Generator().manual_seed(inner))
    left = list(range(inner))
    for width in range(inner - 1, 0, -1):
        left = min(([k for k in left if k != i] for i in left), key=lambda K: refit_error(h, W, K))
        assert neurons.eliminate(W, h.T @ h, width, TINY).tolist() == left
    assert neurons.eliminate(W, h.T @ h, inner).tolist() == list(range(inner))


def test_of_twins_one_stays() -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(100, 10, generator=generator).repeat(1, 2)
    W = torch.randn(4, 20, generator=generator)
    kept = neurons.eliminate(W, h.T @ h, 10, 1e-6)
    assert sorted(k % 10 for k in kept.tolist()) == list(range(10))
    assert refit_error(h, W, kept.tolist()) < 1e-6


def test_rounds_of_many_neurons_come_near_to_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    h = activations(400, 120, 90)
    W = torch.randn(30, 120, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram, errors = h.T @ h, []
    for rounds in (120, 15):  # 1 neuron a round, 8 a round
        monkeypatch.setattr(neurons, "ROUNDS", rounds)
        kept = neurons.eliminate(W, gram, 45)
        assert len(set(kept.tolist())) == 45 and kept.equal(kept.sort().values)
        errors.append(refit_error(h, W, kept.tolist()))
    leverage = refit_error(h, W, neurons.keep(neurons.leverage(gram), 45).tolist())
    assert errors[1] < 1.1 * errors[0] and errors[0] < leverage


def test_elimination_of_silent_neurons_goes_by_their_weights() -> None:
    W = torch.tensor([[3.0, 1, 2, 0]])
    assert neurons.eliminate(W, torch.zeros(4, 4), 2).tolist() == [0, 2]
    assert neurons.eliminate(torch.zeros(1, 4), torch.eye(4), 2).tolist() == [2, 3]
    with pytest.raises(ModelError, match="gram_II holds NaN"):
        neurons.eliminate(W, torch.eye(4) / 0, 2)
    with pytest.raises(ValueError, match="allowed: 1 to 4"):
        neurons.eliminate(W, torch.eye(4), 0)


# refit


@pytest.mark.parametrize(("hidden", "inner", "width"), [(7, 13, 5), (13, 7, 6), (1, 9, 1), (5, 70, 65)])
@pytest.mark.parametrize("seed", [0, 1])
def test_refit_is_the_least_squares_solution(hidden: int, inner: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    h = activations(200, inner, inner, seed)
    W = torch.randn(hidden, inner, dtype=torch.float64, generator=generator)
    K = torch.randperm(inner, generator=generator)[:width].sort().values
    refitted = neurons.refit(W, h.T @ h, K, TINY)
    solution = torch.linalg.lstsq(h[:, K], h @ W.T).solution.T
    torch.testing.assert_close(refitted, solution, atol=1e-5, rtol=1e-4)
    gram = h.T @ h
    normal = W @ gram[:, K] @ torch.linalg.inv(gram[K][:, K])
    torch.testing.assert_close(refitted, normal, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ridge", [1e-3, 1.0])
@pytest.mark.parametrize("rank", [1, 4, 12])
def test_refit_minimises_the_error_and_the_distance_from_the_slice(ridge: float, rank: int) -> None:
    h = activations(30, 12, rank)
    W = torch.randn(6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    K = torch.tensor([0, 3, 4, 9])
    gram = h.T @ h
    shift_K = ridge * gram.diagonal()[K]
    refitted = neurons.refit(W, gram, K, ridge).requires_grad_(True)
    loss = (h @ W.T - h[:, K] @ refitted.T).square().sum() + ((refitted - W[:, K]).square() * shift_K).sum()
    (gradient,) = torch.autograd.grad(loss, refitted)
    assert gradient.abs().max() < 1e-8 * shift_K.max() * W.norm() + 1e-6


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ridge", [1e-6, neurons.RIDGE, 1.0])
def test_refit_beats_the_slice_for_random_neurons(seed: int, ridge: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    h = activations(100, 40, 25, seed)
    W = torch.randn(9, 40, dtype=torch.float64, generator=generator)
    K = torch.randperm(40, generator=generator)[:20].sort().values
    error = (h @ W.T - h[:, K] @ neurons.refit(W, h.T @ h, K, ridge).T).norm()
    assert error < (h @ W.T - h[:, K] @ W[:, K].T).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeping_all_is_the_identity_and_silence_leaves_the_slice(dtype: torch.dtype) -> None:
    W = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    h = activations(3, 8, 3).float()
    K = torch.tensor([1, 2, 6])
    assert torch.equal(neurons.refit(W, h.T @ h, torch.arange(8)), W)
    refitted = neurons.refit(W, torch.zeros(8, 8), K)
    assert torch.equal(refitted, W[:, K]) and refitted.dtype == dtype
    h[:, [1, 2]] = 0  # two of the kept neurons never fired
    assert torch.equal(neurons.refit(W, h.T @ h, K)[:, :2], W[:, [1, 2]])


# massive activations and other units


@pytest.mark.parametrize("factor", [1e-4, 1e4])
@pytest.mark.parametrize("seed", range(3))
def test_units_of_a_neuron_change_nothing(factor: float, seed: int) -> None:
    h = activations(80, 24, 15, seed)
    W = torch.randn(7, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    a_I = torch.ones(24, dtype=torch.float64)
    a_I[[3, 8]] = factor
    K = torch.tensor([0, 3, 4, 9, 17])
    gram, other = h.T @ h, (h * a_I).T @ (h * a_I)
    assert torch.equal(neurons.eliminate(W / a_I, other, 11), neurons.eliminate(W, gram, 11))
    torch.testing.assert_close(neurons.refit(W / a_I, other, K) * a_I[K], neurons.refit(W, gram, K))


def test_elimination_is_that_of_the_ridge_by_its_formula() -> None:
    h = activations(10, 14, 6)
    W = torch.randn(5, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram = h.T @ h
    shifted, left = gram + neurons.RIDGE * gram.diagonal().diag(), list(range(14))
    for width in range(13, 0, -1):
        inverse = torch.linalg.inv(shifted[left][:, left])
        gone = [i for i in range(14) if i not in left]
        refitted = W[:, left] + W[:, gone] @ shifted[gone][:, left] @ inverse
        del left[int((refitted.square().sum(0) / inverse.diagonal()).argmin())]
        assert neurons.eliminate(W, gram, width).tolist() == left


@pytest.mark.parametrize("seed", range(3))
def test_a_massive_neuron_costs_ordinary_tokens_nothing(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    h = activations(4096, 100, 60, seed)
    h = h / h.square().mean(0).sqrt()
    h += 0.1 * torch.randn(h.shape, dtype=torch.float64, generator=generator)
    W = torch.randn(9, 100, dtype=torch.float64, generator=generator)
    ordinary, K, boosted = torch.arange(4096) % 512 != 0, torch.arange(70), h.clone()
    boosted[~ordinary, 5] *= 1e4
    cuts = [neurons.refit(W, seen.T @ seen, K) for seen in (h, boosted)]
    errors = [float((h @ W.T - h[:, K] @ cut.T)[ordinary].norm()) for cut in cuts]
    assert errors[1] < 1.05 * errors[0]
    before, after = (neurons.leverage(seen.T @ seen) for seen in (h, boosted))
    assert after[5] > 0.999 and (after - before).abs().sort().values[-2] < 0.01  # all others
    assert len(set(neurons.keep(before, 50).tolist()) & set(neurons.keep(after, 50).tolist())) >= 45


def test_silence_is_told_by_the_median_and_not_by_a_massive_neuron() -> None:
    h = activations(60, 6, 6)
    h[:, 1] *= 1e9
    h[:, 4] = 1e-25  # its square vanishes in fp32, its products with others do not
    gram, W = (h.T @ h).float(), torch.ones(2, 6)
    score = neurons.leverage(gram)
    assert score[4] < 1e-6 and (score[[0, 1, 2, 3, 5]] > 0.5).all()
    assert neurons.eliminate(W, gram, 5).tolist() == [0, 1, 2, 3, 5]
    torch.testing.assert_close(neurons.refit(W, gram, torch.tensor([0, 4]))[:, 1], W[:, 4], atol=1e-4, rtol=0)


# predicted loss


@pytest.mark.parametrize(("hidden", "inner", "width"), [(7, 13, 5), (1, 9, 1), (5, 30, 30)])
def test_predicted_loss_is_that_of_the_outputs(hidden: int, inner: int, width: int) -> None:
    generator = torch.Generator().manual_seed(inner)
    h = activations(50, inner, inner)
    W = torch.randn(hidden, inner, dtype=torch.float64, generator=generator)
    K = torch.randperm(inner, generator=generator)[:width]
    cut = torch.randn(hidden, width, dtype=torch.float64, generator=generator)
    fisher = torch.rand(hidden, dtype=torch.float64, generator=generator)
    missed_D = (h @ W.T - h[:, K] @ cut.T).square().mean(0)
    loss = neurons.predicted_loss(W, cut, K, h.T @ h, fisher, 50)
    assert loss == pytest.approx(0.5 * float((fisher * missed_D).sum()), rel=1e-10)
    assert neurons.predicted_loss(W, W[:, K], K, torch.zeros(inner, inner), fisher, 50) == 0
    with pytest.raises(ModelError, match="fisher_D holds NaN"):
        neurons.predicted_loss(W, cut, K, h.T @ h, fisher / 0, 50)


def test_bad_statistics_are_named() -> None:
    W, K = torch.ones(2, 3), torch.tensor([0, 1])
    broken = torch.eye(3)
    broken[1, 1] = torch.nan
    with pytest.raises(ModelError, match="gram_II holds NaN"):
        neurons.leverage(broken)
    with pytest.raises(ModelError, match="gram_II holds NaN"):
        neurons.refit(W, broken, K)
    with pytest.raises(ModelError, match="down_DI holds NaN"):
        neurons.refit(W / 0, torch.eye(3), K)
    with pytest.raises(ValueError, match="must be positive"):
        neurons.leverage(torch.eye(3), 0)


# MLPs in models


@pytest.mark.parametrize("family", FAMILIES)
def test_an_mlp_is_what_the_model_computes(family: str) -> None:
    model = dense_model(family, True)
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    gate, up, down = mlp_of(model, 1)
    expected = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    torch.testing.assert_close(expected, model.model.layers[1].mlp(x).detach(), atol=1e-6, rtol=1e-5)
    assert not gate.requires_grad and gate.untyped_storage().data_ptr() in {
        p.untyped_storage().data_ptr() for p in model.model.layers[1].mlp.parameters()
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrower_model_is_the_model_with_neurons_off(
    family: str, tied: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = dense_directory(tmp_path / "dense", family, tied)
    model = loading.load(source, dtype=dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    K = torch.tensor([0, 3, 4, 11, 30, 44])
    sliced = [  # activations that do not go together leave nothing to refit
        neurons.prune_mlp(mlp_of(model, i), torch.eye(45), K) for i in range(3)
    ]
    narrow = with_width(model, sliced)
    assert type(narrow) is type(model) and narrow.config.intermediate_size == 6
    assert narrow.dtype == dtype and narrow.num_parameters() == spec.total_parameters(narrow)
    off = [MLP(*(part.clone() for part in mlp_of(model, i))) for i in range(3)]
    for mlp in off:
        mlp.down_DI[:, [i for i in range(45) if i not in K]] = 0
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.2, "rtol": 0.1}
    torch.testing.assert_close(logits(narrow), logits(with_width(model, off)), **tolerance)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {p.data_ptr() for p in narrow.parameters()}.isdisjoint(p.data_ptr() for p in model.parameters())
    saving.save(narrow, source, tmp_path / "out", "card")


@pytest.mark.parametrize("family", FAMILIES)
def test_refit_on_a_model_comes_nearer_than_the_slice(family: str) -> None:
    model = dense_model(family, True)
    found: list[torch.Tensor] = []
    hook = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(
        lambda _, inputs: found.append(inputs[0])
    )
    ids = torch.randint(0, 97, (20, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(ids)
    hook.remove()
    h = found[0].flatten(0, 1)
    gram, mlp = h.T @ h, mlp_of(model, 0)
    K = neurons.keep(neurons.leverage(gram), 30)
    cuts = (neurons.prune_mlp(mlp, gram, K).down_DI, mlp.down_DI[:, K])
    errors = [(h @ mlp.down_DI.T - h[:, K] @ cut_DK.T).norm() for cut_DK in cuts]
    assert errors[0] < errors[1]


def test_models_that_cannot_be_cut_are_refused_by_name() -> None:
    dense = dense_model("phi3", True)
    sparse = loading.rebuild(dense, {}, dict(dense.state_dict()))
    with pytest.raises(ModelError, match="merge it first"):
        with_width(sparse, [mlp_of(dense, i) for i in range(3)])
    dense.model.layers[2].mlp.gate_up_proj = LowRankLinear(32, 90, 5)
    with pytest.raises(ModelError, match=r"layers\.2\.mlp\.gate_up_proj is a LowRankLinear"):
        mlp_of(dense, 2)
    model = dense_model("qwen3", True)
    mlps = [mlp_of(model, i) for i in range(3)]
    with pytest.raises(ValueError, match="2 MLPs"):
        with_width(model, mlps[:2])
    narrow = neurons.prune_mlp(mlps[0], torch.eye(45), torch.arange(5))
    with pytest.raises(ValueError, match="all of the same width"):
        with_width(model, [narrow, *mlps[1:]])
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = torch.inf
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        mlp_of(model, 1)


@pytest.mark.parametrize("fused", [True, False])
def test_view_of_stored_matrices(fused: bool) -> None:
    gate, up, down = torch.rand(3, 2), torch.rand(3, 2), torch.rand(2, 3)
    seen = view([torch.cat([gate, up]), down] if fused else [gate, up, down])
    assert all(torch.equal(a, b) for a, b in zip(seen, (gate, up, down), strict=True))
