"""SDMPrune's importance against one autograd pass per sample, its two phases against the same by hand."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import FAMILIES, dense_model

from sparsekd_ray.errors import ModelError
from sparsekd_ray.model.mlp import MLP, layer_count, mlp_of, with_width
from sparsekd_ray.prune import sdm
from sparsekd_ray.teacher.signal import Target, tempered, topk

torch.set_num_threads(1)


def samples(count: int = 5, length: int = 17) -> list[torch.Tensor]:
    return list(torch.randint(0, 97, (count, length), generator=torch.Generator().manual_seed(3)))


def targets(model: torch.nn.Module, temperature: float, k: int = 12) -> list[Target]:
    """What the model itself says of each sample, as a cache would hold it."""
    found = []
    for ids_L in samples():
        with torch.no_grad():
            logits_NV = model(ids_L[None]).logits[0, :-1]
        kept = topk(logits_NV, k, (temperature,))
        logprobs_NK, tail_N = tempered(kept.logprobs_NK, kept.log_z_NT[:, 0], temperature)
        found.append(Target(kept.ids_NK, logprobs_NK, tail_N))
    return found


def named(family: str, model: torch.nn.Module, layer: int) -> MLP:
    """The family's MLP parameters by their own names, gate and up cut by row numbers."""
    mlp = model.model.layers[layer].mlp
    if family == "qwen3":
        return MLP(mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
    inner = mlp.down_proj.weight.shape[1]
    return MLP(mlp.gate_up_proj.weight[:inner], mlp.gate_up_proj.weight[inner:], mlp.down_proj.weight)


def naive_importance(
    family: str, model: torch.nn.Module, loss: Callable[[torch.Tensor, int], torch.Tensor]
) -> list[torch.Tensor]:
    """The formula, entry by entry, from logits and one gradient per sample."""
    scores = [torch.zeros(named(family, model, i).down_DI.shape[1]) for i in range(layer_count(model))]
    for index, ids_L in enumerate(samples()):
        logits_LV = model(ids_L[None]).logits[0]
        parameters = list(model.parameters())
        gradients = dict(
            zip(parameters, torch.autograd.grad(loss(logits_LV, index), parameters), strict=True)
        )
        for layer, score_I in enumerate(scores):
            mlp = model.model.layers[layer].mlp
            W_d, g_d = mlp.down_proj.weight, gradients[mlp.down_proj.weight]
            if family == "phi3":
                (W_g, W_u), (g_g, g_u) = (
                    mlp.gate_up_proj.weight.chunk(2),
                    gradients[mlp.gate_up_proj.weight].chunk(2),
                )
            else:
                W_g, g_g = mlp.gate_proj.weight, gradients[mlp.gate_proj.weight]
                W_u, g_u = mlp.up_proj.weight, gradients[mlp.up_proj.weight]
            for i in range(len(score_I)):
                signed_D = W_d[:, i] * g_d[:, i] + W_u[i] * g_u[i] + W_g[i] * g_g[i]
                score_I[i] += signed_D.abs().mean().detach()
    return scores


def naive_loss(target: list[Target], alpha: float) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """(1 − α) CE + α KL at student temperature 1, from whole logits, the tail as one class."""

    def loss(logits_LV: torch.Tensor, index: int) -> torch.Tensor:
        log_q = logits_LV[:-1].log_softmax(-1)
        t, ids = target[index].logprobs_NK.exp(), target[index].ids_NK.long()
        log_q_K = log_q.gather(1, ids)
        kl = (t * (t.log() - log_q_K)).sum(-1)
        rest = (1 - log_q_K.exp().sum(-1)).clamp(min=1e-30)
        tail = target[index].tail_N.clamp(min=1e-30)
        kl = kl + tail * (tail.log() - rest.log())
        return (1 - alpha) * F.cross_entropy(logits_LV[:-1], samples()[index][1:]) + alpha * kl.mean()

    return loss


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_importance_is_that_of_one_gradient_per_sample(family: str, tied: bool, alpha: float) -> None:
    teacher, model = dense_model(family, tied), dense_model(family, tied)
    for i in range(3):  # away from its teacher
        named(family, model, i).down_DI.data.mul_(0.7)
    target = targets(teacher, 0.5)
    found = sdm.importance(model, samples(), sdm._loss(model, samples(), target, alpha))
    expected = naive_importance(family, model, naive_loss(target, alpha))
    for score, wanted in zip(found, expected, strict=True):
        assert score.dtype == torch.float64
        torch.testing.assert_close(score.float(), wanted, atol=1e-6, rtol=2e-4)


def test_contribution_is_the_signed_sum_before_the_absolute_value() -> None:
    one = torch.ones(1, 2)
    weights = MLP(one, one, one.T)
    assert sdm.contribution(weights, MLP(one, -one, torch.zeros(2, 1))).tolist() == [0]
    assert sdm.contribution(weights, MLP(one, one, torch.tensor([[-2.0], [4.0]]))).tolist() == [3]


@pytest.mark.parametrize("family", FAMILIES)
def test_distance_to_oneself_has_no_gradient(family: str) -> None:
    """Why the first cut needs cross-entropy."""
    model = dense_model(family, True)
    own, ce = (
        sdm.importance(model, samples(), sdm._loss(model, samples(), targets(model, 1.0), alpha))
        for alpha in (1.0, 0.0)
    )
    assert max(float(score.max()) for score in own) < 1e-4 * min(float(score.mean()) for score in ce)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_layers_gradients_at_a_time_and_the_model_as_before(family: str) -> None:
    model = dense_model(family, True).train()
    model.model.norm.weight.requires_grad_(False)
    model.model.embed_tokens.weight.grad = mark = torch.ones_like(model.model.embed_tokens.weight)
    before = [(p, p.requires_grad, p.grad, p.detach().clone()) for p in model.parameters()]
    alive: list[int] = []

    def count(_: torch.Tensor) -> None:
        holders = [
            i for i in range(3) if any(p.grad is not None for p in model.model.layers[i].mlp.parameters())
        ]
        alive.append(len(holders))

    hooks = [p.register_post_accumulate_grad_hook(count) for n, p in model.named_parameters() if ".mlp." in n]
    with torch.no_grad():
        sdm.importance(model, samples(), sdm._loss(model, samples(), targets(model, 0.5), 0.4))
    for hook in hooks:
        hook.remove()
    assert model.training and max(alive) == 1
    for parameter, required, gradient, value in before:
        assert (
            parameter.requires_grad == required
            and parameter.grad is gradient
            and torch.equal(parameter, value)
        )
    assert model.model.embed_tokens.weight.grad is mark and torch.equal(mark, torch.ones_like(mark))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_phases_in_numbers_of_the_whole_model(family: str, dtype: torch.dtype) -> None:
    model = dense_model(family, True).to(dtype)
    target = targets(model.float(), 0.5)
    model = model.to(dtype)
    given = copy.deepcopy(model)
    kept = sdm.select(given, samples(), 20, targets=target, alpha=0.4, first=0.2)
    assert given.config.intermediate_size == 36, "phase 1 narrows the model itself"
    first = [score.topk(36).indices.sort().values for score in sdm.importance(
        model, samples(), sdm._loss(model, samples(), target, 0.0)
    )]  # fmt: skip
    cut = with_width(model, [
        MLP(mlp.gate_ID[K], mlp.up_ID[K], mlp.down_DI[:, K])
        for mlp, K in zip([mlp_of(model, i) for i in range(3)], first, strict=True)
    ])  # fmt: skip
    second = sdm.importance(cut, samples(), sdm._loss(cut, samples(), target, 0.4))
    expected = [K[score.topk(20).indices.sort().values] for K, score in zip(first, second, strict=True)]
    assert [K.tolist() for K in kept] == [K.tolist() for K in expected]
    again = sdm.select(copy.deepcopy(model), torch.stack(samples()), 20, targets=target, alpha=0.4, first=0.2)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_a_cut_below_the_first_share_is_by_cross_entropy_alone() -> None:
    model = dense_model("phi3", True)
    target = targets(model, 0.5)
    kept = sdm.select(model, samples(), 44, targets=target, alpha=1.0)
    scores = sdm.importance(model, samples(), sdm._loss(model, samples(), target, 0.0))
    assert [K.tolist() for K in kept] == [s.topk(44).indices.sort().values.tolist() for s in scores]


@pytest.mark.parametrize(
    ("present", "align", "expected"),
    [(352, 1, 343), (3072, 64, 3008), (8192, 64, 8000), (45, 1, 44), (45, 8, 40), (10, 1, 9)],
)
def test_first_phase_always_cuts_something(present: int, align: int, expected: int) -> None:
    assert sdm._first_width(present, 0.025, align) == expected


def test_bad_input_is_named() -> None:
    model = dense_model("qwen3", True)
    target = targets(model, 0.5)
    with pytest.raises(ValueError, match="4 samples, 5 targets"):
        sdm.select(model, samples()[:4], 20, targets=target, alpha=0.4)
    with pytest.raises(ModelError, match="sample 0 has 15 predictions, its target 16 positions"):
        sdm.select(model, [ids[:-1] for ids in samples()], 20, targets=target, alpha=0.4)
    model.model.embed_tokens.weight.data[int(samples()[0][0])] = torch.nan
    with pytest.raises(ModelError, match=r"importance of model\.layers\.0\.mlp .* holds NaN"):
        sdm.select(model, samples(), 20, targets=target, alpha=0.4)
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"layers\.2\.mlp\.up_proj\.weight holds NaN"):
        sdm.select(model, samples(), 20, targets=target, alpha=0.4)
