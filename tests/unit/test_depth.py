"""Choice of layers against enumeration, and models without layers."""

import math

import pytest
import torch
from models import FAMILIES, dense_directory, dense_model, logits

from sparsekd_ray.errors import ConfigError, ModelError
from sparsekd_ray.model import loading, saving, spec
from sparsekd_ray.model.mlp import layer_count, without_layers
from sparsekd_ray.prune import depth

torch.set_num_threads(1)


# choices


@pytest.mark.parametrize("layers", [2, 3, 7])
def test_block_turns_least_of_all_blocks(layers: int) -> None:
    generator = torch.Generator().manual_seed(layers)
    for _ in range(10):
        angle_SS = torch.rand(layers + 1, layers + 1, generator=generator)
        for removed in range(1, layers):
            chosen = depth.block(angle_SS, removed)
            assert chosen == list(range(chosen[0], chosen[0] + removed)) and chosen[-1] < layers
            distances = [float(angle_SS[first, first + removed]) for first in range(layers - removed + 1)]
            assert chosen[0] == distances.index(min(distances))


def test_influence_takes_the_lowest_and_the_first_of_equal_ones() -> None:
    influence_L = torch.tensor([0.9, 0.1, 0.3, 0.1, 0.1])
    assert depth.influence(influence_L, 2) == [1, 3]
    assert depth.influence(influence_L, 4) == [1, 2, 3, 4]
    assert depth.block(torch.ones(5, 5), 2) == [0, 1]


@pytest.mark.parametrize(
    ("layers", "sparsity", "expected"),
    [(32, 0.15, 5), (28, 0.35, 10), (4, 0.15, 1), (4, 0.125, 1), (4, 0.87, 3)],
)
def test_count_is_the_nearest(layers: int, sparsity: float, expected: int) -> None:
    assert depth.count(layers, sparsity) == expected


@pytest.mark.parametrize(
    ("layers", "sparsity", "said"),
    [
        (4, 0.1, r"0 of 4 layers.*from 0\.2500 to 0\.7500 in steps of 0\.2500"),
        (4, 0.9, r"4 of 4 layers.*from 0\.2500"),
        (1, 0.5, "cannot lose any"),
    ],
)
def test_count_refuses_none_and_all(layers: int, sparsity: float, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        depth.count(layers, sparsity)


def test_choices_refuse_bad_input() -> None:
    with pytest.raises(ModelError, match="angle_SS holds NaN"):
        depth.block(torch.full((4, 4), math.nan), 1)
    with pytest.raises(ModelError, match="influence_L holds NaN"):
        depth.influence(torch.tensor([1.0, math.inf]), 1)
    for removed in (0, 3):
        with pytest.raises(ValueError, match="allowed: 1 to 2"):
            depth.influence(torch.rand(3), removed)


# models without layers

KINDS = {
    "phi3": {},
    "phi3-sliding": {"sliding_window": 6},
    "qwen3": {},
    "qwen3-sliding": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropped", [[1], [3, 0], [2, 3, 1]])
def test_dropping_layers_is_skipping_them(kind: str, dropped: list[int]) -> None:
    model = dense_model(kind.partition("-")[0], True, num_hidden_layers=4, **KINDS[kind])
    expected_types = [
        t for i, t in enumerate(getattr(model.config, "layer_types", None) or []) if i not in dropped
    ]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shorter = without_layers(model, dropped)
    assert type(shorter) is type(model) and layer_count(shorter) == 4 - len(dropped)
    assert [layer.self_attn.layer_idx for layer in shorter.model.layers] == list(range(layer_count(shorter)))
    assert list(getattr(shorter.config, "layer_types", None) or []) == expected_types
    assert shorter.num_parameters() == spec.total_parameters(shorter)

    def skip(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return inputs[0]

    hooks = [model.model.layers[layer].register_forward_hook(skip) for layer in dropped]
    assert torch.equal(logits(shorter), logits(model))
    for hook in hooks:
        hook.remove()
    assert layer_count(model) == 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_cache_of_a_shorter_model_works(kind: str) -> None:
    model = dense_model(kind.partition("-")[0], False, num_hidden_layers=4, **KINDS[kind])
    shorter = without_layers(model, [1, 2])
    ids = torch.arange(5, 14)[None]
    asked = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    with_cache = shorter.generate(ids, use_cache=True, **asked)
    assert torch.equal(with_cache, shorter.generate(ids, use_cache=False, **asked))


def test_window_threshold_follows_the_layers_below_it() -> None:
    model = dense_model("qwen3", True, num_hidden_layers=4, **KINDS["qwen3-sliding"])
    shorter = without_layers(model, [0])
    assert shorter.config.max_window_layers == 1
    assert shorter.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shorter_model_keeps_type_and_settings_and_saves(family: str, dtype: torch.dtype, tmp_path) -> None:  # type: ignore[no-untyped-def]
    source = dense_directory(tmp_path / "dense", family, True)
    model = loading.load(source, dtype=dtype)
    model.generation_config.max_new_tokens = 7
    shorter = without_layers(model, {2})
    assert shorter.dtype == dtype and shorter.generation_config.max_new_tokens == 7
    assert shorter.lm_head.weight is shorter.model.embed_tokens.weight
    shorter.model.embed_tokens.weight.data.zero_()
    assert model.model.embed_tokens.weight.any()  # nothing is shared
    saving.save(without_layers(model, {2}), source, tmp_path / "out", "card")


def test_impossible_drops_are_refused() -> None:
    model = dense_model("phi3", True)
    for dropped in ([0, 1, 2], [3], [-1]):
        with pytest.raises(ValueError, match="cannot drop"):
            without_layers(model, dropped)
