"""Masks against enumeration, Wanda against the whole model run with hooks, and zeros through training."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, dense_directory, dense_model, logits

from sparsekd_ray.errors import ConfigError, ModelError
from sparsekd_ray.model import loading, saving
from sparsekd_ray.model import masks as held_zeros
from sparsekd_ray.model.mlp import mlp_of, mlp_weights, with_width
from sparsekd_ray.prune import masks

torch.set_num_threads(1)

KINDS = {
    "phi3": {},
    "phi3-sliding": {"sliding_window": 4},
    "qwen3": {},
    "qwen3-sliding": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
}


def text(rows: int = 19) -> torch.Tensor:
    """More than two batches, the last one smaller."""
    return torch.randint(0, 97, (rows, 11), generator=torch.Generator().manual_seed(1))


def weights(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: w for layer in range(3) for name, w in mlp_weights(model, layer).items()}


# one matrix


@pytest.mark.parametrize(("m", "n"), [(5, 13), (13, 5), (1, 9), (9, 1), (40, 64)])
@pytest.mark.parametrize("sparsity", [0.0, 0.15, 0.5, 0.65, 1.0])
def test_wanda_drops_the_lowest_of_each_row(m: int, n: int, sparsity: float) -> None:
    generator = torch.Generator().manual_seed(m)
    W, norm = torch.randn(m, n, generator=generator), torch.rand(n, generator=generator) + 0.1
    kept = masks.wanda_mask(W, norm, sparsity)
    assert kept.dtype == torch.bool and int((~kept).sum()) == round(sparsity * m * n)
    dropped_m = (~kept).sum(1)
    assert dropped_m.max() - dropped_m.min() <= 1
    score = W.abs() * norm
    for row, keeps in zip(score, kept, strict=True):
        assert not (~keeps).any() or not keeps.any() or row[~keeps].max() <= row[keeps].min()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparsity", [0.0, 0.15, 0.5, 1.0])
def test_magnitude_drops_exactly_the_smallest(dtype: torch.dtype, sparsity: float) -> None:
    W = torch.randn(17, 23, generator=torch.Generator().manual_seed(0)).to(dtype)
    W[3] = 0.25  # many equal ones
    kept = masks.magnitude_mask(W, sparsity)
    order = sorted(range(W.numel()), key=lambda i: (float(W.flatten()[i].abs()), i))
    expected = torch.ones(W.numel(), dtype=torch.bool)
    expected[order[: round(sparsity * W.numel())]] = False
    assert torch.equal(kept, expected.view(W.shape))


def test_zeros_go_first_and_ties_are_settled() -> None:
    W = torch.tensor([[1.0, 0, 2, 0, 3, 4]])
    silent_inputs = torch.tensor([0.0, 1, 0, 1, 0, 1])  # scores 0 for all but the last
    assert masks.wanda_mask(W, silent_inputs, 0.5).tolist() == [[False, False, True, False, True, True]]
    assert masks.wanda_mask(torch.zeros(2, 3), torch.zeros(3), 0.5).tolist() == [
        [False, True, True],
        [False, False, True],
    ]
    assert masks.magnitude_mask(torch.zeros(2, 3), 0.5).tolist() == [[False] * 3, [True] * 3]


def test_bad_matrices_are_refused() -> None:
    W = torch.ones(2, 3)
    with pytest.raises(ModelError, match="norm_n holds NaN"):
        masks.wanda_mask(W, torch.tensor([1.0, torch.nan, 1]), 0.5)
    for mask in (lambda w, s: masks.wanda_mask(w, torch.ones(3), s), masks.magnitude_mask):
        with pytest.raises(ModelError, match="W_mn holds NaN or infinity"):
            mask(W / 0, 0.5)
        with pytest.raises(ValueError, match="from 0 to 1"):
            mask(W, 1.5)


# whole models


def marked(model: Any) -> Any:
    """With the mark of its mask, as the prune stage leaves it."""
    model.config.sparsekd_mask = "magnitude"
    return model


@torch.no_grad()
def naive_wanda(model: torch.nn.Module, ids_BL: torch.Tensor, sparsity: float) -> None:
    """Prunes in place; the whole, partly pruned model runs once for every layer."""
    for layer in range(3):
        squares, hooks = dict.fromkeys(mlp_weights(model, layer), 0.0), []
        for name in squares:

            def add(module: torch.nn.Module, inputs: Any, sums: dict = squares, name: str = name) -> None:
                sums[name] += inputs[0].flatten(0, 1).float().square().sum(0, dtype=torch.float64)

            hooks.append(model.get_submodule(name).register_forward_pre_hook(add))
        for part in ids_BL.split(masks.SEQUENCES_PER_BATCH):
            model(part)
        for hook in hooks:
            hook.remove()
        for name, weight in mlp_weights(model, layer).items():
            weight.masked_fill_(~masks.wanda_mask(weight, squares[name].sqrt(), sparsity), 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wanda_sees_what_the_pruned_model_would_show(kind: str, dtype: torch.dtype) -> None:
    model = dense_model(kind.partition("-")[0], True, **KINDS[kind]).to(dtype)
    # `.to` rounds the rotary table too; a copy has it in fp32, as every model that is loaded
    model = with_width(model, [mlp_of(model, layer) for layer in range(3)])
    given = copy.deepcopy(model)
    found = masks.wanda(given, text(), 0.5)
    assert found is given, "no second copy of the model is made"
    naive_wanda(model, text(), 0.5)
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    assert torch.equal(logits(found), logits(model))


def test_wanda_asks_the_model_once_for_each_length_of_part(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, honest = [], masks._layer_arguments

    def spy(model: Any, ids_bL: torch.Tensor) -> list[dict[str, Any]]:
        asked.append(len(ids_bL))
        return honest(model, ids_bL)

    monkeypatch.setattr(masks, "_layer_arguments", spy)
    masks.wanda(dense_model("phi3", True), text(27), 0.5)
    assert sorted(asked) == [3, masks.SEQUENCES_PER_BATCH]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["wanda", "magnitude"])
@pytest.mark.parametrize("sparsity", [0.15, 0.35, 0.65])
def test_share_of_zeros_is_exact_and_grows(family: str, method: str, sparsity: float) -> None:
    def prune(model: torch.nn.Module, share: float) -> torch.nn.Module:
        if method == "wanda":
            return masks.wanda(model, text(5), share)
        return masks.magnitude(model, share)

    def zeros(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {name: weight == 0 for name, weight in weights(model).items()}

    model = prune(dense_model(family, False), sparsity)
    first = zeros(model)
    total = sum(z.numel() for z in first.values())
    assert abs(sum(int(z.sum()) for z in first.values()) / total - sparsity) < 1e-3
    second = prune(model, 0.8)  # a later round
    assert abs(sum(int(z.sum()) for z in zeros(second).values()) / total - 0.8) < 1e-3
    assert all((zeros(second)[name] | ~z).all() for name, z in first.items() if method == "magnitude")
    with pytest.raises(ConfigError, match=r"ask for a share above 0\.8"):
        prune(second, 0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_model_is_stock_and_remembers_its_mask(family: str, tmp_path: Path) -> None:
    source = dense_directory(tmp_path / "dense", family, True)
    model = marked(masks.magnitude(loading.load(source, dtype="bfloat16"), 0.5))
    saving.save(model, source, tmp_path / "out", "card")
    loaded = loading.load(tmp_path / "out")
    assert type(loaded) is type(dense_model(family, True)) and loaded.config.sparsekd_mask == "magnitude"
    assert all(torch.equal(w == 0, weights(model)[name] == 0) for name, w in weights(loaded).items())
    assert model.dtype == torch.bfloat16


def test_bad_values_are_named() -> None:
    model = dense_model("phi3", True)
    model.model.embed_tokens.weight.data[int(text()[0, 0])] = torch.inf
    with pytest.raises(ModelError, match=r"the input of model\.layers\.0\.mlp\.gate_up_proj holds NaN"):
        masks.wanda(model, text(), 0.5)
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.down_proj\.weight holds NaN"):
        masks.magnitude(model, 0.5)


# zeros through training


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("held", [True, False])
def test_zeros_stay_through_adamw_only_if_held(family: str, dtype: torch.dtype, held: bool) -> None:
    model = marked(masks.wanda(dense_model(family, True).to(dtype), text(4), 0.5)).train()
    before = {name: weight.detach().clone() for name, weight in weights(model).items()}
    zeros = held_zeros.freeze_zeros(model) if held else {name: weight == 0 for name, weight in before.items()}
    assert {name: int(z.sum()) for name, z in zeros.items()} == {
        n: int((w == 0).sum()) for n, w in before.items()
    }
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(4):
        model(input_ids=text(), labels=text()).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    violations = held_zeros.changed_zeros(model, zeros)
    if not held:
        assert set(violations) == set(zeros)
        return
    assert violations == {}
    for name, weight in weights(model).items():
        assert (weight[zeros[name]] == 0).all() and not optimiser.state[weight]["exp_avg"][zeros[name]].any()
        assert (weight != before[name])[~zeros[name]].float().mean() > 0.9


def test_violations_name_the_matrix_and_hold_needs_a_mask() -> None:
    model = marked(masks.magnitude(dense_model("qwen3", True), 0.5))
    zeros = held_zeros.freeze_zeros(model)
    name = "model.layers.1.mlp.up_proj"
    weights(model)[name].data[zeros[name]] = 1.0
    assert held_zeros.changed_zeros(model, zeros) == {name: int(zeros[name].sum())}
    assert held_zeros.freeze_zeros(dense_model("qwen3", True)) == {}


def test_a_gradient_that_is_not_finite_does_not_reach_a_zero() -> None:
    model = marked(masks.magnitude(dense_model("phi3", True), 0.5))
    zeros = held_zeros.freeze_zeros(model)
    (sum(weight.sum() for weight in weights(model).values()) * torch.inf).backward()
    assert all((weight.grad[zeros[name]] == 0).all() for name, weight in weights(model).items())
