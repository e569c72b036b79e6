"""The plan: identity apart from execution, shared steps, order; every shipped configuration loads and plans."""

from pathlib import Path

import pytest
from cascades import LAPTOP, TINY, changed
from lines import recorded

from sparsekd_ray import corpus
from sparsekd_ray.cascade import console, job, stage_plans, steps
from sparsekd_ray.cascade.driver import next_batch
from sparsekd_ray.cascade.estimate import parameters
from sparsekd_ray.cascade.fingerprint import fingerprint
from sparsekd_ray.cascade.plan import plan
from sparsekd_ray.cascade.steps import PlanBuilder
from sparsekd_ray.config import Config, Prune, Shape, load, parse
from sparsekd_ray.errors import ConfigError
from sparsekd_ray.prune.methods import METHODS

CONFIGS = sorted((Path(__file__).parents[2] / "jobs" / "configs").glob("*.yaml"))


def steps_of(config: Config):
    return plan(config, lambda source: {"path": source.path}, {"hub": config.model.path})


def refs(config: Config):
    return {step.name: step.ref for step in steps_of(config)}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_loads_and_plans_without_a_network(path):
    config = load(path)
    steps = job.preflight(config)
    text = console.plan_text(config, steps, {})
    assert f"{len(steps)} steps, 0 done" in text
    for card in config.execution.cards:
        assert card.name in text
    made = set()
    for step in steps:
        assert set(step.inputs.values()) <= made, "inputs come before what needs them"
        made.add(step.name)


def test_parameter_counts_are_those_of_the_real_models():
    phi = Shape(family="phi3", hidden=3072, intermediate=8192, layers=32, heads=24, kv_heads=8, vocab=200064)
    qwen = Shape(family="qwen3", hidden=1024, intermediate=3072, layers=28, heads=16, kv_heads=8, head_dim=128,
                 vocab=151936)  # fmt: skip
    assert parameters(phi).total == pytest.approx(3_836_021_760, rel=1e-3)
    assert parameters(qwen).total == pytest.approx(596_049_920, rel=1e-3)
    assert parameters(phi).mlp == 2_415_919_104 and parameters(qwen).mlp == 264_241_152


@pytest.mark.parametrize(
    "path, value",
    [
        ("execution.store", "s3://elsewhere/x"),
        ("execution.workers", 1),
        ("execution.micro_batch", 2),
        ("name", "other"),
    ],
)
def test_execution_changes_no_fingerprint(path, value):
    assert refs(changed(path, value)) == refs(load(LAPTOP))


@pytest.mark.parametrize(
    "path, value, same",
    [
        ("distill.lr", 5e-4, {"tokenizer", "dense", "corpus", "cache dense", "one-shot 15%"}),
        ("teacher.k", 8, {"tokenizer", "dense", "corpus", "one-shot 15%"}),
        ("cascade.rounds.2.sparsity", 0.7, {"dense", "cache dense", "dense+kd", "round 1", "round 2"}),
        ("corpus.samples", 512, {"tokenizer", "pretraining text", "dense"}),
        ("seed", 7, set()),
    ],
)
def test_identity_changes_what_depends_on_it_and_nothing_else(path, value, same):
    before, after = refs(load(LAPTOP)), refs(changed(path, value))
    shared = {name for name in before if before[name] == after.get(name)}
    assert same <= shared
    assert "round 3" not in shared


def test_equal_steps_are_one_step():
    """The first round prunes the dense model whatever the seed: made once, under the name of the first seed."""
    steps = steps_of(changed("cascade.seeds", [1, 2]))
    assert len({step.ref for step in steps}) == len(steps)
    students = {step.name: step.inputs.get("student") for step in steps}
    assert students["round 1 · seed 1"] == students["round 1 · seed 2"] == "round 1 · seed 1 pruned"
    assert students["round 2 · seed 2"] == "round 2 · seed 2 pruned"


def test_a_teacher_that_stays_is_captured_once_and_one_that_changes_again():
    captures = [step.inputs["teacher"] for step in steps_of(load(LAPTOP)) if step.kind == "cache"]
    assert captures == ["dense", "dense+kd"]
    previous = changed("cascade.rounds.2.teacher", "previous")
    assert [s.inputs["teacher"] for s in steps_of(previous) if s.kind == "cache"] == [
        "dense",
        "dense+kd",
        "round 2",
    ]


def test_several_seeds_share_what_no_seed_touches():
    steps = steps_of(changed("cascade.seeds", [1, 2, 3]))
    kinds = [step.kind for step in steps]
    assert kinds.count("corpus") == 2 and kinds.count("dense") == 1
    assert kinds.count("distill") == 3 * (3 + 3 + 1)


def test_a_worker_group_takes_all_that_its_own_work_makes_possible():
    pending, groups = list(steps_of(load(LAPTOP))), []
    while pending:
        batch = next_batch(pending)
        groups.append([step.name for step in batch])
        pending = [step for step in pending if step not in batch]
    first, second = [[name for name in g if " " not in name or "round" in name] for g in groups if len(g) > 1]
    assert first[0] == "dense+kd" and {"ce-only", "kl-only", "round 1", "evaluate round 1"} <= set(first)
    assert second[0] == "round 2" and {"round 3 pruned", "round 3", "export round 3"} <= set(second)
    assert len([name for group in groups for name in group]) == len(steps_of(load(LAPTOP)))


def test_large_models_leave_the_worker_group_for_work_in_pieces():
    tree = load(LAPTOP).model_dump(mode="json")
    tree["prune"] |= {"method": "svd-whitened"}
    pending = list(steps_of(parse(tree, "test")))
    while pending:
        batch = next_batch(pending, apart=True)
        kinds = {step.kind for step in batch}
        assert len(batch) == 1 or not kinds & {"cache", "statistics", "prune"}
        pending = [step for step in pending if step not in batch]


def test_fingerprints_are_canonical():
    assert fingerprint({"a": 1, "b": [2.5]}) == fingerprint({"b": [2.5], "a": 1})
    with pytest.raises(TypeError):
        fingerprint({"a": object()})
    with pytest.raises(ValueError):
        fingerprint({"a": float("nan")})


def test_a_budget_out_of_reach_is_refused_before_any_work():
    with pytest.raises(ConfigError, match=r"0\.999.*at most 0\.9"):
        job.preflight(changed("cascade.rounds.2.sparsity", 0.999))


BASELINE = {"sparsity": 0.5}


@pytest.mark.parametrize(
    "method, more, rounds, baselines, message",
    [
        ("neurons", {}, [0.3, 0.999], [], "cascade.rounds: neurons: .* ask for a sparsity"),
        ("neurons", {"align": 88}, [0.3, 0.31], [], "neurons: .*asks for 264 .* which have 264"),
        ("sdm", {"temperature": 1.0}, [0.3, 0.999], [], "cascade.rounds: sdm: .* ask for a sparsity"),
        ("depth", {}, [0.25, 0.95], [], "cascade.rounds: depth: .* whole layers allow"),
        ("depth", {}, [0.25, 0.3], [], "depth: .* asks for 0 of 3 layers"),
        ("svd-whitened", {"storage": "gauge"}, [0.3, 0.9999], [], "cascade.rounds: .* can remove at most"),
        ("svd-whitened", {"align": 64, "bias": True}, [0.3, 0.375], [], "cascade.rounds: .* at most 0.372"),
        ("neurons", {"align": 32}, [0.3, 0.85], [], "one-shot control: .* can remove at most"),
        ("svd", {}, [0.3], [BASELINE | {"method": "depth", "sparsity": 0.99}], "cascade.baselines depth 99%"),
        (
            "svd",
            {},
            [0.3],
            [BASELINE | {"method": "neurons", "sparsity": 0.999}],
            "cascade.baselines neurons 99.9%",
        ),
        ("svd", {}, [0.3], [BASELINE | {"method": "svd", "sparsity": 0.999}], "cascade.baselines svd 99.9%"),
    ],
)
def test_every_size_of_every_method_is_checked_before_any_work(method, more, rounds, baselines, message):
    tree = load(LAPTOP).model_dump(mode="json")
    tree["prune"] |= {"method": method} | more
    tree["cascade"] |= {"rounds": [{"sparsity": sparsity} for sparsity in rounds], "baselines": baselines}
    with pytest.raises(ConfigError, match=message):
        job.preflight(parse(tree, "test"))


INPUTS = {  # of each method with the default allocation of a round, and of a baseline
    "svd": ((), ("statistics",)),
    "svd-whitened": (("statistics",),) * 2,
    "neurons": (("statistics",),) * 2,
    "sdm": (("statistics", "texts", "cache"),) * 2,
    "depth": (("statistics",),) * 2,
    "wanda": (("texts",),) * 2,
    "magnitude": ((),) * 2,
}


@pytest.mark.parametrize("method", INPUTS)
def test_every_method_makes_rounds_and_baselines(method):
    tree = load(LAPTOP).model_dump(mode="json")
    tree["prune"] |= {"method": method, "temperature": 1.0}
    tree["cascade"] |= {
        "rounds": [{"sparsity": 0.25}, {"sparsity": 0.5}],
        "baselines": [{"method": other, "sparsity": 0.5} for other in INPUTS],
    }
    steps = {step.name: step for step in job.preflight(parse(tree, "test"))}
    students = [("round 1", method, "dense", 0), ("round 2", method, "round 1", 0)]
    students += [(f"{other} 50%", other, "dense", 1) for other in INPUTS]
    for name, kind, source, index in students:
        step = steps[f"{name} pruned"]
        made_by = {"statistics": f"statistics {source}", "texts": "corpus", "cache": "cache dense"}
        needed = {"model": source, "dense": "dense"} | {role: made_by[role] for role in INPUTS[kind][index]}
        assert step.inputs == needed
        assert steps[f"export {name}"].identity == {"sparsity": step.identity["sparsity"], "method": kind}


@pytest.mark.parametrize(
    "method, field, value, matters",
    [
        ("svd", "storage", "gauge", True),
        ("svd", "drop", "influence", False),
        ("svd-whitened", "bias", True, True),
        ("svd-whitened", "alpha", 0.1, False),
        ("neurons", "allocation", "optimal", False),
        ("neurons", "score", "leverage", True),
        ("sdm", "alpha", 0.1, True),
        ("depth", "drop", "influence", True),
        ("depth", "align", 8, False),
        ("wanda", "storage", "gauge", False),
    ],
)
def test_only_what_bears_on_a_method_is_its_identity(method, field, value, matters):
    def of(more):
        tree = load(LAPTOP).model_dump(mode="json")
        tree["prune"] |= {"method": method, "temperature": 1.0} | more
        tree["cascade"] |= {"rounds": [{"sparsity": 0.25}]}
        return refs(parse(tree, "test"))["round 1 pruned"]

    assert (of({}) != of({field: value})) == matters


@pytest.mark.parametrize(
    "path, value, message",
    [
        (
            "cascade.baselines",
            [BASELINE | {"method": "depth", "allocation": "uniform"}],
            "allocation is uniform, and depth does not read it: leave it out",
        ),
        ("cascade.baselines", [BASELINE | {"method": "depth"}] * 2, "repeats a method at one sparsity"),
        ("distill.temperature", 3.0, "add it to teacher.temperatures"),
        ("cascade.controls", ["ce-only"], "keep dense\\+kd"),
        ("corpus.samples", 4, "less than one batch"),
        ("execution.workers", 99, "execution.workers"),
        ("model.standin.unseen", ["poems"], "poems"),
        ("cascade.rounds.0.sparsity", 1.5, "cascade.rounds.0.sparsity.*less than 1"),
        ("model.path", "also/this", "either model.path"),
        ("distill.alpha", 0.0, "drop ce-only"),
        ("model.standin.heads", 3, "multiple of heads"),
        ("distill.lr", float("inf"), "finite"),
    ],
)
def test_contradictions_are_explained(path, value, message):
    with pytest.raises(ConfigError, match=message):
        changed(path, value)


@pytest.mark.parametrize(
    "prune, message",
    [
        ({"bias": True}, "prune.bias is True, and svd does not read it: .* False, or choose svd-whitened"),
        ({"method": "neurons", "allocation": "optimal"}, "prune.allocation is optimal, and neurons does not"),
        (
            {"method": "wanda", "storage": "gauge"},
            "storage is gauge.* at factors, or choose svd or svd-whitened",
        ),
        ({"drop": "influence"}, "prune.drop is influence, and svd does not read it: .* or choose depth"),
        (
            {"method": "sdm", "temperature": 0.25},
            "sdm reads the teacher at prune.temperature 0.25, .* add it to teacher.temperatures",
        ),
    ],
)
def test_a_setting_that_no_method_reads_is_refused_before_any_work(prune, message):
    tree = load(LAPTOP).model_dump(mode="json")
    tree["prune"] |= prune
    tree["cascade"]["baselines"] = []
    with pytest.raises(ConfigError, match=message):
        job.preflight(parse(tree, "test"))
    with pytest.raises(ConfigError, match=message):
        stage_plans.prune(changed("prune", prune), 0.5)


@pytest.mark.parametrize(
    "prune",
    [
        {"method": "wanda", "align": 8},
        {"storage": "gauge"},
        {"method": "svd-whitened", "allocation": "optimal"},
    ],
)
def test_settings_that_are_read_or_hold_of_every_method_pass(prune):
    assert any(step.kind == "prune" for step in job.preflight(changed("prune", prune)))


def test_a_setting_that_only_a_baseline_reads_is_said():
    tree = load(LAPTOP).model_dump(mode="json")
    tree["prune"] |= {"method": "neurons", "storage": "gauge"}
    tree["cascade"]["baselines"] = [BASELINE | {"method": "svd"}]
    with recorded() as lines:
        steps = {step.name: step for step in job.preflight(parse(tree, "test"))}
    assert steps["svd 50% pruned"].identity["storage"] == "gauge"
    assert "storage" not in steps["round 1 pruned"].identity
    (line,) = lines
    assert "prune.storage is gauge, and neurons does not read it: only the baselines by svd do" in line


def test_an_unknown_key_names_the_nearest_one_and_a_bad_file_itself(tmp_path):
    with pytest.raises(ConfigError, match=r"distill\.learning_rate: unknown setting"):
        tree = load(LAPTOP).model_dump(mode="json")
        parse(tree | {"distill": {"learning_rate": 1}}, "x.yaml")
    with pytest.raises(ConfigError, match="did you mean cascade"):
        parse(load(LAPTOP).model_dump(mode="json") | {"cascad": {}}, "x.yaml")
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file.*laptop"):
        load(Path("nowhere.yaml"))
    bad = tmp_path / "bad.yaml"
    bad.write_text("model: [unclosed")
    with pytest.raises(ConfigError, match=r"bad\.yaml is not a YAML file"):
        load(bad)
    bad.write_text("just words")
    with pytest.raises(ConfigError, match="expected a YAML mapping"):
        load(bad)


@pytest.mark.parametrize("method", METHODS)
def test_a_pruning_sees_the_settings_of_the_calibration_only_where_they_identify_it(method: str) -> None:
    builder = PlanBuilder(parse(TINY | {"teacher": {"k": 8, "temperatures": [0.5, 2.0]}}, "test"))
    steps.dense(builder, corpus.identify, {})
    steps.prune(builder, "pruned", 0.3, "dense", Prune(method=method))
    pruned = builder.names["pruned"]
    assert (pruned.settings.calibrate is not None) == ("calibrate" in pruned.identity)
