"""From records to the report's dictionary, by hand-made records of a small plan."""

from pathlib import Path

import pytest

from sparsekd_ray.cascade.plan import plan
from sparsekd_ray.cascade.summary import summarise
from sparsekd_ray.config import load, parse

LAPTOP = Path(__file__).parent.parent / "jobs" / "configs" / "laptop.yaml"
SEEDS = [1, 2]
DENSE, COLLAPSED = 30.0, 300.0


@pytest.fixture(scope="module")
def summary():
    tree = load(LAPTOP).model_dump(mode="json")
    tree["cascade"] |= {
        "seeds": SEEDS,
        "rounds": [{"sparsity": 0.15}, {"sparsity": 0.65, "teacher": "dense+kd"}],
    }
    config = parse(tree, "test")
    steps = plan(config, lambda source: {"path": source.path}, {})
    records = {
        step.name: {"metrics": metrics(step), "seconds": 1.0, "files": {}, "created": ""} for step in steps
    }
    return summarise(config, steps, records, {"command": "c", "reused": {"dense"}, "seconds": 2.0})


def metrics(step):
    """Figures that can be told apart: perplexity 30 for dense, 300 untrained, 31 + seed for what was trained."""
    match step.kind:
        case "evaluate":
            model = step.inputs["model"]
            untrained = "one-shot" in model or "pruned" in model
            ppl = DENSE if model == "dense" else COLLAPSED if untrained else 31.0 + int(model[-1])
            found = {"ppl": ppl, "tokens": 10, "domains": {"code": {"ppl": ppl + 1, "tokens": 10}}}
            return {"dtype": "float32", "window": 128, "stride": 64, "sliding": found, "disjoint": found}
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
        case "tokenizer":
            return {"vocab_size": 9}
        case "export":
            return {"low-rank": {"params": 50}}
    return {"params": 100, "mlp_params": 60, "tokens": 5}


def row(summary, stage):
    return next(r for r in summary["rows"] if r["stage"] == stage)


def test_rows_come_in_order_with_the_controls_beside(summary):
    assert [r["stage"] for r in summary["rows"]] == [
        "Dense",
        "Dense + KD",
        "CE only",
        "KL only",
        "Round 1",
        "Round 2",
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


def test_what_was_there_before_is_marked(summary):
    assert {step["name"] for step in summary["steps"] if step["reused"]} == {"dense"}
