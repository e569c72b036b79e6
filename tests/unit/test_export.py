"""Exports: directories that load in a process without this package, and the cards that say what they are."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lines import recorded
from models import FAMILIES, FORMS, dense_directory, logits, student_of

from sparsekd_ray.errors import ModelError
from sparsekd_ray.model import export, loading, saving, spec
from sparsekd_ray.prune.methods import named

torch.set_num_threads(1)

OUTSIDER = """
import importlib.abc, json, os, re, sys
from pathlib import Path

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "sparsekd_ray":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocker())
try:
    import sparsekd_ray
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("sparsekd_ray can be imported: this proves nothing")

import torch
from transformers import AutoModel, AutoModelForCausalLM

torch.set_num_threads(1)
answer = {}
for path in map(Path, sys.argv[1:]):
    os.chdir(path)
    card = Path("README.md").read_text()
    code = {"trust_remote_code": True} if path.name == "low-rank" else {}
    refusal = "none"
    if code:
        try:
            AutoModelForCausalLM.from_pretrained(path)
        except ValueError as error:
            refusal = str(error)
    model = AutoModelForCausalLM.from_pretrained(path, **code)
    base = AutoModel.from_pretrained(path, **code)
    exec(re.search("```python\\n(.*?)```", card, re.S)[1], {})
    ids = torch.arange(20)[None]
    answer[str(path)] = {
        "refusal": refusal,
        "classes": [type(m).__module__ + "." + type(m).__name__ for m in (model, base)],
        "params": sum(p.numel() for p in model.parameters()),
        "logits": model(ids).logits.tolist(),
        "base logits": (base(ids).last_hidden_state @ model.lm_head.weight.T).tolist(),
        "generated": model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False).tolist(),
    }
assert not [name for name in sys.modules if name.startswith("sparsekd_ray")]
print("ANSWER", json.dumps(answer))
"""

FIGURES = {
    p: {
        "ppl": 12.345,
        "tokens": 9000,
        "domains": {"prose": {"ppl": 6.5, "tokens": 9000}},
        "sentence": f"how {p} is measured",
    }
    for p in ("paper", "gptq")
}


@pytest.fixture
def module_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keeps transformers' copies of shipped code out of the user's cache."""
    cache = tmp_path / "modules"
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
    monkeypatch.syspath_prepend(cache)
    return cache


def stock_student(family: str, kind: str, path: Path) -> Path:
    """What pruning leaves of a stock model: fewer neurons, fewer layers, or zeros."""
    sizes = {"narrower": {"intermediate_size": 30}, "shallower": {"num_hidden_layers": 2}, "masked": {}}
    source = dense_directory(path.with_name(f"{path.name}-dense"), family, kind == "narrower", **sizes[kind])
    model = loading.load(source)
    if kind == "masked":
        for name in spec.shapes_from_config(model):
            model.get_submodule(name).weight.data[:, ::2] = 0
        model.config.sparsekd_mask = "wanda"
    saving.save(model, source, path, "card")
    return path


def test_exports_load_where_this_package_is_not(
    module_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every form of student × family, tied and untied, as every directory that it is exported as."""
    facts = {
        "base_model": "someone/base",
        "perplexity": FIGURES,
        "dense_perplexity": FIGURES,
        "sparsity": 0.5,
    }
    meant = {}
    for i, form in enumerate(FORMS):
        tokenizer = dense_directory(tmp_path / f"tokens-{form}", form.family, True)
        student, _ = student_of(form, tied=i % 2 == 0)
        saving.save(student, tokenizer, source := tmp_path / f"student-{form}", "card")
        out, given = tmp_path / f"{form}", facts | {"method": "svd"}
        with recorded() as said:
            metrics = export.export(source, out, card_facts=given)
        assert set(metrics) == {"low-rank", "merged"} and len(said) == 2
        if form.bias:
            assert "biases" in metrics.pop("merged")["absent"] and not (out / "merged").exists()
        assert {p.name for p in out.iterdir()} == set(metrics)
        meant |= {out / name: student for name in metrics}
        assert max(found["logits_difference"] for found in metrics.values()) <= 1e-5
        assert metrics["low-rank"]["params"] == loading.count_parameters(student)
        shutil.rmtree(source)
    for family, kind in itertools.product(FAMILIES, ("narrower", "shallower", "masked")):
        source = stock_student(family, kind, tmp_path / f"student-{family}-{kind}")
        out = tmp_path / f"{family}-{kind}"
        metrics = export.export(source, out, card_facts=facts)
        assert set(metrics) == {"stock"} and {p.name for p in out.iterdir()} == {"stock"}
        meant[out / "stock"] = loading.load(source)
        shutil.rmtree(source)
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
    answer = outsider(tmp_path, list(meant), monkeypatch)
    ids = torch.arange(20)[None]
    for path, ours in meant.items():
        found = answer[str(path)]
        low_rank = path.name == "low-rank"
        assert ("trust_remote_code" in found["refusal"]) == low_rank
        assert all(name.startswith("transformers_modules.") == low_rank for name in found["classes"])
        counted = spec.total_parameters(path)
        assert found["params"] == counted and (path.name == "merged" or counted == ours.num_parameters())
        for key in ("logits", "base logits"):
            torch.testing.assert_close(torch.tensor(found[key]), logits(ours), atol=1e-5, rtol=1e-5)
        expected = ours.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        assert found["generated"] == expected.tolist()


def outsider(tmp_path: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """What a process without this package finds in each directory."""
    script = tmp_path / "outsider.py"
    script.write_text(OUTSIDER)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "elsewhere"))
    done = subprocess.run(
        [sys.executable, "-I", script, *paths],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("ANSWER ")[1])


def test_a_mask_and_its_name_survive_export(module_cache: Path, tmp_path: Path) -> None:
    source = stock_student("phi3", "masked", tmp_path / "student")
    export.export(source, tmp_path / "out", card_facts={"sparsity": 0.5, "method": "wanda"})
    exported, ours = loading.load(tmp_path / "out" / "stock"), loading.load(source)
    assert exported.config.sparsekd_mask == "wanda"
    assert all(torch.equal(t, exported.state_dict()[name]) for name, t in ours.state_dict().items())
    assert "no stock runtime is faster for it" in (tmp_path / "out" / "stock" / "README.md").read_text()


def test_card_states_what_the_model_is() -> None:
    import yaml

    facts = {"sparsity": 0.35, "parameters": 12345, "base_model": "someone/base", "license": "mit"}
    card = export.model_card({**facts, "perplexity": FIGURES, "dense_perplexity": FIGURES}, "low-rank")
    _, front, body = card.split("---\n", 2)
    front = yaml.safe_load(front)
    assert (
        front["base_model"] == "someone/base"
        and front["library_name"] == "transformers"
        and front["license"] == "mit"
    )
    assert "low-rank" in front["tags"]
    assert "35.0%" in body and "12,345" in body and "trust_remote_code=True" in body
    assert "| `paper` | prose | 9,000 | 6.50 | 6.50 |" in body and "- `gptq`: how gptq is measured." in body
    plain = export.model_card({"sparsity": 0.35, "parameters": 1}, "merged")
    assert "base_model" not in plain and "Perplexity" not in plain and "trust_remote_code" not in plain


@pytest.mark.parametrize(
    ("method", "form", "words"),
    [
        (
            "svd",
            "low-rank",
            ["# Low-rank student", "truncated singular value", "35.0% of the dense model's MLP"],
        ),
        (
            "svd-whitened",
            "merged",
            ["# Merged student", "metric of their inputs", "dense model's size and speed"],
        ),
        ("neurons", "stock", ["# Narrower student", "stand in for", "35.0% of the dense", "needs no code"]),
        ("sdm", "stock", ["# Narrower student", "SDMPrune", "are gone"]),
        ("depth", "stock", ["# Shallower student", "whole layers", "are gone"]),
        ("wanda", "stock", ["# Masked student", "(Wanda)", "are zeros", "no stock runtime is faster for it"]),
        ("magnitude", "stock", ["# Masked student", "smallest weights", "no stock runtime is faster for it"]),
        (None, "stock", ["# Stock student", "Pruned by sparsekd-ray, then"]),
    ],
)
def test_card_says_which_method_made_the_student(method: Any, form: Any, words: list[str]) -> None:
    card = export.model_card({"sparsity": 0.35, "parameters": 1, "method": method}, form)
    assert all(word in card for word in words)
    assert ("trust_remote_code" in card) == (form == "low-rank")
    assert ("faster" in card) == (method in named("masked"))
    assert method is None or f"- {method}\n" in card


def test_card_says_why_there_is_no_merged_form_and_refuses_unknown_methods() -> None:
    facts = {"sparsity": 0.35, "parameters": 1, "method": "svd-whitened", "biased": True}
    assert "There is no merged form, because its MLP matrices have biases" in export.model_card(
        facts, "low-rank"
    )
    with pytest.raises(ModelError, match="method 'lottery'; known are svd, svd-whitened, neurons"):
        export.model_card({**facts, "method": "lottery"}, "low-rank")


def test_a_directory_that_is_not_the_student_is_no_export(
    module_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = stock_student("phi3", "narrower", tmp_path / "student")
    monkeypatch.setattr(saving, "logits_difference", lambda one, other: float("nan"))
    monkeypatch.setattr(saving, "save", lambda model, source, out, card: model.save_pretrained(out))
    with pytest.raises(ModelError, match="does not load as exported"):
        export.export(source, tmp_path / "out", card_facts={"sparsity": 0.5})
