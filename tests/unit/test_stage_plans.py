"""A stage by itself plans the artifacts of a cascade with the same settings, and checks a given model before work."""

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from cascades import TINY
from models import dense_directory

from sparsekd_ray import commands
from sparsekd_ray.cascade import fingerprint, job, stage_plans, stages
from sparsekd_ray.config import Config, Model, parse
from sparsekd_ray.errors import ConfigError, ModelError
from sparsekd_ray.model import hub
from sparsekd_ray.prune.methods import METHODS
from sparsekd_ray.prune.task import Task
from sparsekd_ray.runtime import cluster
from sparsekd_ray.runtime.tasks import TaskMap
from sparsekd_ray.store import Ref, Store, locate


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return parse(TINY | {"execution": {"store": str(tmp_path / "store")}}, "test")


def keys(steps: list) -> set[str]:
    return {step.ref.key for step in steps}


def finish(store: Store, steps: list, *names: str) -> None:
    """Commits empty artifacts of these steps."""
    refs = {step.name: step.ref for step in steps}
    for step in steps:
        if step.name in names:
            with store.building(step.ref) as out:
                (out / "config.json").write_text(json.dumps({}))
            parents = {role: refs[name].key for role, name in step.inputs.items()}
            store.commit(
                step.ref, identity=step.identity, inputs=parents, metrics={"mlp_params": 9}, seconds=0
            )


def test_what_a_stage_makes_is_what_a_cascade_makes(config: Config) -> None:
    cascade = keys(job.preflight(config))
    assert keys(stage_plans.corpus(config)) | keys(stage_plans.capture(config)) <= cascade
    assert keys(stage_plans.distill(config, 0.3)) - cascade == set(), (
        "round 1 is one pruning and one distillation"
    )
    new = keys(stage_plans.prune(config, 0.3)) - cascade
    assert [Ref.from_key(key).kind for key in new] == ["export"], (
        "a cascade exports only what it has distilled"
    )


def test_a_stage_plans_no_more_than_it_needs(config: Config) -> None:
    assert [step.name for step in stage_plans.corpus(config)] == ["tokenizer", "corpus"]
    assert [step.name for step in stage_plans.capture(config)][-2:] == ["dense", "cache dense"]


def test_a_dry_run_makes_nothing(config: Config) -> None:
    result = stage_plans.run(config, "corpus", stage_plans.corpus(config), dry_run=True)
    assert result["missing"] == ["tokenizer", "corpus"] and result["reused"] == []
    assert not Path(config.execution.store).exists()


def test_a_model_of_the_store_is_judged_as_in_the_cascade(config: Config) -> None:
    cascade, store = job.preflight(config), job.open_store(config)
    student = next(step for step in cascade if step.name == "round 1")
    finish(store, cascade, *(step.name for step in cascade if step.kind in ("dense", "prune", "distill")))
    path = store.url(student.ref.key)
    judged, exported = stage_plans.evaluate(config, path), stage_plans.export(config, path)
    assert keys(judged) | keys(exported) <= keys(cascade)
    assert [step.kind for step in judged] == ["tokenizer", "corpus", "distill", "evaluate"]
    assert exported[-1].kind == "export" and exported[-1].identity == {"sparsity": 0.3, "method": "svd"}


def test_an_export_needs_the_settings_of_its_model(config: Config) -> None:
    cascade, store = job.preflight(config), job.open_store(config)
    finish(store, cascade, *(step.name for step in cascade))
    path = store.url(next(step for step in cascade if step.name == "round 1").ref.key)
    other = config.model_copy(update={"seed": 7})
    with pytest.raises(ConfigError, match="give the settings it was made with"):
        stage_plans.export(other, path)
    control = store.url(next(step for step in cascade if step.name == "ce-only").ref.key)
    with pytest.raises(ConfigError, match="only a pruned model is exported"):
        stage_plans.export(config, control)


def test_what_is_no_finished_model_is_refused(config: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no finished artifact"):
        stage_plans.evaluate(config, f"{config.execution.store}/artifacts/distill/a-0123456789ab")
    with pytest.raises(ConfigError, match="lies in another store"):
        stage_plans.evaluate(config, f"{tmp_path}/other/artifacts/distill/a-0123456789ab")
    with pytest.raises(ModelError, match="is no directory"):
        stage_plans.evaluate(config, f"{tmp_path}/nothing")


def test_the_sparsity_of_an_energy_is_measured_once_for_all_that_bears_on_it(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, asked = job.open_store(config), list[Ref]()

    def energy(task: Task, tau: float, task_map: TaskMap) -> float:
        asked.append(task.out)
        assert store.read_bytes(f"{task.out.key}.lease"), "no second process measures the same"
        task.publish("a.spectrum", {}, {})
        return 0.25

    def make(config: Config, stage: str, plan: list, dry_run: bool) -> None:
        missing = [step.name for step in plan if store.record(step.ref) is None]
        finish(store, plan, *missing)

    def measure(tau: float = 0.9, **settings: object) -> float:
        chosen = config.prune.model_copy(update={"method": "svd-whitened"} | settings)
        return stage_plans.sparsity_of_energy(config.model_copy(update={"prune": chosen}), tau)

    monkeypatch.setitem(METHODS, "svd-whitened", replace(METHODS["svd-whitened"], energy=energy))
    monkeypatch.setattr(stage_plans, "run", make)
    monkeypatch.setattr(stage_plans, "listening", nullcontext)
    monkeypatch.setattr(cluster, "connected", lambda execution: nullcontext())
    assert [measure(), measure(), len(asked)] == [0.25, 0.25, 1]
    assert store.record(asked[0]) is not None and store.published(asked[0]) == [], (
        "nothing unfinished is left"
    )
    measure(bias=True)
    measure(tau=0.8)
    monkeypatch.setitem(fingerprint.VERSIONS, "prune", 1 + fingerprint.VERSIONS["prune"])
    measure()
    assert len({ref.fingerprint for ref in asked}) == 4


@pytest.mark.parametrize("command", [commands.prune, commands.preview])
def test_an_energy_has_no_dry_run(
    command: Callable[..., object], config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_plans, "sparsity_of_energy", lambda *_: pytest.fail("a dry run makes nothing"))
    with pytest.raises(ConfigError, match="give --sparsity for a --dry-run"):
        command(commands.Common(config, dry_run=True), energy=0.9)


def complete_directory(folder: Path) -> Path:
    """A dense model whose tokenizer has an end-of-text token."""
    path = dense_directory(folder, "qwen3", True) / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "w6"}))
    return folder


@pytest.fixture
def models_config(config: Config, tmp_path: Path) -> Config:
    """Settings whose dense model is a directory."""
    folder = complete_directory(tmp_path / "a model")
    return config.model_copy(update={"model": Model(path=str(folder))})


@pytest.mark.parametrize("form", ["merged", "low-rank", "stock"])
@pytest.mark.parametrize("remote", [False, True])
def test_an_export_is_judged_from_its_store(
    form: str, remote: bool, config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store, ref = job.open_store(config), Ref("export", "student-minus-30", "0123456789ab")
    with store.building(ref) as out:
        complete_directory(out / form)
    store.commit(ref, identity={}, inputs={}, metrics={}, seconds=0)
    root = "s3://bucket/sparsekd" if remote else store.root
    monkeypatch.setattr(
        stages, "locate", lambda path, scratch: locate(path.replace(root, store.root), scratch)
    )
    path = f"{root}/{ref.key}/{form}"
    dense, judged = stage_plans.evaluate(config, path)[-2:]
    assert dense.kind == "dense" and dense.ref.name == form and judged.name == "evaluate model"
    assert dense.identity == hub.identify(Model(path=str(store.local(ref.key) / form)))
    taken: list[str | None] = []
    monkeypatch.setattr(hub, "import_model", lambda model, out: taken.append(model.path) or {})
    stages._made(dense, {}, tmp_path, store, gpu=False)
    assert taken == [str(store.local(ref.key) / form)]
    other = "stock" if form == "merged" else "merged"
    with pytest.raises(ConfigError, match=f"has no form {other}: it has {form}"):
        stage_plans.evaluate(config, path.replace(f"/{form}", f"/{other}"))
    with pytest.raises(ConfigError, match="is no finished export"):
        stage_plans.evaluate(config, path.replace("0123456789ab", "ba9876543210"))


def test_a_model_of_two_names_is_one_artifact(models_config: Config, tmp_path: Path) -> None:
    given = str(models_config.model.path)
    (tmp_path / "other name").symlink_to(given)
    for path in (given, f"{given}/", str(tmp_path / "other name")):
        judged = stage_plans.evaluate(models_config, path)
        assert [step.ref.name for step in judged if step.kind == "dense"] == ["a-model"]
    copy = shutil.copytree(given, tmp_path / "a copy")
    judged = stage_plans.evaluate(models_config, str(copy))
    assert [step.ref.name for step in judged if step.kind == "dense"] == ["a-model"]
    assert [step.name for step in judged if step.kind == "evaluate"] == ["evaluate dense"]
