"""Every family and every form of a smaller model of it: counted, pruned, saved, and read by the stock classes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import Form, dense_directory, logits, student_of

from sparsekd_ray.model import families, loading, mlp, probe, saving, spec

MORE = {  # what a family's tiny config needs beside the sizes
    "gemma3_text": {"head_dim": 8},
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
        cut = mlp.with_mlps(model, [mlp.mlp_of(model, layer) for layer in range(3)])
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
