"""The modelling code that travels with exported weights: the function of its products, and strict."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, FORMS, STEMS, Form, student_of, tiny_config

from sparsekd_ray.model import loading, low_rank

torch.set_num_threads(1)

IDS = torch.arange(24).view(2, 12)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_logits_and_gradients_are_those_of_the_product(form: Form, tied: bool) -> None:
    sparse, product = student_of(form, tied)
    assert (sparse.lm_head.weight is sparse.model.embed_tokens.weight) == tied
    for model in (sparse, product):
        model(IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(sparse(IDS).logits, product(IDS).logits, atol=1e-5, rtol=1e-5)
    name = "model.layers.2.mlp.down_proj"
    layer, grad_mn = sparse.get_submodule(name), product.get_submodule(name).weight.grad
    if form.gauge:  # W = [U, U C] in the order of the inputs
        r, grad_mn = layer.rank, grad_mn[:, layer.order]
        U, C = layer.U.weight, layer.C.weight
        expected = {U: grad_mn[:, :r] + grad_mn[:, r:] @ C.T, C: U.T @ grad_mn[:, r:]}
    else:
        A, B = layer.A.weight, layer.B.weight
        expected = {B: grad_mn @ A.T, A: B.T @ grad_mn}
    if form.bias:
        expected[layer.bias] = product.get_submodule(name).bias.grad
    for parameter, grad in expected.items():
        torch.testing.assert_close(parameter.grad, grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("m", "n", "rank"), [(7, 13, 1), (13, 7, 6), (9, 9, 4), (2, 130, 1), (65, 3, 2)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [low_rank.LowRankLinear, low_rank.GaugeLinear])
def test_a_layer_is_the_matrix_that_its_tensors_stand_for(
    kind: type[torch.nn.Module], bias: bool, m: int, n: int, rank: int
) -> None:
    torch.manual_seed(m * n)
    layer = kind(n, m, rank, bias=bias).double()  # type: ignore[call-arg]
    if bias:
        layer.bias.data.normal_()
    if isinstance(layer, low_rank.GaugeLinear):
        identity = torch.cat([layer.U.weight, layer.U.weight @ layer.C.weight], 1)
        torch.testing.assert_close(low_rank.product(layer.state_dict()), identity)  # the order of a new layer
        layer.order.copy_(torch.randperm(n))
    W_mn, x_3n = low_rank.product(layer.state_dict()), torch.randn(3, n, dtype=torch.float64)
    assert W_mn.shape == (m, n) and torch.linalg.matrix_rank(W_mn) == rank
    torch.testing.assert_close(layer(x_3n), x_3n @ W_mn.T + (layer.bias if bias else 0))
    gauge = kind is low_rank.GaugeLinear
    parameters = rank * (m + n - (rank if gauge else 0)) + (m if bias else 0)
    assert low_rank.count_parameters(layer) == parameters


def test_the_order_of_the_inputs_is_whole_numbers_whatever_the_type_of_the_weights(tmp_path: Path) -> None:
    sparse, _ = student_of(Form("phi3", gauge=True))
    order = sparse.get_submodule("model.layers.1.mlp.down_proj").order.clone()
    assert not torch.equal(order, torch.arange(45))
    sparse.bfloat16().to(torch.float16).half().to("cpu", torch.bfloat16).save_pretrained(tmp_path)
    loaded = type(sparse).from_pretrained(tmp_path, dtype=torch.bfloat16)
    rebuilt = loading.rebuild(loaded, loaded.config.sparsekd_ranks, loaded.state_dict())
    for model in (sparse, loaded, rebuilt):
        found = model.get_submodule("model.layers.1.mlp.down_proj").order
        assert found.dtype == torch.int64 and torch.equal(found, order)
        assert model.get_submodule("model.layers.1.mlp.down_proj").U.weight.dtype == torch.bfloat16


def test_names_and_shapes_in_the_state() -> None:
    def shapes(form: Form) -> dict[str, tuple[int, ...]]:
        state = student_of(form, rank=6)[0].state_dict()
        prefix = "model.layers.2.mlp."
        return {k.removeprefix(prefix): tuple(t.shape) for k, t in state.items() if k.startswith(prefix)}

    down = {"down_proj.A.weight": (6, 45), "down_proj.B.weight": (32, 6)}
    fused = {"gate_up_proj.A.weight": (6, 32), "gate_up_proj.B.weight": (90, 6)}
    separate = {
        f"{name}_proj.{key}.weight": shape
        for name in ("gate", "up")
        for key, shape in (("A", (6, 32)), ("B", (45, 6)))
    }
    assert shapes(Form("phi3")) == shapes(Form("qwen3", joint=True)) == fused | down
    assert shapes(Form("qwen3")) == separate | down
    assert shapes(Form("phi3", gauge=True, bias=True)) == {
        "gate_up_proj.U.weight": (90, 6), "gate_up_proj.C.weight": (6, 26), "gate_up_proj.order": (32,),
        "gate_up_proj.bias": (90,),
        "down_proj.U.weight": (32, 6), "down_proj.C.weight": (6, 39), "down_proj.order": (45,),
        "down_proj.bias": (32,),
    }  # fmt: skip
    assert student_of(Form("phi3"))[0].state_dict()["model.layers.0.mlp.down_proj.weight"].shape == (32, 45)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_cache_and_keyword_arguments_reach_the_stock_code(form: Form) -> None:
    sparse, _ = student_of(form)
    kwargs = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert torch.equal(sparse.generate(IDS, **kwargs), sparse.generate(IDS, use_cache=False, **kwargs))
    out = sparse(IDS, output_hidden_states=True, logits_to_keep=1)
    assert len(out.hidden_states) == 4 and out.logits.shape == (2, 1, 97)
    hidden = sparse.base_model(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(hidden @ sparse.lm_head.weight.T, sparse(IDS).logits)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradient_checkpointing_changes_nothing(form: Form) -> None:
    gradients = []
    torch.manual_seed(1)
    state = student_of(form)[0].state_dict()
    for recompute in (False, True):
        sparse, _ = student_of(form)
        sparse.load_state_dict(state)
        sparse.train()
        if recompute:
            sparse.gradient_checkpointing_enable()
        calls = []
        low_rank_layer = next(sparse.model.layers[1].mlp.children())
        low_rank_layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        sparse(IDS, labels=IDS, use_cache=False).loss.backward()
        assert len(calls) == 1 + recompute
        gradients.append({name: p.grad for name, p in sparse.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_directory_round_trip_without_our_loader(form: Form, tied: bool, tmp_path: Path) -> None:
    sparse, _ = student_of(form, tied)
    sparse.save_pretrained(tmp_path)
    loaded, info = type(sparse).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(loaded(IDS).logits, sparse(IDS).logits)
    assert loaded.config.sparsekd_ranks == sparse.config.sparsekd_ranks


def test_missing_left_over_and_misshapen_weights_are_refused() -> None:
    sparse, _ = student_of(Form("phi3"))
    state = {name: tensor for name, tensor in sparse.state_dict().items() if name != "lm_head.weight"}
    name = "model.layers.1.mlp.down_proj.A.weight"

    def load(**changes: Any) -> Any:
        return type(sparse).from_pretrained(None, config=sparse.config, **changes)

    load(state_dict=state)
    with pytest.raises(ValueError, match=rf"missing_keys.*{name}"):
        load(state_dict={k: v for k, v in state.items() if k != name})
    with pytest.raises(ValueError, match=r"unexpected_keys.*stray"):
        load(state_dict={**state, "model.stray": torch.zeros(1)})
    with pytest.raises(ValueError, match=rf"mismatched_keys.*{name}"):
        load(state_dict={**state, name: torch.zeros(4, 45)}, ignore_mismatched_sizes=True)
    with pytest.raises(RuntimeError):
        load(state_dict={**state, name: torch.zeros(4, 45)})


def test_a_head_that_is_tied_in_name_only_is_refused() -> None:
    sparse, _ = student_of(Form("phi3"))
    state = {**sparse.state_dict(), "lm_head.weight": sparse.lm_head.weight.detach() + 1}
    with pytest.raises(ValueError, match="sparsekd_parameters"):
        type(sparse).from_pretrained(None, config=sparse.config, state_dict=state)


@pytest.mark.parametrize("expected", [None, 1])
def test_building_without_the_right_count_is_refused(expected: int | None) -> None:
    values = tiny_config("qwen3", True).to_dict()
    config = low_rank.LowRankQwen3Config(**values | {"sparsekd_parameters": expected})
    with pytest.raises(ValueError, match=f"sparsekd_parameters is {expected}"):
        low_rank.LowRankQwen3ForCausalLM(config)


@pytest.mark.parametrize(
    ("ranks", "storage", "message"),
    [
        ({"model.layers.9.mlp.down_proj": 3}, "factors", "no MLP matrix"),
        ({"model.layers.0.self_attn.o_proj": 3}, "factors", "no MLP matrix"),
        (
            {"model.layers.0.mlp.gate_proj": 3, "model.layers.0.mlp.gate_up_proj": 3},
            "factors",
            "no MLP matrix",
        ),
        ({"model.layers.0.mlp.down_proj": 0}, "factors", "rank 0"),
        (
            {"model.layers.0.mlp.down_proj": 19},
            "factors",
            "no smaller than the dense matrix",
        ),  # 19 · 77 > 32 · 45
        ({"model.layers.0.mlp.down_proj": 32}, "gauge", "no smaller than the dense matrix"),
        ({}, "pivoted", "'pivoted'; allowed: factors, gauge"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_makes_no_sense_is_refused(family: str, ranks: Any, storage: str, message: str) -> None:
    config, model = (getattr(low_rank, f"LowRank{STEMS[family]}{kind}") for kind in ("Config", "ForCausalLM"))
    with pytest.raises(ValueError, match=message):
        model(config(**tiny_config(family, True).to_dict(), sparsekd_ranks=ranks, sparsekd_storage=storage))


def test_gauge_storage_has_no_break_even() -> None:
    sparse, product = student_of(Form("phi3", gauge=True), rank=31)
    assert sparse.num_parameters() < product.num_parameters()
    torch.testing.assert_close(sparse(IDS).logits, product(IDS).logits, atol=1e-4, rtol=1e-4)
