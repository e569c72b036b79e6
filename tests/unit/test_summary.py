"""From records to the report's dictionary, by hand-made records of a small plan."""

from pathlib import Path

import pytest
from records import record

from sparsekd_ray import report
from sparsekd_ray.cascade.console import figure
from sparsekd_ray.cascade.plan import plan
from sparsekd_ray.config import load, parse
from sparsekd_ray.report.findings import findings
from sparsekd_ray.report.summary import summarise

LAPTOP = Path(__file__).parents[2] / "jobs" / "configs" / "laptop.yaml"
SEEDS = [1, 2]
DENSE, COLLAPSED = 30.0, 300.0


CASCADE = {
    "seeds": SEEDS,
    "rounds": [{"sparsity": 0.15}, {"sparsity": 0.65, "teacher": "dense+kd"}],
    "baselines": [{"method": "neurons", "sparsity": 0.65, "teacher": "dense+kd", "lr": 0.003}],
}


@pytest.fixture(scope="module")
def summary():
    return summary_of(load(LAPTOP).model_dump(mode="json") | {"cascade": CASCADE})


def summary_of(tree, dtypes=None):
    config = parse(tree, "test")
    steps = plan(config, lambda source: {"path": source.path}, {})
    records = {step.name: record(step.ref, metrics(step), seconds=1.0) for step in steps}
    for model, dtype in (dtypes or {}).items():
        records[f"evaluate {model}"].metrics["dtype"] = dtype
    figures = {step.name: figure(step.kind, records[step.name]) for step in steps}
    run = {"command": "c", "reused": {"dense"}, "seconds": 2.0, "created": "", "commands": [], "versions": {}}
    return summarise(config, steps, records, run | {"hardware": "", "figures": figures})


def metrics(step):
    """Figures that can be told apart: perplexity 30 for dense, 300 untrained, 31 + seed for what was trained."""
    match step.kind:
        case "evaluate":
            model = step.inputs["model"]
            untrained = "one-shot" in model or "pruned" in model
            ppl = DENSE if model == "dense" else COLLAPSED if untrained else 31.0 + int(model[-1])
            found = {"ppl": ppl, "tokens": 10, "domains": {"code": {"ppl": ppl + 1, "tokens": 10}}}
            paper = found | {"window": 128, "stride": 64, "sentence": "as the paper does"}
            return {"dtype": "float32", "paper": paper, "gptq": paper | {"sentence": "as GPTQ does"}}
        case "distill":
            point = {
                "step": 0,
                "tokens": 0,
                "valid_ppl": 40.0,
                "valid_domains": {"code": 41.0},
                "loss": [0, 0],
            }
            return {
                "trained_tokens": 100,
                "best_step": 0,
                "valid_ppl": 40.0,
                "stopped": "budget",
                "history": [point],
            }
        case "corpus":
            return {"tokens": {"train": {"code": 7}, "valid": {"code": 1}, "test": {"code": 2}}}
        case "prune":
            return {"params": 50, "mlp_params": 20, "sparsity": step.identity["sparsity"]}
        case "cache":
            return {"tokens": 7}
        case "statistics":
            return {"layers": 4, "tokens": 7}
        case "tokenizer":
            return {"vocab_size": 9}
        case "export":
            return {"low-rank": {"params": 50}}
    return {"params": 100, "mlp_params": 60, "tokens": 5}


def row(summary, stage):
    return next(r for r in summary["rows"] if r["stage"] == stage)


def test_rows_come_in_order_with_the_controls_baselines(summary):
    assert [r["stage"] for r in summary["rows"]] == [
        "Dense",
        "Dense + KD",
        "CE only",
        "KL only",
        "Round 1",
        "Round 2",
        "neurons 65%",
    ]


def test_seeds_are_averaged_and_their_spread_is_the_sample_deviation(summary):
    found = row(summary, "Round 2")
    assert found["per_seed"] == {"1": 32.0, "2": 33.0}
    assert found["ppl"] == 32.5 and found["std"] == pytest.approx(0.5**0.5)
    assert found["vs_dense"] == pytest.approx(32.5 / DENSE - 1)


def test_recovery_is_the_share_of_the_excess_over_dense(summary):
    found = row(summary, "Round 2")
    assert found["oneshot_ppl"] == found["pre_ppl"] == COLLAPSED
    assert found["recovered"] == pytest.approx((300 - 32.5) / (300 - 30))


def test_training_is_counted_from_the_dense_model_on(summary):
    """Round 2 goes on from round 1: twice the tokens of a control, which the report must say."""
    assert row(summary, "Dense + KD")["trained_tokens"] == row(summary, "Round 1")["trained_tokens"] == 100
    assert row(summary, "Round 2")["trained_tokens"] == 200


def test_teachers_are_named_with_their_own_perplexity(summary):
    assert (row(summary, "Round 1")["teacher"], row(summary, "Round 1")["teacher_ppl"]) == ("dense", DENSE)
    assert (row(summary, "Round 2")["teacher"], row(summary, "Round 2")["teacher_ppl"]) == ("dense+kd", 32.0)


def test_figures_in_two_dtypes_are_named(summary):
    assert summary["protocol"]["mixture"] is None
    assert summary["protocol"]["sentence"].endswith("Computed in float32.")
    tree = load(LAPTOP).model_dump(mode="json") | {"cascade": CASCADE}
    mixed = summary_of(tree, {"dense": "bfloat16"})
    warning = mixed["protocol"]["mixture"]
    assert "dense in bfloat16; " in warning and "round 1 · seed 1" in warning.split("dense in bfloat16; ")[1]
    assert warning.endswith(" in float32.") and findings(mixed)[0] == warning
    assert mixed["protocol"]["sentence"].endswith("Computed in bfloat16 and float32.")


def test_what_was_there_before_is_marked(summary):
    assert {step["name"] for step in summary["steps"] if step["reused"]} == {"dense"}


def test_a_student_beside_the_rounds_has_a_rounds_figures_but_no_one_shot(summary):
    found, round_ = row(summary, "neurons 65%"), row(summary, "Round 2")
    assert (found["kind"], found["method"], found["oneshot_ppl"]) == ("baseline", "neurons", None)
    assert (found["sparsity_requested"], found["sparsity"], found["lr"]) == (0.65, 0.65, 0.003)
    assert found["trained_tokens"] == 100  # pruned and distilled once
    for key in ("ppl", "std", "per_seed", "pre_ppl", "recovered", "teacher", "teacher_ppl", "params"):
        assert found[key] == round_[key], key
    assert found["export"].startswith("artifacts/export/") and found["export"] != round_["export"]
    assert [c["seed"] for c in summary["curves"] if c["stage"] == "neurons 65%"] == SEEDS


def test_students_name_their_pruning_method(summary):
    methods = {r["stage"]: r["method"] for r in summary["rows"]}
    assert methods["Round 1"] == methods["Round 2"] == "svd, tiered"
    assert methods["Dense"] is methods["CE only"] is None


def test_rounds_may_prune_by_any_method_and_the_stand_in_may_be_of_any_family():
    tree = load(LAPTOP).model_dump(mode="json") | {"cascade": CASCADE}
    tree["prune"]["method"], tree["model"]["standin"]["family"] = "depth", "qwen3"
    found = summary_of(tree)
    assert [r["method"] for r in found["rows"][4:]] == ["depth", "depth", "neurons"]
    assert row(found, "Round 2")["oneshot_ppl"] == COLLAPSED
    assert "a stand-in of the Qwen3 architecture" in found["dense"]["note"]


def test_a_student_equal_to_the_first_round_has_its_figures():
    """The plan makes equal steps once, under their first name."""
    tree = load(LAPTOP).model_dump(mode="json")
    tree["cascade"] = {"rounds": [{"sparsity": 0.5}], "baselines": [{"method": "neurons", "sparsity": 0.5}]}
    tree["cascade"]["seeds"], tree["prune"]["method"] = SEEDS, "neurons"
    found = summary_of(tree)
    same, other = row(found, "Round 1"), row(found, "neurons 50%")
    assert (same["kind"], other["kind"]) == ("round", "baseline")
    for key in ("artifact", "export", "per_seed", "trained_tokens"):
        assert same[key] == other[key]
    curves = [[c["seed"] for c in found["curves"] if c["stage"] == r["stage"]] for r in (same, other)]
    assert curves == [SEEDS, SEEDS]


def test_a_report_knows_nothing_of_the_cascade():
    folder = Path(report.__file__).parent
    assert not [path.name for path in folder.glob("*.py") if "sparsekd_ray.cascade" in path.read_text()]
