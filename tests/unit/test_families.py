"""Every family and every form of a smaller model of it: counted, pruned, saved, and read by the stock classes."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lines import recorded
from models import Form, dense_directory, dense_model, logits, student_of

from sparsekd_ray.errors import ModelError
from sparsekd_ray.model import families, loading, mlp, probe, saving, spec

MORE = {  # what a family's tiny config needs beside the sizes
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "mistral": {"sliding_window": 4},
}
TYPES = list(families.FAMILIES)
FORMS = {"factors": {}, "gauge": {"gauge": True}, "bias": {"bias": True}, "joint": {"joint": True}}


def tiny_directory(path: Path, family: str, tied: bool = True, **more: Any) -> Path:
    return dense_directory(path, family, tied, **MORE.get(family, {}), **more)


@pytest.mark.parametrize("family", TYPES)
@pytest.mark.parametrize("tied", [True, False])
def test_an_entry_says_what_the_stock_class_says(family: str, tied: bool, tmp_path: Path) -> None:
    path = tiny_directory(tmp_path, family, tied)
    stock = transformers.AutoModelForCausalLM.from_pretrained(path)
    shapes = probe.structure(stock)
    assert list(spec.shapes_from_config(path).items()) == list(shapes.items())
    assert spec.total_parameters(path) == stock.num_parameters()
    assert families.FAMILIES[family].fused == any("gate_up_proj" in name for name in shapes)
    torch.testing.assert_close(logits(loading.load(path)), logits(stock))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", TYPES)
def test_low_rank_students_of_every_family_reload(family: str, form: str, tmp_path: Path) -> None:
    if form == "joint" and families.FAMILIES[family].fused:
        pytest.skip("gate and up are one in the stock model")
    source = tiny_directory(tmp_path / "dense", family)
    student, product = student_of(Form(family, **FORMS[form]), **MORE.get(family, {}))
    saving.save(student, source, tmp_path / "student", "card")
    again = loading.load(tmp_path / "student")
    torch.testing.assert_close(logits(again), logits(product), atol=1e-5, rtol=1e-5)
    assert again.config.model_type == f"sparsekd_{family}"
    if not student.config.sparsekd_bias:
        merged = loading.merge(student)
        assert type(merged) is type(product)
        torch.testing.assert_close(logits(merged), logits(product), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["narrower", "shallower", "masked"])
@pytest.mark.parametrize("family", TYPES)
def test_stock_students_of_every_family_reload(family: str, kind: str, tmp_path: Path) -> None:
    source = tiny_directory(tmp_path / "dense", family)
    model = loading.load(source)
    if kind == "narrower":
        mlps = [mlp.mlp_of(model, layer) for layer in range(3)]
        cut = mlp.with_width(model, [mlp.MLP(g[:30], u[:30], d[:, :30]) for g, u, d in mlps])
        for layer in range(3):  # zeros are as good as absent neurons
            _, up, _ = mlp.mlp_of(model, layer)
            up[30:] = 0
        expected = logits(model)
    elif kind == "shallower":
        cut = mlp.without_layers(model, [1])
        expected = skipping(model, 1)
    else:
        cut = mlp.with_width(model, [mlp.mlp_of(model, layer) for layer in range(3)])
        cut.get_submodule("model.layers.0.mlp.down_proj").weight.data[:, ::2] = 0
        cut.config.sparsekd_mask = "wanda"
        expected = logits(cut)
    saving.save(cut, source, tmp_path / "student", "card")
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    torch.testing.assert_close(logits(stock), expected, atol=1e-5, rtol=1e-5)


def skipping(model: Any, layer: int) -> torch.Tensor:
    """Logits of the model when one layer gives what it takes."""
    skipped = model.get_submodule(f"model.layers.{layer}")
    handle = skipped.register_forward_hook(
        lambda _, args, kwargs, output: args[0] if args else kwargs["hidden_states"], with_kwargs=True
    )
    found = logits(model)
    handle.remove()
    return found


# what a family without an entry shows, and what is refused


def test_a_family_without_an_entry_is_derived_from_its_stock_class(tmp_path: Path) -> None:
    assert "glm" not in families.FAMILIES
    more = {"head_dim": 8, "intermediate_size": 48}
    source = dense_directory(tmp_path / "dense", "glm", True, **more)
    assert spec.shapes_from_config(source)["model.layers.2.mlp.gate_up_proj"] == (96, 32)
    student, product = student_of(Form("glm", gauge=True), **more)
    saving.save(student, source, tmp_path / "student", "card")
    torch.testing.assert_close(
        logits(loading.load(tmp_path / "student")), logits(product), atol=1e-5, rtol=1e-5
    )


REFUSED = {
    "granite": ({"logits_scaling": 8.0}, "probe “the logits equal the head times the final hidden state”"),
    "granite ": ({"embedding_multiplier": 2.0}, "probe “the first layer's input equals the embedding”"),
    "gemma2": ({"head_dim": 8}, "probe “the logits equal the head times the final hidden state”"),
    "cohere": ({}, "probe “the logits equal the head times the final hidden state”"),
    "starcoder2": ({}, "probe “structure”: layer 0 has an `mlp` of c_fc: Linear, c_proj: Linear"),
    "nemotron": ({"head_dim": 8}, "probe “structure”: layer 0 has an `mlp` of up_proj: Linear, down_proj"),
    "gpt2": ({}, "probe “structure”: it has no model.embed_tokens"),
    "bert": ({"is_decoder": True}, "BertLMHeadModel fails the probe “structure”"),
    "qwen3_moe": ({}, "mixture of experts (num_experts"),
    "llama": ({"mlp_bias": True}, "biased MLP (mlp_bias)"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_nearly_fits_is_refused_by_the_probe_that_failed(family: str, tmp_path: Path) -> None:
    more, words = REFUSED[family]
    dense_directory(tmp_path, family.strip(), True, **more)
    with pytest.raises(ModelError, match=re.escape(words)):
        loading.load(tmp_path)


@pytest.mark.parametrize("model_type", ["clip_vision_model", "t5", "no_such_type"])
def test_what_is_no_causal_language_model_is_refused_by_name(model_type: str) -> None:
    with pytest.raises(ModelError, match=f"no causal language model of model_type '{model_type}'"):
        spec.check_supported({"model_type": model_type})


def test_a_probe_sees_what_the_model_computes_and_not_only_what_it_is_called() -> None:
    model = dense_model("llama", True)
    probe.numbers(model)
    layer = model.get_submodule("model.layers.0.mlp")
    layer.register_forward_hook(lambda _, args, output: output * 1.1)
    with pytest.raises(ModelError, match=re.escape("probe “the MLP equals down(act(gate x) · up x)”")):
        probe.numbers(model)


@pytest.mark.parametrize("family", [*families.FAMILIES, "glm"])
def test_a_small_model_of_a_large_config_passes_the_probes(family: str) -> None:
    config = dense_model(family, True, num_hidden_layers=7, head_dim=8, intermediate_size=48).config
    values = config.to_dict() | {
        "vocab_size": 50_000,
        "intermediate_size": 9_999,
        "pad_token_id": 40_000,
        "eos_token_id": [40_001],
    }
    with recorded() as lines:
        probe.small_numbers(values)
    assert lines == [], "the stock class takes small sizes"
    small = probe.shrunken(values)
    assert (small["num_hidden_layers"], small["vocab_size"], small["hidden_size"]) == (2, 128, 32)


def test_lists_of_token_ids_are_not_cut_with_the_layers() -> None:
    model = dense_model("llama", True, eos_token_id=[2, 3, 4])
    assert mlp.without_layers(model, [1]).config.eos_token_id == [2, 3, 4]
