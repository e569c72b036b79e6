"""The comparison of methods: names of variants, steps made once, rows out of records, the drawing, the command."""

import json
from pathlib import Path
from typing import Any

import pytest
from cascades import TINY, changed
from lines import recorded
from records import record

from sparsekd_ray.cascade import stage_plans
from sparsekd_ray.cascade.steps import Step
from sparsekd_ray.compare import comparison, run
from sparsekd_ray.compare.comparison import rows, title, variant
from sparsekd_ray.config import Config, Prune, parse
from sparsekd_ray.errors import ConfigError
from sparsekd_ray.store import Record, Ref, Store

METHODS = ("svd", "svd-whitened+optimal", "depth", "wanda", "magnitude")
SPARSITIES, DRAWS = (0.25, 0.5), (0, 1, 2)
CALIBRATED = ("svd-whitened+optimal", "depth", "wanda")


def with_temperature() -> Config:
    return changed("teacher.temperatures", [0.5, 2.0])


def planned(
    methods: tuple[str, ...] = METHODS, distilled: bool = False
) -> tuple[list[Step], dict[str, Step]]:
    arguments = (methods, SPARSITIES, DRAWS, distilled)
    return comparison.plan(with_temperature(), *arguments, lambda source: {"path": source.path}, {})


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("svd", {"allocation": "uniform"}),
        ("svd+tiered", {"allocation": "tiered"}),
        ("svd-whitened+optimal+gauge", {"allocation": "optimal", "storage": "gauge"}),
        ("svd-whitened+bias", {"allocation": "uniform", "bias": True}),
        ("neurons", {"allocation": "uniform"}),
        ("depth+influence", {"allocation": "uniform", "drop": "influence"}),
    ],
)
def test_a_variant_is_a_method_and_what_differs_from_its_plainest_form(
    text: str, changes: dict[str, Any]
) -> None:
    elsewhere = {"storage": "gauge", "drop": "influence", "score": "leverage", "allocation": "energy"}
    base = Prune(align=8, alpha=0.1, **elsewhere)
    expected = Prune(method=text.partition("+")[0], align=8, alpha=0.1, **changes)  # type: ignore[arg-type]
    assert variant(text, base) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("svdd", "no pruning method 'svdd': give one of svd, svd-whitened"),
        ("svd+guage", r"any of .*\+gauge"),
        ("", "no pruning method ''"),
        ("svd+bias", r"\+bias changes nothing in svd"),
        ("neurons+optimal", r"\+optimal changes nothing in neurons"),
        ("svd+influence", r"\+influence changes nothing"),
    ],
)
def test_what_is_no_variant_is_explained(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        variant(text, Prune())


def test_what_no_draw_changes_is_made_once() -> None:
    steps, names = planned()
    assert len({step.ref for step in steps}) == len(steps)
    kinds = [step.kind for step in steps]
    assert kinds.count("statistics") == len(DRAWS), "for all methods and sizes together"
    calibrated = len(CALIBRATED) * len(DRAWS) + len(METHODS) - len(CALIBRATED)
    assert kinds.count("prune") == calibrated * len(SPARSITIES)
    assert kinds.count("evaluate") == 1 + calibrated * len(SPARSITIES) and kinds.count("distill") == 0
    for text in METHODS:
        made = {names[title(text, 0.25, draw)].ref for draw in DRAWS}
        assert len(made) == (len(DRAWS) if text in CALIBRATED else 1)
        for draw in DRAWS:
            evaluation = names[f"evaluate {title(text, 0.25, draw)}"]
            assert evaluation.inputs["model"] == names[title(text, 0.25, draw)].name
    done: set[str] = set()
    for step in steps:
        assert set(step.inputs.values()) <= done
        done.add(step.name)


def test_the_first_draw_of_each_is_distilled_from_one_cache() -> None:
    steps, names = planned(distilled=True)
    trained = [step for step in steps if step.kind == "distill"]
    assert len(trained) == len(METHODS) * len(SPARSITIES)
    assert {step.inputs["cache"] for step in trained} == {"cache dense"}
    assert {step.inputs["student"] for step in trained} == {
        names[title(text, sparsity, 0)].name for text in METHODS for sparsity in SPARSITIES
    }


def test_variants_of_one_method_are_steps_of_their_own() -> None:
    _, names = planned(("svd", "svd+uniform", "svd+optimal", "svd+optimal+gauge"))
    refs = [
        names[title(text, 0.25, 0)].ref for text in ("svd", "svd+uniform", "svd+optimal", "svd+optimal+gauge")
    ]
    assert refs[0] == refs[1] and len(set(refs)) == 3


def records(distilled: bool) -> dict[str, tuple[Step, Record]]:
    """Made-up figures by every name of the plan: perplexity 10 · 2^sparsity + draw."""
    made = {}
    for name, step in planned(distilled=distilled)[1].items():
        metrics: dict[str, Any] = {"params": 1000, "mlp_params": 800}
        if step.kind == "prune":
            metrics |= {"mlp_params": round(800 * (1 - step.settings.sparsity)), "predicted_loss": 0.5}
            metrics |= {"sparsity": step.settings.sparsity}
        if step.kind == "evaluate":
            ppl = 8.0 if "distilled" in name else 10.0 + float(name[-1]) if "draw" in name else 5.0
            metrics = {"paper": {"ppl": ppl, "domains": {"prose": {"ppl": ppl}, "code": {"ppl": 2 * ppl}}}}
        made[name] = step, record(step.ref, metrics, seconds=3.0)
    return made


@pytest.mark.parametrize("distilled", [False, True])
def test_rows_are_means_over_draws_beside_the_dense_model(distilled: bool) -> None:
    dense, *students = rows(records(distilled), METHODS, SPARSITIES, DRAWS)
    assert (dense["method"], dense["ppl_all"], dense["sparsity"]) == ("dense", 5.0, 0.0)
    assert [(row["method"], row["sparsity"]) for row in students] == [
        (text, sparsity) for sparsity in SPARSITIES for text in METHODS
    ]
    for row in students:
        assert row["mlp_params"] == 800 * (1 - row["sparsity"]) and row["seconds"] == 3.0
        assert row["ppl_all"] == 11.0 and row["ppl_std"] == 1.0
        assert row["ppl"] == {"prose": 11.0, "code": 22.0}
        assert row["ppl_after"] == (8.0 if distilled else None)
        assert row["ppl_after_by_corpus"] == ({"prose": 8.0, "code": 16.0} if distilled else None)
    assert students[1]["allocation"] == "optimal" and students[2]["allocation"] == "uniform"
    speeds = {key for key in comparison.SHOWN if key.endswith(("_speedup", "_limit", "_per_token"))}
    assert set(comparison.SHOWN) - set(dense) == speeds, "which are measured afterwards"
    json.dumps(rows(records(distilled), METHODS, SPARSITIES, DRAWS), allow_nan=False)


@pytest.mark.parametrize("distilled", [False, True])
def test_the_drawing_is_a_png(distilled: bool, tmp_path: Path) -> None:
    path = tmp_path / "comparison.png"
    comparison.draw(rows(records(distilled), METHODS, SPARSITIES, DRAWS), path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("methods", "sparsity", "message"),
    [
        (("svd",), 0.9999, "--sparsity 0.9999: svd: asks for .* can remove at most"),
        (("svd-whitened+gauge",), 0.9999, "can remove at most"),
        (("magnitude", "neurons"), 0.9999, "--sparsity 0.9999: neurons: .* ask for a sparsity"),
        (("depth",), 0.05, "--sparsity 0.05: depth: .* whole layers allow"),
        (("sdm",), 0.9999, "--sparsity 0.9999: sdm"),
        (
            ("sdm",),
            0.5,
            r"prune.temperature 0.5, but the cache will hold only .*: add it to teacher.temperatures",
        ),
    ],
)
def test_a_comparison_out_of_reach_is_refused_before_any_work(
    methods: tuple[str, ...], sparsity: float, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "make", lambda *_: pytest.fail("work was begun"))
    config = changed("teacher.temperatures", [1.5, 2.0])
    with pytest.raises(ConfigError, match=message):
        run.compare(config, methods, (sparsity,), (0,), False, "command", False)


def test_one_pruning_out_of_reach_is_refused_before_any_work() -> None:
    with pytest.raises(ConfigError, match="can remove at most"):
        stage_plans.prune(changed("prune.align", 64), 0.9)


def test_both_commands_from_the_text_to_the_table(cluster: None, tmp_path: Path) -> None:
    settings = {
        "execution": {"store": str(tmp_path)},
        "calibrate": {"samples": 8},
        "prune": {"method": "neurons"},
    }
    config = parse(TINY | settings, "test")
    *layers, total = stage_plans.preview(config, 0.5, dry_run=False)["rows"]
    store = Store(str(tmp_path))
    assert not list(tmp_path.glob("artifacts/prune/*/*")), "nothing is pruned by a preview"
    assert [row["becomes"] for row in layers] == ["24 neurons"] * 2 and total["becomes"] == "−50.00%"
    with recorded():
        found = run.compare(config, ("svd", "neurons"), (0.5,), (0,), False, "command", False)
    assert [row["method"] for row in found] == ["dense", "svd", "neurons"]
    assert all(row["prefill_speedup"] > 0 < row["decode_speedup"] for row in found[1:])
    assert found[1]["flops_per_token"] < found[0]["flops_per_token"] > found[2]["flops_per_token"]
    kept = json.loads(store.read_text("runs/tiny/comparison.json") or "")
    assert (
        kept["rows"] == found
        and kept["command"] == "command"
        and kept["device"] == "cpu"
        and "stride 16" in kept["protocol"]
    )
    assert (tmp_path / "runs/tiny/comparison.png").is_file()
    with recorded() as lines:
        result = stage_plans.run(config, "prune", stage_plans.prune(config, 0.5), dry_run=False)
    assert "pruned" in result["reused"] and result["made"] == ["export pruned"], "the comparison made it"
    assert "from_pretrained(" in lines[-1] and "trust_remote_code" not in lines[-1]
    assert Ref.from_key(result["artifact"].removeprefix(f"{tmp_path}/")).kind == "export"
    assert set(result["perplexity"]) == {"dense", "pruned"}
