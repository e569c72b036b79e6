"""The documents: links lead somewhere, commands name files that exist, the reader of the cache's format reads one."""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pruning
import pyarrow as pa
import pytest
import torch
from cascades import TINY

from sparsekd_ray import corpus
from sparsekd_ray.cascade import steps
from sparsekd_ray.cascade.steps import PlanBuilder
from sparsekd_ray.commands import COMMANDS
from sparsekd_ray.config import Prune, parse
from sparsekd_ray.model.families import FAMILIES
from sparsekd_ray.model.mlp import layer_count, mlp_weights
from sparsekd_ray.prune.methods import METHODS, MethodSpec
from sparsekd_ray.runtime.tasks import map_local
from sparsekd_ray.teacher import shards
from sparsekd_ray.teacher.manifest import CacheManifest
from sparsekd_ray.teacher.signal import topk

ROOT = Path(__file__).parents[2]
PATH = r"(?:python|pytest|bash|`)\s*((?:jobs|tests|examples|sparsekd_ray|docs)/[\w/.-]+)"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", document.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        linked = (document.parent / path) if path else document
        assert linked.exists(), f"{document.name} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{document.name} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_name_files_of_the_repository(document: Path) -> None:
    if document.name == "CHANGELOG.md":  # which names what is gone
        return
    for name in re.findall(PATH, document.read_text()):
        assert (ROOT / name.rstrip(".")).exists(), f"{document.name} names {name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_of_sparsekd_exist(document: Path) -> None:
    for line in re.findall(r"^sparsekd (.+)$", document.read_text(), flags=re.MULTILINE):
        command: Any = COMMANDS
        words = iter(line.split())
        while isinstance(command, Mapping):
            word = next(words)
            command = command["run" if word.startswith("-") else word]
        assert callable(command), f"{document.name}: sparsekd {line}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_the_readme_names_every_family_and_every_method() -> None:
    readme = (ROOT / "README.md").read_text()
    for model_type, family in FAMILIES.items():
        assert f"`{model_type}`" in readme and family.name in readme
    for method in METHODS:
        assert f"`{method}`" in readme and f"`{method}`" in (ROOT / "docs" / "pruning.md").read_text()


def test_the_documented_program_reads_a_plain_cache(tmp_path: Path) -> None:
    temperatures, length, vocab = (2.0, 4.0), 5, 50
    manifest = CacheManifest(
        signal="topk", codec="plain", k=4, temperatures=temperatures, vocab_size=vocab, tokenizer_hash="t",
        teacher="a", corpus="b", shard_rows=(2,), rows=2, tokens=10, dtype="float32", seq_len=length,
    )  # fmt: skip
    logits_NV = torch.randn(2 * (length - 1), vocab, generator=torch.Generator().manual_seed(0))
    ids = pa.ListArray.from_arrays(pa.array([0, 5, 10], pa.int32()), pa.array(range(10), pa.int32()))
    rows = pa.table({"sample_id": ["a", "b"], "domain": ["x", "x"], "input_ids": ids})
    shards.write(tmp_path / "00000.parquet", rows, topk(logits_NV, 4, temperatures), manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(asdict(manifest)))

    program = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "cache-format.md").read_text(), re.DOTALL)
    assert program is not None
    read: dict[str, object] = {"cache": str(tmp_path)}
    exec(program[1], read)

    p_NV = (logits_NV[: length - 1] / 2.0).softmax(-1).numpy()
    kept_NK = np.take_along_axis(p_NV, read["ids"], -1)
    np.testing.assert_allclose(np.exp(read["logprobs_T"]), kept_NK, atol=1e-6)
    np.testing.assert_allclose(read["tail"], 1 - kept_NK.sum(-1), atol=1e-6)


def documented_method() -> MethodSpec:
    page = (ROOT / "docs" / "adding-a-method.md").read_text()
    program = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert program is not None
    module: dict[str, Any] = {}
    exec(program[1], module)
    (method,) = module["METHODS"]
    return method


def test_two_seeds_of_the_documented_method_are_two_artifacts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "magnitude", dataclasses.replace(documented_method(), name="magnitude"))
    keys = set()
    for seed in (1, 2):
        builder = PlanBuilder(parse(TINY | {"calibrate": {"samples": 16, "seed": seed}}, "test"))
        steps.dense(builder, corpus.identify, {})
        steps.prune(builder, "pruned", 0.3, "dense", Prune(method="magnitude"))
        keys.add(builder.names["pruned"].ref.key)
    assert len(keys) == 2


def test_the_documented_method_prunes_to_the_budget(tmp_path: Path) -> None:
    page, method = (ROOT / "docs" / "adding-a-method.md").read_text(), documented_method()
    store = pruning.prepare(tmp_path)
    task = pruning.task(store, pruning.DENSE["qwen3"], "random", Prune(method="wanda"), 0.35)
    student = method.student(task, map_local).model
    weights = [
        weight for layer in range(layer_count(student)) for weight in mlp_weights(student, layer).values()
    ]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert zeros == pytest.approx(0.35 * sum(weight.numel() for weight in weights), rel=1e-3)
    assert [row.matrix for row in method.preview(task, map_local)]
    described = set(re.findall(r"`(\w+)`", page))
    assert {field.name for field in dataclasses.fields(MethodSpec)} <= described
