"""The modelling code that travels with exported weights: the function of its products, and strict."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint import FAMILIES, dense_model, tiny_config

from sparsekd_ray.model import checkpoint, low_rank
from sparsekd_ray.prune.svd import truncated_factors

torch.set_num_threads(1)

IDS = torch.arange(24).view(2, 12)


def student_of(family: str, tied: bool, rank: int = 6) -> tuple[Any, Any]:
    """A sparse model and the stock model whose MLP matrices are its products. The first layer stays dense."""
    dense = dense_model(family, tied)
    state, ranks = dict(dense.state_dict()), {}
    for name in checkpoint.shapes_from_config(dense):
        if ".layers.0." not in name:
            B, A = truncated_factors(state.pop(f"{name}.weight"), rank)
            state |= {f"{name}.A.weight": A, f"{name}.B.weight": B}
            dense.get_submodule(name).weight.data = B @ A
            ranks[name] = rank
    return checkpoint.rebuild(dense, ranks, state), dense


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_logits_and_gradients_are_those_of_the_product(family: str, tied: bool) -> None:
    sparse, product = student_of(family, tied)
    assert sparse.num_parameters() < product.num_parameters()
    assert (sparse.lm_head.weight is sparse.model.embed_tokens.weight) == tied
    name = "model.layers.2.mlp.down_proj"
    for model in (sparse, product):
        model(IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(sparse(IDS).logits, product(IDS).logits, atol=1e-5, rtol=1e-5)
    layer, grad_mn = sparse.get_submodule(name), product.get_submodule(name).weight.grad
    torch.testing.assert_close(layer.B.weight.grad, grad_mn @ layer.A.weight.T, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(layer.A.weight.grad, layer.B.weight.T @ grad_mn, atol=1e-6, rtol=1e-4)


def test_names_and_shapes_in_the_state() -> None:
    fused, separate = (student_of(family, True)[0].state_dict() for family in FAMILIES)
    layer = "model.layers.1.mlp."
    assert fused[f"{layer}gate_up_proj.A.weight"].shape == (6, 32)
    assert fused[f"{layer}gate_up_proj.B.weight"].shape == (90, 6)
    assert (
        separate[f"{layer}gate_proj.B.weight"].shape == separate[f"{layer}up_proj.B.weight"].shape == (45, 6)
    )
    assert separate[f"{layer}down_proj.A.weight"].shape == (6, 45)
    assert fused["model.layers.0.mlp.down_proj.weight"].shape == (32, 45)
    assert not [name for name in (*fused, *separate) if ".mlp." in name and "bias" in name]


@pytest.mark.parametrize("family", FAMILIES)
def test_cache_and_keyword_arguments_reach_the_stock_code(family: str) -> None:
    sparse, _ = student_of(family, True)
    kwargs = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert torch.equal(sparse.generate(IDS, **kwargs), sparse.generate(IDS, use_cache=False, **kwargs))
    out = sparse(IDS, output_hidden_states=True, logits_to_keep=1)
    assert len(out.hidden_states) == 4 and out.logits.shape == (2, 1, 97)
    hidden = sparse.base_model(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(hidden @ sparse.lm_head.weight.T, sparse(IDS).logits)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_nothing(family: str) -> None:
    gradients = []
    for recompute in (False, True):
        sparse, _ = student_of(family, True)
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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_directory_round_trip_without_our_loader(family: str, tied: bool, tmp_path: Path) -> None:
    sparse, _ = student_of(family, tied)
    sparse.save_pretrained(tmp_path)
    loaded, info = type(sparse).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(loaded(IDS).logits, sparse(IDS).logits)
    assert loaded.config.mlp_ranks == sparse.config.mlp_ranks


def test_missing_left_over_and_misshapen_weights_are_refused() -> None:
    sparse, _ = student_of("phi3", True)
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
        load(state_dict={**state, name: torch.zeros(5, 45)}, ignore_mismatched_sizes=True)
    with pytest.raises(RuntimeError):
        load(state_dict={**state, name: torch.zeros(5, 45)})


def test_a_head_that_is_tied_in_name_only_is_refused() -> None:
    sparse, _ = student_of("phi3", True)
    state = {**sparse.state_dict(), "lm_head.weight": sparse.lm_head.weight.detach() + 1}
    with pytest.raises(ValueError, match="num_parameters_expected"):
        type(sparse).from_pretrained(None, config=sparse.config, state_dict=state)


@pytest.mark.parametrize("expected", [None, 1])
def test_building_without_the_right_count_is_refused(expected: int | None) -> None:
    values = tiny_config("qwen3", True).to_dict()
    config = low_rank.SparseQwen3Config(**values | {"num_parameters_expected": expected})
    with pytest.raises(ValueError, match=f"num_parameters_expected is {expected}"):
        low_rank.SparseQwen3ForCausalLM(config)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"model.layers.9.mlp.down_proj": 3}, "no MLP matrix"),
        ({"model.layers.0.self_attn.o_proj": 3}, "no MLP matrix"),
        ({"model.layers.0.mlp.down_proj": 0}, "rank 0"),
        ({"model.layers.0.mlp.down_proj": 19}, "no smaller than the dense matrix"),  # 19 · 77 > 32 · 45
    ],
)
def test_ranks_that_make_no_sense_are_refused(ranks: dict[str, int], message: str) -> None:
    config = low_rank.SparsePhi3Config(**tiny_config("phi3", True).to_dict(), mlp_ranks=ranks)
    with pytest.raises(ValueError, match=message):
        low_rank.SparsePhi3ForCausalLM(config)
