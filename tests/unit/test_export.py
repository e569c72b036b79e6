"""Exports: directories that load in a process without this package, in transformers 4 as in 5, from any place."""

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lines import recorded
from models import FAMILIES, FORMS, dense_directory, logits, student_of
from outsider import read_elsewhere

from sparsekd_ray.errors import ModelError
from sparsekd_ray.model import export, loading, origin, saving, spec

torch.set_num_threads(1)

OLDER = os.environ.get(
    "SPARSEKD_TRANSFORMERS_4", ""
)  # from `pip install --target FOLDER transformers==4.57.6`


def stock_student(family: str, kind: str, path: Path, **more: Any) -> Path:
    """What pruning leaves of a stock model: fewer neurons, fewer layers, or zeros."""
    sizes = {"narrower": {"intermediate_size": 30}, "shallower": {"num_hidden_layers": 2}, "masked": {}}
    tied = kind == "narrower"
    source = dense_directory(path.with_name(f"{path.name}-dense"), family, tied, **sizes[kind], **more)
    model = loading.load(source)
    if kind == "masked":
        for name in spec.shapes_from_config(model):
            model.get_submodule(name).weight.data[:, ::2] = 0
        model.config.sparsekd_mask = "wanda"
    saving.save(model, source, path, "card")
    return path


def test_exports_load_where_this_package_is_not(tmp_path: Path) -> None:
    """Every form of student × family, tied and untied, as every directory that it is exported as."""
    expected = {}
    for i, form in enumerate(FORMS):
        tokenizer = dense_directory(tmp_path / f"tokens-{form}", form.family, True)
        student, _ = student_of(form, tied=i % 2 == 0)
        saving.save(student, tokenizer, source := tmp_path / f"student-{form}", "card")
        out = tmp_path / f"{form}"
        with recorded() as lines:
            figures = export.export(source, out, card_facts={"sparsity": 0.5, "method": "svd"})
        assert set(figures) == {"low-rank", "merged"} and len(lines) == 2
        if form.bias:
            assert "biases" in str(figures.pop("merged")["absent"]) and not (out / "merged").exists()
        assert {p.name for p in out.iterdir()} == set(figures)
        expected |= {out / name: student for name in figures}
        assert max(float(figure["logits_difference"]) for figure in figures.values()) <= 1e-5
        assert figures["low-rank"]["params"] == loading.count_parameters(student)
        shutil.rmtree(source)
    for family, kind in itertools.product(FAMILIES, ("narrower", "shallower", "masked")):
        source = stock_student(family, kind, tmp_path / f"student-{family}-{kind}")
        out = tmp_path / f"{family}-{kind}"
        figures = export.export(source, out, card_facts={"sparsity": 0.5})
        assert set(figures) == {"stock"} and {p.name for p in out.iterdir()} == {"stock"}
        expected[out / "stock"] = loading.load(source)
        shutil.rmtree(source)
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
    check_readings(read_elsewhere(tmp_path, list(expected)), expected)


def check_readings(readings: dict[str, dict[str, Any]], expected: dict[Path, Any]) -> None:
    """Every directory gives the logits, base model and generation of the model that was exported."""
    ids = torch.arange(20)[None]
    for path, model in expected.items():
        reading = readings[str(path)]
        low_rank = path.name == "low-rank"
        assert ("trust_remote_code" in reading["refusal"]) == low_rank
        assert all(name.startswith("transformers_modules.") == low_rank for name in reading["classes"])
        counted = spec.total_parameters(path)
        assert reading["params"] == counted and (path.name == "merged" or counted == model.num_parameters())
        for key in ("logits", "base logits"):
            torch.testing.assert_close(torch.tensor(reading[key]), logits(model), atol=1e-5, rtol=1e-5)
        generated = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        assert reading["generated"] == generated.tolist()


LONG_ROPE = {
    "original_max_position_embeddings": 8,  # both sets of factors are used by 20 tokens and by generation
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 500.0, "partial_rotary_factor": 0.75,
        "short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 3.0, 4.0],
    },
}  # fmt: skip
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0}}


@pytest.mark.skipif(not OLDER, reason="SPARSEKD_TRANSFORMERS_4 names no folder with transformers 4.57")
def test_transformers_4_reads_exports_alike(tmp_path: Path) -> None:
    expected: dict[Path, Any] = {}
    for form in FORMS:
        rope = LONG_ROPE if form.family == "phi3" else LINEAR if form.gauge else THETA
        tokenizer = dense_directory(tmp_path / f"tokens-{form}", form.family, True)
        student, _ = student_of(form, **rope)
        saving.save(student, tokenizer, source := tmp_path / f"student-{form}", "card")
        figures = export.export(source, out := tmp_path / f"{form}", card_facts={"sparsity": 0.5})
        expected |= {out / name: student for name, figure in figures.items() if "absent" not in figure}
    for family, kind in itertools.product(FAMILIES, ("narrower", "shallower")):
        rope = LONG_ROPE if family == "phi3" else THETA
        source = stock_student(family, kind, tmp_path / f"student-{family}-{kind}", **rope)
        export.export(source, out := tmp_path / f"{family}-{kind}", card_facts={"sparsity": 0.5})
        expected[out / "stock"] = loading.load(source)
    newer, older = (read_elsewhere(tmp_path, list(expected), packages) for packages in ("", OLDER))
    check_readings(older, expected)
    for path in map(str, expected):
        assert older[path]["version"].startswith("4.") and newer[path]["version"].startswith("5.")
        torch.testing.assert_close(
            *(torch.tensor(r[path]["logits"]) for r in (older, newer)), atol=1e-5, rtol=0
        )
        assert older[path]["tokens"] == newer[path]["tokens"]
        assert older[path]["special"] == newer[path]["special"]


def test_exports_load_from_directories_of_any_name(tmp_path: Path) -> None:
    student, _ = student_of(FORMS[0])
    tokenizer = dense_directory(tmp_path / "tokens", FORMS[0].family, True)
    names = ("my models (v2)", "Modèle d'été", "phi-1.5", "0 北京")
    for name in names:
        saving.save(student, tokenizer, source := tmp_path / name / "student", "card")
        export.export(source, tmp_path / name, card_facts={"sparsity": 0.5})
    expected = {tmp_path / name / "low-rank": student for name in names}
    check_readings(read_elsewhere(tmp_path, list(expected)), expected)


def test_exporting_needs_no_writable_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", "/proc/nowhere/modules")
    monkeypatch.setenv("HOME", "/proc/nowhere")
    student, _ = student_of(FORMS[0])
    tokenizer = dense_directory(tmp_path / "tokens", FORMS[0].family, True)
    saving.save(student, tokenizer, tmp_path / "student", "card")
    assert set(export.export(tmp_path / "student", tmp_path / "out", card_facts={"sparsity": 0.5})) == {
        "low-rank",
        "merged",
    }


def test_a_place_that_cannot_be_written_is_named_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"directory /proc/nowhere cannot be written .*: choose another"):
        export.export(tmp_path / "no student", Path("/proc/nowhere"), card_facts={"sparsity": 0.5})


def test_an_export_states_the_licence_of_the_dense_model(tmp_path: Path) -> None:
    source = dense_directory(tmp_path / "dense", "qwen3", True)
    (source / "LICENSE").write_text("The small print\n")
    (source / "README.md").write_text("---\nlicense: mit\n---\n# Theirs\n")
    saving.save(loading.load(source), source, tmp_path / "student", "card")
    export.export(tmp_path / "student", tmp_path / "out", card_facts={"sparsity": 0.5})
    assert (tmp_path / "out" / "stock" / "LICENSE").read_text() == "The small print\n"
    assert "license: mit\n" in (tmp_path / "out" / "stock" / "README.md").read_text()
    origin.write(origin.Origin("some/one", "cc-by-nd-4.0"), tmp_path / "student")
    with pytest.raises(ModelError, match="licence of the dense model some/one forbids students"):
        export.export(tmp_path / "student", tmp_path / "out", card_facts={"sparsity": 0.5})


def test_a_mask_and_its_name_survive_export(tmp_path: Path) -> None:
    source = stock_student("phi3", "masked", tmp_path / "student")
    export.export(
        source, tmp_path / "out", card_facts={"sparsity": 0.5, "method": "wanda", "student_form": "masked"}
    )
    exported, original = loading.load(tmp_path / "out" / "stock"), loading.load(source)
    assert exported.config.sparsekd_mask == "wanda"
    assert all(torch.equal(t, exported.state_dict()[name]) for name, t in original.state_dict().items())
    assert "no stock runtime is faster for it" in (tmp_path / "out" / "stock" / "README.md").read_text()


def test_a_directory_that_is_not_the_student_is_no_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = stock_student("phi3", "narrower", tmp_path / "student")
    monkeypatch.setattr(saving, "logits_difference", lambda one, other: float("nan"))
    monkeypatch.setattr(saving, "save", lambda model, source, out, card: model.save_pretrained(out))
    with pytest.raises(ModelError, match="does not load as exported"):
        export.export(source, tmp_path / "out", card_facts={"sparsity": 0.5})


def test_rotary_settings_have_the_names_of_transformers_4_too(tmp_path: Path) -> None:
    def written(family: str, **rope: Any) -> dict[str, Any]:
        source = dense_directory(tmp_path / f"{family}-{len(list(tmp_path.iterdir()))}", family, True, **rope)
        saving.save(loading.load(source), source, out := source.with_suffix(".out"), "card")
        return dict(json.loads((out / "config.json").read_text()))

    phi3, qwen3, linear = written("phi3", **LONG_ROPE), written("qwen3", **THETA), written("qwen3", **LINEAR)
    assert phi3["rope_theta"] == 500.0 and phi3["partial_rotary_factor"] == 0.75
    assert phi3["rope_scaling"] == {
        "type": "longrope",
        "short_factor": [1.0, 1.5, 2.0],
        "long_factor": [2.0, 3.0, 4.0],
    }
    assert qwen3["rope_theta"] == 1e6 and qwen3["rope_scaling"] is None
    assert linear["rope_theta"] == 1e5 and linear["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def test_a_config_without_rotary_settings_gets_none() -> None:
    assert saving.older_rope({"hidden_size": 8}) == {}
    assert saving.older_rope({"rope_parameters": None}) == {}
