"""Model directories: support, counts, matrices, loading and saving."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import (
    FAMILIES,
    FORMS,
    Form,
    dense_directory,
    dense_model,
    logits,
    low_rank_tensors,
    mlp_bias,
    sparse_directory,
    student_of,
)

from sparsekd_ray.errors import ModelError
from sparsekd_ray.model import loading, saving, spec, weights

torch.set_num_threads(1)

# what a config says


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_counts_from_the_config_are_those_of_the_model(family: str, tied: bool, tmp_path: Path) -> None:
    model = dense_model(family, tied)
    shapes = {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if ".mlp." in name and isinstance(module, torch.nn.Linear)
    }
    assert spec.shapes_from_config(model.config) == shapes == spec.shapes_from_config(model)
    assert list(spec.shapes_from_config(model.config)) == list(shapes)
    assert spec.total_parameters(model.config) == model.num_parameters() == loading.count_parameters(model)
    assert spec.mlp_parameters(model) == sum(m * n for m, n in shapes.values())


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_counts_of_low_rank_models_follow_from_the_config_too(form: Form, tied: bool) -> None:
    sparse, _ = student_of(form, tied)
    values = json.loads(sparse.config.to_json_string())
    held = {
        name.rpartition(".mlp.")[0] + ".mlp." + name.split(".")[4]
        for name in sparse.state_dict()
        if ".mlp." in name
    }
    shapes = spec.shapes_from_config(values)
    assert set(shapes) == held and list(shapes) == list(spec.shapes_from_config(sparse))
    assert shapes == {name: tuple(loading.mlp_matrix(sparse, name).shape) for name in shapes}
    assert spec.total_parameters(values) == sparse.num_parameters()
    mlp = sum(p.numel() for name, p in sparse.named_parameters() if ".mlp." in name)
    assert spec.mlp_parameters(sparse) == mlp < spec.mlp_parameters(dense_model(form.family, tied))
    assert spec.mlp_storage(values) == spec.mlp_storage(sparse) == (form.gauge, form.bias)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_matrices_and_biases_are_found_by_every_name(form: Form) -> None:
    sparse, product = student_of(form)
    for name, module in product.named_modules():
        if ".mlp." in name and isinstance(module, torch.nn.Linear):
            torch.testing.assert_close(loading.mlp_matrix(sparse, name).float(), module.weight.data)
            bias = mlp_bias(sparse, name)
            if not form.bias:
                assert bias is None
            else:
                torch.testing.assert_close(
                    bias, torch.zeros_like(bias) if module.bias is None else module.bias.data.double()
                )
    for layer in range(3):
        prefix = f"model.layers.{layer}.mlp."
        whole_mn, *halves = (
            loading.mlp_matrix(sparse, prefix + n) for n in ("gate_up_proj", "gate_proj", "up_proj")
        )
        assert whole_mn.dtype == torch.float64 and torch.equal(whole_mn, torch.cat(halves))
    for name in ("model.layers.3.mlp.down_proj", "model.layers.0.mlp.act_fn", "model.norm", "down_proj"):
        with pytest.raises(ModelError, match=f"no MLP matrix '{name}'; it has model.layers.0.mlp.gate_"):
            loading.mlp_matrix(sparse, name)


def test_counts_of_published_models() -> None:
    """Sizes of Phi-4-mini and Qwen3-0.6B, against the counts published for them."""
    phi = {"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32}
    phi |= {
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "vocab_size": 200064,
        "tie_word_embeddings": True,
    }
    assert spec.total_parameters(phi) == 3_836_021_760
    assert spec.mlp_parameters(phi) == 2_415_919_104
    qwen = {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
    qwen |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
    assert spec.total_parameters(qwen | {"tie_word_embeddings": True}) == 596_049_920
    assert spec.mlp_parameters(qwen) == 264_241_152


def test_attention_biases_and_head_sizes_are_counted() -> None:
    model = dense_model("qwen3", False, attention_bias=True, head_dim=12)
    assert spec.total_parameters(model) == model.num_parameters()


def test_planning_needs_neither_torch_nor_transformers() -> None:
    code = "import sys; from sparsekd_ray.model import loading; from sparsekd_ray.prune import allocate;"
    code += "assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"model_type": "qwen3_moe", "num_experts": 128}, "mixture of experts (num_experts)"),
        ({"model_type": "phi3", "quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "phi3", "mlp_bias": True}, "biased MLP (mlp_bias)"),
        ({"model_type": "sparsekd_phi3", "mlp_down_bias": True}, "biased MLP (mlp_down_bias)"),
        ({"model_type": "gemma3", "vision_config": {"a": 1}}, "a vision model (vision_config)"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "an encoder (is_encoder_decoder)"),
        ({}, "no model_type"),
    ],
)
def test_what_is_not_supported_is_named(values: dict[str, Any], found: str) -> None:
    with pytest.raises(ModelError, match=re.escape(found) + ".*supported are .*Phi-3 .phi3., Qwen3 .qwen3."):
        spec.check_supported(values)


def test_supported_families() -> None:
    for family in FAMILIES:
        for model_type in (family, f"sparsekd_{family}"):
            assert spec.check_supported({"model_type": model_type, "mlp_bias": False}) == family
    assert spec.check_supported({"model_type": "sparsekd_qwen3", "sparsekd_bias": True}) == "qwen3"


# loading


def test_a_directory_without_config_or_sizes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no readable config"):
        loading.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "phi3", "hidden_size": "wide"}')
    with pytest.raises(ModelError, match="no whole number for hidden_size, intermediate_size"):
        spec.shapes_from_config(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "missing", "left over", "misshapen", "absent"])
@pytest.mark.parametrize("kind", ["dense", "sparse", "gauge"])
def test_damaged_weights_are_refused(kind: str, damage: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    if kind == "dense":
        path = dense_directory(tmp_path / kind, "phi3", False)
    else:
        path = sparse_directory(tmp_path / kind, "phi3", False, gauge=kind == "gauge")
    file, name = path / "model.safetensors", "model.layers.0.mlp.gate_up_proj.weight"
    if kind == "gauge":
        name = "model.layers.1.mlp.gate_up_proj.order"
    tensors = load_file(file)
    match damage:
        case "cut":
            file.write_bytes(file.read_bytes()[:-1000])
        case "absent":
            file.unlink()
        case "missing":
            del tensors[name]
        case "left over":
            tensors[f"{name.removesuffix('.weight')}.stray"] = torch.zeros(90)
        case "misshapen":
            tensors[name] = torch.zeros(90, 31)
    if damage not in ("cut", "absent"):
        save_file(tensors, file, metadata={"format": "pt"})
    words = {"cut": "does not load", "absent": "holds neither model.safetensors nor"}
    with pytest.raises(ModelError, match=words.get(damage, name.removesuffix(".weight"))):
        loading.load(path)


def test_a_wrong_recorded_count_is_refused(tmp_path: Path) -> None:
    path = sparse_directory(tmp_path / "sparse", "qwen3", True)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"sparsekd_parameters": 12}))
    with pytest.raises(ModelError, match="sparsekd_parameters is 12"):
        loading.load(path)


def test_a_header_cut_short_is_named(tmp_path: Path) -> None:
    for content in (b"", (1 << 60).to_bytes(8, "little") + b'{"a": '):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(ModelError, match=r"model\.safetensors is cut short"):
            weights.tensor_shapes(tmp_path)


# saving


def low_rank_copy(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """The same model with a product of rank 3 in the place of its first MLP matrix."""
    name = next(iter(spec.shapes_from_config(model)))
    tensors = low_rank_tensors(Form("any"), name, loading.mlp_matrix(model, name), 3)
    state = {key: tensor for key, tensor in model.state_dict().items() if key != f"{name}.weight"}
    state |= {key: tensor.to(model.dtype) for key, tensor in tensors.items()}
    return loading.rebuild(model, {name: 3}, state)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_directory_is_complete_and_keeps_generation_settings(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = dense_directory(tmp_path / "dense", family, True)
    generation = json.loads((source / "generation_config.json").read_text()) | {"max_new_tokens": 7}
    (source / "generation_config.json").write_text(json.dumps(generation))
    (source / "config.json").write_text(
        json.dumps(
            json.loads((source / "config.json").read_text()) | {"auto_map": {"AutoConfig": "theirs.Config"}}
        )
    )
    model = loading.load(source, dtype=dtype)
    out = tmp_path / "out"
    student = low_rank_copy(model)
    assert student.dtype == dtype and student.generation_config.max_new_tokens == 7
    saving.save(student, source, out, "the card")
    assert {p.name for p in out.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "README.md", "modeling_sparsekd.py",
        "tokenizer.json", "tokenizer_config.json", "sparsekd_origin.json",
    }  # fmt: skip
    assert (out / "README.md").read_text() == "the card"
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert loading.load(out, dtype="auto").dtype == dtype
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == f"sparsekd_{family}" and str(tmp_path) not in json.dumps(config)
    assert all(reference.startswith("modeling_sparsekd.LowRank") for reference in config["auto_map"].values())
    saving.save(model, source, tmp_path / "stock", "card")
    assert "auto_map" not in json.loads((tmp_path / "stock" / "config.json").read_text())
    assert not (tmp_path / "stock" / "modeling_sparsekd.py").exists()


def test_save_refuses_what_does_not_reload_and_a_missing_tokenizer(tmp_path: Path) -> None:
    source = dense_directory(tmp_path / "dense", "phi3", False)
    model = loading.load(source)
    with pytest.raises(ModelError, match="has no tokenizer"):
        saving.save(model, tmp_path, tmp_path / "out", "card")
    model.model.norm.weight.data[0] = torch.nan  # never equal to itself
    with pytest.raises(ModelError, match=r"did not reload as it was saved: changed model\.norm\.weight"):
        saving.save(model, source, tmp_path / "out", "card")


@pytest.mark.parametrize("form", [form for form in FORMS if not form.bias], ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_merged_model_is_stock_and_the_same_function(form: Form, tied: bool) -> None:
    sparse, product = student_of(form, tied)
    merged = loading.merge(sparse)
    assert type(merged) is type(product) and merged.config.model_type == form.family
    assert not {"sparsekd_ranks", "sparsekd_storage", "sparsekd_bias", "auto_map"} & set(
        merged.config.to_dict()
    )
    assert merged.num_parameters() == product.num_parameters()
    torch.testing.assert_close(logits(merged), logits(sparse), atol=1e-5, rtol=1e-5)
    assert (logits(merged) - logits(dense_model(form.family, tied))).abs().max() > 0.1


def test_biases_have_no_place_in_a_stock_model() -> None:
    with pytest.raises(ModelError, match=r"have biases \(sparsekd_bias\), and those of the stock"):
        loading.merge(student_of(Form("qwen3", bias=True))[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rebuilt_model_takes_all_its_tensors_and_no_others(family: str) -> None:
    dense = dense_model(family, True)
    state = dict(dense.state_dict())
    name = "model.layers.1.mlp.down_proj.weight"
    for wrong in (
        {key: tensor for key, tensor in state.items() if key != name},
        {**state, "stray": state[name]},
    ):
        with pytest.raises(ModelError, match="rebuilt model does not hold the weights of its config"):
            loading.rebuild(dense, None, wrong)
    with pytest.raises(ModelError, match=r"no smaller than the dense matrix"):
        loading.rebuild(dense, {name.removesuffix(".weight"): 32}, state)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_rebuilt_model_keeps_its_form_unless_told(form: Form) -> None:
    sparse, _ = student_of(form)
    again = loading.rebuild(sparse, spec.mlp_ranks(sparse), sparse.state_dict())
    assert spec.mlp_storage(again) == (form.gauge, form.bias) and torch.equal(logits(again), logits(sparse))
    with pytest.raises(ModelError, match="rebuilt model does not"):
        loading.rebuild(sparse, spec.mlp_ranks(sparse), sparse.state_dict(), gauge=not form.gauge)


def test_what_else_a_config_says_survives(tmp_path: Path) -> None:
    source = dense_directory(tmp_path / "dense", "qwen3", True)
    model = loading.load(source)
    model.config.sparsekd_mask = "wanda"
    saving.save(model, source, tmp_path / "masked", "card")
    again = loading.load(tmp_path / "masked")
    assert again.config.sparsekd_mask == spec.config_dict(tmp_path / "masked")["sparsekd_mask"] == "wanda"
    assert loading.rebuild(again, None, again.state_dict()).config.sparsekd_mask == "wanda"
    assert low_rank_copy(again).config.sparsekd_mask == "wanda"


def test_long_rope_survives_conversion(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 3.0, 4.0]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75, **factors}
    source = dense_directory(
        tmp_path / "dense", "phi3", True, rope_parameters=rope, original_max_position_embeddings=32
    )
    model = loading.load(source)
    saving.save(loading.rebuild(model, {}, model.state_dict()), source, tmp_path / "out", "card")
    unchanged = loading.load(tmp_path / "out")
    assert unchanged.config.rope_parameters.items() >= model.config.rope_parameters.items()
    assert torch.equal(logits(unchanged), logits(model))
