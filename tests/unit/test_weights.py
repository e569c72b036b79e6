"""Which files hold a model's weights, and reading tensors out of them as transformers would."""

import json
from pathlib import Path

import pytest
import torch
from models import dense_directory, logits
from safetensors.torch import load_file, save_file

from sparsekd_ray.errors import ModelError
from sparsekd_ray.model import loading, mlp, saving, weights

DOWN = "model.layers.1.mlp.down_proj.weight"


def sharded(folder: Path, prefix: str) -> Path:
    """A model in several files whose names begin with `prefix`, and an index that names them."""
    model = loading.load(dense_directory(folder, "llama", True))
    (folder / weights.SINGLE).unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    index = json.loads((folder / weights.INDEX).read_text())
    for file in sorted(folder.glob("model-*.safetensors")):
        file.rename(folder / f"{prefix}{file.name}")
    index["weight_map"] = {name: f"{prefix}{file}" for name, file in index["weight_map"].items()}
    (folder / weights.INDEX).write_text(json.dumps(index))
    return folder


def test_other_safetensors_are_no_part_of_the_model(tmp_path: Path) -> None:
    folder = dense_directory(tmp_path, "llama", True)
    own = load_file(folder / weights.SINGLE)
    save_file({name: tensor + 1 for name, tensor in own.items()}, folder / "model_backup.safetensors")
    save_file({name: tensor + 1 for name, tensor in own.items()}, folder / "consolidated.safetensors")
    assert weights.weight_files(folder) == [folder / weights.SINGLE]
    assert torch.equal(weights.read_tensors(folder, DOWN)[DOWN], own[DOWN])
    assert weights.tensor_shapes(folder) == {name: tuple(tensor.shape) for name, tensor in own.items()}


@pytest.mark.parametrize("prefix", ["", "pytorch_"])
def test_shards_are_those_of_the_index_whatever_they_are_called(prefix: str, tmp_path: Path) -> None:
    folder = sharded(tmp_path, prefix)
    save_file({"stray": torch.zeros(1)}, folder / "model-99999-of-99999.safetensors")
    files = weights.weight_files(folder)
    assert len(files) > 1 and all(file.name.startswith(f"{prefix}model-0") for file in files)
    model = loading.load(folder)
    assert set(weights.tensor_places(folder)) == set(model.state_dict()) - {"lm_head.weight"}
    assert torch.equal(weights.read_tensors(folder, DOWN)[DOWN], model.state_dict()[DOWN])
    files[0].unlink()
    with pytest.raises(ModelError, match=f"names {files[0].name}, which the directory lacks"):
        loading.load(folder)


def test_a_checkpoint_of_the_base_model_has_the_names_of_the_causal_one(tmp_path: Path) -> None:
    model = loading.load(dense_directory(tmp_path, "qwen3", True))
    model.get_submodule("model").save_pretrained(tmp_path)  # type: ignore[operator]
    assert not any(name.startswith("model.") for name in load_file(tmp_path / weights.SINGLE))
    assert torch.equal(weights.read_tensors(tmp_path, DOWN)[DOWN], model.state_dict()[DOWN])
    assert torch.equal(logits(loading.load(tmp_path)), logits(model))


def test_a_directory_rewritten_is_read_anew(tmp_path: Path) -> None:
    folder = dense_directory(tmp_path, "llama", True)
    before = weights.tensor_shapes(folder)
    model = loading.load(folder)
    saving.save(mlp.without_layers(model, [1]), folder, folder, "card")
    assert len(weights.tensor_shapes(folder)) < len(before)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("{", "no readable index of weights"),
        ("[]", "no readable index of weights"),
        ('{"weight_map": {"a": "../other.safetensors"}}', "must name files of its own directory"),
        ('{"weight_map": {}}', "must name files of its own directory"),
    ],
)
def test_an_index_that_cannot_be_meant_is_refused(index: str, words: str, tmp_path: Path) -> None:
    (tmp_path / weights.INDEX).write_text(index)
    with pytest.raises(ModelError, match=words):
        weights.weight_files(tmp_path)


def test_a_directory_of_pickles_is_told_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"but pytorch_model\.bin: save the weights as safetensors"):
        weights.weight_files(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"output_attentions": True},
        {"output_hidden_states": True},
        {"return_dict": False},
        {"transformers_weights": "model_backup.safetensors"},
    ],
)
def test_options_of_a_call_in_a_config_are_no_part_of_the_model(
    options: dict[str, object], tmp_path: Path
) -> None:
    source = dense_directory(tmp_path / "dense", "llama", True)
    expected = logits(loading.load(source))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | options))
    model = loading.load(source)
    assert torch.equal(logits(model), expected)
    assert model(torch.arange(4)[None]).attentions is None
    saving.save(model, source, tmp_path / "out", "card")
    assert not set(options) & set(json.loads((tmp_path / "out" / "config.json").read_text()))
