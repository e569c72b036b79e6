"""The report of a cascade: sentences against figures worked out by hand, files against what they hold."""

import copy
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sparsekd_ray.report.checks import checks
from sparsekd_ray.report.document import FIELDS
from sparsekd_ray.report.findings import findings, headline
from sparsekd_ray.report.formatting import count, number, percent, signed
from sparsekd_ray.report.graph import drawn_inputs, graph, lanes
from sparsekd_ray.report.render import flat, render

LOAD = (
    "from transformers import AutoModelForCausalLM as M; print(M.from_pretrained('runs/artifacts/export/r3'))"
)
DOMAINS = {  # train tokens, test tokens, in dense training
    "docstrings": (420_000, 40_064, True),
    "code": (450_000, 50_048, True),
    "arithmetic": (260_000, 19_968, True),
    "topics": (300_000, 20_096, False),
}
SEEDS = (42, 123, 456)
BUDGET = (131_072, 1e-3, "budget")  # tokens trained on, learning rate, why it stopped
TWICE, THRICE = (262_144, 1e-3, "minimum"), (393_216, 2e-3, "saturation")
MODELS: list[tuple[Any, ...]] = [
    # stage, requested and counted sparsity, parameters, teacher, one-shot, pre, post, by domain, training
    ("Dense", 0, 0.0, 1_003_648, None, None, None, 34.5, (58.9, 26.4, 5.02, 176.0), (0, None, None)),
    ("Dense + KD", 0, 0.0, 1_003_648, "dense", None, None, 29.3, (56.8, 25.7, 5.05, 77.5), BUDGET),
    ("CE only", 0, 0.0, 1_003_648, None, None, None, 29.5, (57.1, 25.9, 5.11, 76.9), BUDGET),
    ("KL only", 0, 0.0, 1_003_648, "dense", None, None, 34.55, (58.7, 26.5, 5.03, 177.2), BUDGET),
    ("Round 1", 0.15, 0.1501, 922_400, "dense", 38.3, 38.3, 30.0, (57.9, 26.3, 5.13, 80.4), BUDGET),
    ("Round 2", 0.35, 0.3499, 814_240, "dense+kd", 53.2, 44.1, 31.4, (60.2, 27.8, 5.22, 85.9), TWICE),
    ("Round 3", 0.65, 0.6502, 651_776, "previous", 293.0, 96.7, 36.2, (69.8, 32.5, 5.6, 104.0), THRICE),
]  # fmt: skip

BASELINE: list[tuple[Any, ...]] = [
    ("neurons 65%", 0.65, 0.6494, 652_208, "dense", None, 61.7, 33.1, (63.9, 28.8, 5.31, 99.2), BUDGET),
    ("depth 50%", 0.5, 0.5, 669_312, "dense+kd", None, 180.2, 41.9, (80.2, 38.1, 6.01, 140.0), BUDGET),
]  # fmt: skip


def row(model: tuple[Any, ...], seeds: list[int]) -> dict[str, Any]:
    stage, requested, sparsity, params, teacher, oneshot, pre, ppl, domains, training = model
    tokens, lr, stopped = training
    pruned = requested > 0
    kind = "baseline" if stage.endswith("%") else "round" if pruned else "control"
    spread = [0.0] if len(seeds) == 1 or stage == "Dense" else [-0.3, 0.1, 0.2]
    slug = stage.lower().replace(" ", "-")
    return {
        "stage": stage,
        "kind": "dense" if stage == "Dense" else kind,
        "method": {"control": None, "round": "svd, tiered", "baseline": stage.split()[0]}[kind],
        "sparsity_requested": requested,
        "sparsity": sparsity,
        "params": params,
        "mlp_params": params - 462_976,
        "teacher": teacher,
        "teacher_ppl": {"dense": 34.5, "dense+kd": 29.3, "previous": 31.4, None: None}[teacher],
        "oneshot_ppl": oneshot,
        "pre_ppl": pre,
        "ppl": ppl,
        "std": 0.26 if len(spread) > 1 else None,
        "per_seed": {str(seed): ppl + by for seed, by in zip(seeds, spread * len(seeds), strict=False)},
        "gptq_ppl": ppl * 1.06,
        "words_ppl": ppl * 9.1,
        "domains": dict(zip(DOMAINS, domains, strict=True)),
        "vs_dense": ppl / 34.5 - 1,
        "recovered": (pre - ppl) / (pre - 34.5) if pruned else None,
        "trained_tokens": tokens,
        "lr": lr,
        "stopped": stopped,
        "artifact": f"artifacts/model/{slug}-3f2a9c01",
        "export": f"artifacts/export/{slug}-77b1d2e4" if pruned else None,
    }


def curve(stage: str, seed: int, start: float, end: float) -> dict[str, Any]:
    bump = 0.3 * (seed % 5)
    points = [
        {
            "step": step,
            "tokens": step * 1024,
            "valid_ppl": end + bump + (start - end) * 0.5 ** (step / 18) + (0.4 if step > 112 else 0),
            "valid_domains": dict.fromkeys(DOMAINS, end),
        }
        for step in range(0, 129, 16)
    ]
    return {"stage": stage, "seed": seed, "best_step": 112, "points": points}


def chain() -> list[tuple[str, str, list[str], float, str]]:
    """name, kind, inputs, seconds, figure of each step of the laptop's cascade."""
    models = [
        ("dense+kd", ["dense", "cache dense"]),
        ("ce only", ["dense"]),
        ("kl only", ["dense", "cache dense"]),
    ]
    steps = [
        ("corpus", "corpus", [], 14.2, "1.43 M tokens"),
        ("dense", "train", ["corpus"], 104.7, "PPL 34.5"),
        ("eval dense", "evaluate", ["corpus", "dense"], 1.3, "PPL 34.50"),
        ("cache dense", "cache", ["corpus", "dense"], 7.5, "131 k tokens, 71 B/token"),
    ]
    for name, inputs in models:
        steps += [(name, "distill", ["corpus", *inputs], 14.9, "best at step 112")]
        steps += [(f"eval {name}", "evaluate", ["corpus", name], 1.3, "PPL 29.30")]
    for percent_ in (15, 35, 65):
        steps += [
            (f"svd −{percent_} %", "prune", ["dense"], 0.4, f"−{percent_}.01 % of MLP, 922,400 parameters")
        ]
        steps += [(f"eval svd −{percent_} %", "evaluate", ["corpus", f"svd −{percent_} %"], 1.2, "PPL 53.20")]
    previous, teachers = "dense", ("cache dense", "cache dense+kd", "cache r2")
    for i, teacher in enumerate(teachers, 1):
        if i > 1:
            source = teacher.removeprefix("cache ").replace("r2", "r2 distill")
            steps += [(teacher, "cache", ["corpus", source], 7.4, "131 k tokens, 71 B/token")]
        steps += [
            (f"r{i} prune", "prune", [previous], 0.4, "−34.99 % of MLP, 814,240 parameters"),
            (f"r{i} eval pruned", "evaluate", ["corpus", f"r{i} prune"], 1.2, "PPL 38.30"),
            (f"r{i} distill", "distill", ["corpus", f"r{i} prune", teacher], 15.6, "PPL 30.10 at step 112"),
            (f"r{i} evaluate", "evaluate", ["corpus", f"r{i} distill"], 1.3, "PPL 30.00"),
            (f"r{i} export", "export", [f"r{i} distill"], 0.9, "3.7 MB"),
        ]
        previous = f"r{i} distill"
    return steps


def sample(seeds: tuple[int, ...] = (42,)) -> dict[str, Any]:
    """A run in the style of a laptop's: three rounds, three controls, four domains."""
    rows = [row(model, list(seeds)) for model in MODELS]
    curves = [
        curve(r["stage"], seed, (r["pre_ppl"] or 34.5) * 1.02, r["ppl"] * 1.02)
        for r in rows[1:]
        for seed in seeds
    ]
    steps = [
        {
            "name": name,
            "kind": kind,
            "artifact": f"artifacts/{kind}/{name.replace(' ', '-')}-0a1b2c3d",
            "inputs": inputs,
            "seconds": seconds,
            "reused": kind in ("corpus", "train"),
            "figure": figure,
        }
        for name, kind, inputs, seconds, figure in chain()
    ]
    return {
        "run": "laptop",
        "created": "2026-09-01T12:34:56+00:00",
        "command": "ray job submit --working-dir . -- python jobs/cascade.py --config laptop.yaml",
        "seconds": 251.3,
        "seeds": list(seeds),
        "protocol": {
            "window": 128,
            "stride": 64,
            "sentence": "Windows of 128 tokens with stride 64, every prediction of every window counted.",
            "mixture": None,
        },
        "corpus": {
            "artifact": "artifacts/corpus/embedded-5c6d7e8f",
            "train_tokens": 1_430_000,
            "domains": {
                name: {"train_tokens": train, "test_tokens": test, "in_dense_training": seen}
                for name, (train, test, seen) in DOMAINS.items()
            },
            "warning": None,
        },
        "dense": {
            "artifact": "artifacts/model/dense-3f2a9c01",
            "params": 1_003_648,
            "mlp_params": 540_672,
            "note": "a stand-in of the Phi-3 architecture, small and partly trained: not a large model.",
        },
        "rows": rows,
        "curves": curves,
        "steps": steps,
        "settings": {
            "corpus": {"seq_len": 128, "sources": [{"kind": "embedded", "weight": 1.0}], "held_out": 0.05},
            "dense": {"hidden": 128, "intermediate": 352, "layers": 4, "steps": 760, "lr": 0.02},
            "cache": {"k": 32, "temperatures": [1.5, 2, 4]},
            "distill": {"temperature": 2, "alpha": 0.5, "lr": 0.001, "betas": [0.9, 0.95], "tail": "bucket"},
            "rounds": [{"sparsity": 0.15, "teacher": "dense"}, {"sparsity": 0.35, "teacher": "dense+kd"}],
            "seeds": list(seeds),
            "execution": {"store": "runs", "workers": 2, "tracker": None, "tags": {}},
        },
        "commands": [
            {"what": "load the model", "command": f'python -c "{LOAD}"'},
            {"what": "show the plan", "command": "python jobs/cascade.py --dry-run"},
        ],
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "ray": "2.60.0", "python": "3.11.7"},
        "hardware": "2 CPU cores, fp32 because this CPU has no bf16",
    }  # fmt: skip


def with_baselines(seeds: tuple[int, ...] = (42,)) -> dict[str, Any]:
    """The sample and two students by other methods: one of the last round's size, one of no round's."""
    summary = sample(seeds)
    added = [row(model, list(seeds)) for model in BASELINE]
    summary["rows"] += added
    summary["curves"] += [curve(r["stage"], seed, r["pre_ppl"], r["ppl"]) for r in added for seed in seeds]
    return summary


LONG = "a-name-of-a-stage-that-goes-on-and-on-without-any-place-to-break-it-" * 2
EVIL = '<script>alert("1")</script> & | `x` $\\frac{1}$ ](javascript:1)'


def adverse() -> dict[str, Any]:
    """Little recovered, one domain, no curve for a stage, long and hostile names, a perplexity of 1e6."""
    summary = sample()
    dense, kd, *_, first, _, last = summary["rows"]
    first |= {"stage": LONG, "oneshot_ppl": None, "pre_ppl": 34.6, "ppl": 41.4, "vs_dense": 0.2}
    first |= {"recovered": (34.6 - 41.4) / (34.6 - 34.5)}
    last |= {"stage": EVIL, "oneshot_ppl": 41.4, "pre_ppl": 2e6, "ppl": 1e6, "vs_dense": 1e6 / 34.5 - 1}
    last |= {"recovered": (2e6 - 1e6) / (2e6 - 34.5), "lr": None, "sparsity": 0.61, "artifact": f"a/{EVIL}"}
    kd |= {"ppl": 34.9, "vs_dense": 34.9 / 34.5 - 1}
    summary["rows"] = [dense, kd, first, last]
    for r in summary["rows"]:
        r["domains"] = {EVIL: r["ppl"]}
    summary["corpus"]["domains"] = {EVIL: {"train_tokens": 9, "test_tokens": 9, "in_dense_training": True}}
    summary["corpus"]["warning"] = f"The test text of {EVIL} is also in the training mix."
    summary["curves"] = [curve(EVIL, 42, 2e6, 1e6)]
    summary["steps"][3] |= {"name": EVIL, "inputs": ["unknown", LONG], "figure": LONG}
    summary["settings"]["corpus"]["sources"][0]["path"] = EVIL
    summary["commands"].append({"what": EVIL, "command": EVIL})
    summary |= {"run": EVIL, "command": EVIL, "hardware": LONG}
    summary["dense"]["note"] = None
    return summary


def said(summary: dict[str, Any]) -> str:
    return "\n".join(findings(summary))


def controls(kd: float, ce: float, kl: float, seeds: tuple[int, ...] = (42,)) -> dict[str, Any]:
    """The sample with other figures for its controls."""
    summary = sample(seeds)
    for r, ppl in zip(summary["rows"][1:4], (kd, ce, kl), strict=True):
        r["ppl"] = ppl
    return summary


def test_findings_of_a_good_run_are_the_figures_worked_out_by_hand() -> None:
    text = said(sample())
    assert "Plain SVD at 65 % sparsity, without training, has perplexity 293.0: 8.49 × dense (34.50)." in text
    # (96.7 − 36.2) / (96.7 − 34.5), (44.1 − 31.4) / (44.1 − 34.5), (38.3 − 30) / (38.3 − 34.5)
    assert "least first: Round 3 97.3 %, Round 2 132.3 %, Round 1 218.4 % (above 100 %" in text
    assert (
        "Round 1 (15 %), the smallest sparsity, ends at perplexity 30.00: 0.87 × dense (−13.0 %, better)."
        in text
    )
    assert "to within 0.02 % of the MLP parameters" in text
    assert "rises with sparsity, ties aside: 30.00 at 15 %, 31.40 at 35 %, 36.20 at 65 %." in text
    assert (
        "Dense + KD 29.30 (−15.1 %, better); CE only 29.50 (−14.5 %, better); KL only 34.55 (+0.1 %, a tie)."
        in text
    )
    # 77.5 / 176, 76.9 / 176, 177.2 / 176; then the mean log-ratio of the others by test tokens
    assert (
        "Change on text that dense training never saw (topics): Dense + KD −56.0 %, CE only −56.3 %, KL only +0.7 %."
        in text
    )
    # exp((40064 ln(56.8/58.9) + 50048 ln(25.7/26.4) + 19968 ln(5.05/5.02)) / 110080) = exp(−0.02433)
    assert "Change on text that dense training saw (docstrings, code, arithmetic): Dense + KD −2.4 %," in text
    # ln(29.5/34.5) / ln(29.3/34.5) = 0.9584; 16 484 nats of 19 163 in topics
    assert "through cross-entropy, not self-distillation; CE only has 96 % of it." in text
    assert "(Dense + KD against CE only): −0.7 %, a tie." in text
    assert "86 % of Dense + KD's gain in log-perplexity lies in topics: it is mostly new text learnt." in text
    assert (
        "Round 1 (15 %) +2.4 %, worse; Round 2 (35 %) +7.2 %, worse; Round 3 (65 %) +23.5 %, worse." in text
    )
    # (38.3 − 30) / (38.3 − 29.3), …
    assert "the excess over Dense + KD: Round 1 92.2 %, Round 2 85.8 %, Round 3 89.8 %." in text
    assert "as multiples of the 131 k tokens of Dense + KD: Round 2 2.0 ×, Round 3 3.0 ×." in text
    assert "Round 3 (code +23.1 %, topics −40.9 %)" in text
    assert "KL only (" not in text.split("drifted")[1]
    assert "One seed: the spread is not known" in text
    assert [check.met for check in checks(sample())] == [True, True, True]
    assert "Not as expected" not in text


def test_findings_of_an_adverse_run_say_what_does_not_hold() -> None:
    summary = adverse()
    text = said(summary)
    assert [check.met for check in checks(summary)] == [False, False, False]
    assert (
        "Not as expected (at least 5 × dense): Plain SVD at 65 % sparsity" in text and "1.20 × dense" in text
    )
    assert "Not as expected (at least 90 %)" in text and f"least first: {EVIL} 50.0 %." in text
    assert f"at most 1 % above dense, with nothing to recover: {LONG} (34.60 → 41.40)." in text
    assert "Not as expected (at most 1.05 × dense)" in text and "(+20.0 %, worse)" in text
    assert f"Sizes miss the request by more than 0.1 % of the MLP parameters: {EVIL} by 4.00 %." in text
    assert "because these controls are missing: CE only, KL only." in text
    assert "The test text is of one domain, so drift between domains cannot be seen." in text


def test_weights_that_training_did_not_improve_are_called_what_they_are() -> None:
    summary = sample()
    assert "did not improve" not in said(summary)
    summary["curves"][2] |= {"stage": "KL only", "best_step": 0}
    assert "Training did not improve KL only (seed 42)" in said(summary)


@pytest.mark.parametrize(
    ("kd", "ce", "kl", "expected"),
    [
        (29.3, 29.5, 34.55, "through cross-entropy, not self-distillation; CE only has 96 % of it."),
        (29.3, 34.4, 30.0, "through self-distillation, not cross-entropy; KL only has 86 % of it."),
        (29.3, 31.0, 32.0, "through either signal; CE only has 65 % of it; KL only has 46 % of it."),
        (33.0, 34.3, 34.7, "through the two signals together, for neither gains alone."),
        (
            34.4,
            30.0,
            34.5,
            "There is no gain to attribute: Dense + KD is no better than dense (−0.3 %, a tie).",
        ),
        (
            35.0,
            30.0,
            34.5,
            "There is no gain to attribute: Dense + KD is no better than dense (+1.4 %, worse).",
        ),
    ],
)
def test_the_source_of_the_gain_follows_from_the_controls(
    kd: float, ce: float, kl: float, expected: str
) -> None:
    text = said(controls(kd, ce, kl))
    assert expected in text
    assert ("gain in log-perplexity" in text) == expected.startswith("through")


def test_new_text_is_told_from_known_text_only_where_that_is_known() -> None:
    summary = sample()
    about = summary["corpus"]["domains"]
    about["topics"]["in_dense_training"], about["code"]["in_dense_training"] = True, False
    assert "7 % of Dense + KD's gain in log-perplexity lies in code: it is mostly a better fit" in said(
        summary
    )
    about["code"]["in_dense_training"] = True
    assert "more training on known text and not new text" in said(summary)
    about["code"]["in_dense_training"] = None
    assert "It is not known which domains" in said(summary)


def test_ties_are_1_percent_with_one_seed_and_the_standard_deviations_with_several() -> None:
    assert "CE only 34.20 (−0.9 %, a tie)" in said(controls(29.3, 34.2, 34.5))
    assert "CE only 34.10 (−1.2 %, better)" in said(controls(29.3, 34.1, 34.5))
    assert "CE only 34.20 (−0.9 %, better)" in said(controls(29.3, 34.2, 34.5, (42, 123, 456)))  # ± 0.26
    assert "CE only 34.30 (−0.6 %, a tie)" in said(controls(29.3, 34.3, 34.5, (42, 123, 456)))


def test_other_shapes_of_a_run_have_findings_too() -> None:
    summary = sample()
    summary["rows"][5]["ppl"] = 29.0
    assert (
        "does not always rise with sparsity: Round 2 (35 %) at 29.00 beats Round 1 (15 %) at 30.00."
        in said(summary)
    )
    for r in summary["rows"][4:]:
        r["oneshot_ppl"] = None
    assert "The collapse of plain SVD without training was not measured." in said(summary)
    for r in summary["rows"][1:]:
        r["trained_tokens"], r["domains"] = 1000, dict(summary["rows"][0]["domains"])
    assert "equal compute" not in said(summary)
    assert "No drift" in said(summary)
    summary["rows"] = summary["rows"][:1]
    assert "There was no round of pruning." in said(summary)


def test_a_student_beside_the_rounds_is_held_against_the_round_of_its_size() -> None:
    summary = with_baselines()
    text = said(summary)
    # 33.1 / 36.2 − 1; 131 072 / 393 216
    assert (
        "neurons 65% is the dense model pruned once (neurons) and distilled once. It ends at perplexity 33.10. "
        "Against Round 3 (65 %, svd, tiered) at 36.20: −8.6 %, better; not at equal compute, for it trained on "
        "0.33 × the 393 k tokens of Round 3.\n"
    ) in text
    assert "perplexity 41.90. No round removed about as much (50.0 %)." in text
    # 33.1 / 29.3 − 1, (61.7 − 33.1) / (61.7 − 29.3)
    assert "Round 3 (65 %) +23.5 %, worse; depth 50% +43.0 %, worse; neurons 65% +13.0 %, worse." in text
    assert "Round 3 89.8 %, depth 50% 91.7 %, neurons 65% 88.3 %." in text
    assert "to within 0.06 % of the MLP parameters" in text
    assert [check.figure for check in checks(summary)] == [check.figure for check in checks(sample())]
    *_, last, neurons, _ = summary["rows"]
    neurons["trained_tokens"], neurons["ppl"] = last["trained_tokens"], 36.4
    assert "at 36.20: +0.6 %, a tie; at equal compute, the 393 k tokens of Round 3." in said(summary)
    summary["rows"][5]["sparsity"] = 0.6402
    assert "Against Round 2 (64 %, svd, tiered) at 31.40: +15.9 %, worse; not at" in said(summary)


def test_a_run_with_students_beside_no_round_says_so() -> None:
    summary = with_baselines()
    assert headline(summary) == headline(sample())
    summary["rows"] = [r for r in summary["rows"] if r["kind"] != "round"]
    assert headline(summary).endswith("perplexity 34.50. There was no round of pruning.")
    assert "No round removed about as much (64.9 %)." in said(summary)


def test_the_figures_are_named_by_what_was_done_not_by_the_rounds_method() -> None:
    """One-shot is plain SVD at the requested size, whatever whole layers a round removed; a mask removes nothing."""
    summary = sample()
    summary["rows"][-1] |= {"method": "depth", "sparsity": 0.5}
    assert "Plain SVD at 65 % sparsity, without training, has perplexity 293.0" in said(summary)
    assert "Round 3 by 15.00 %" in said(summary)
    summary["rows"][-1] |= {"method": "wanda", "sparsity": 0.65, "params": 1_003_648}
    assert "1.00 M parameters, 65 % of the MLP parameters are held at zero, and" in headline(summary)


class Page(HTMLParser):
    """Checks that tags nest; keeps the text, the tags and the attributes."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        self.text = " ".join(" ".join(self.words).replace("\u00a0", " ").split())
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four reports, drawn once for all tests."""
    folder = tmp_path_factory.mktemp("reports")
    summaries = {
        "good": sample(),
        "seeds": sample(SEEDS),
        "bad": adverse(),
        "baseline": with_baselines(SEEDS),
    }
    for name, summary in summaries.items():
        render(summary, folder / name)
    return folder


@pytest.mark.parametrize("name", ["good", "seeds", "bad", "baseline"])
def test_the_page_is_whole_and_asks_nothing_of_the_network(out: Path, name: str) -> None:
    html = (out / name / "report.html").read_text()
    page = Page(html)
    assert page.count("h1") == 1
    assert page.count("script") == page.count("link") == page.count("img") == page.count("iframe") == 0
    assert "@import" not in html and not re.search(r"url\((?!#)", html)
    for tag, attributes in page.tags:
        for key in ("src", "href", "xlink:href", "action", "data"):
            assert (attributes.get(key) or "#").startswith("#"), (tag, attributes)
        assert not any(key.startswith("on") for key in attributes)
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    targets = re.findall(r'(?:href="|url\()#([^")]+)', html)
    assert targets and set(targets) <= set(identifiers)
    images = [attributes for tag, attributes in page.tags if tag == "svg" and "aria-hidden" not in attributes]
    assert images and all(image["role"] == "img" and image["aria-label"] for image in images)
    headers = [attributes for tag, attributes in page.tags if tag == "th"]
    assert headers and all(header.get("scope") in ("row", "col") for header in headers)


@pytest.mark.parametrize(
    ("name", "make"), [("good", sample), ("bad", adverse), ("baseline", lambda: with_baselines(SEEDS))]
)
def test_everything_of_the_run_is_on_the_page_and_in_the_text(out: Path, name: str, make: Any) -> None:
    summary = make()
    html, markdown = (out / name / "report.html").read_text(), (out / name / "report.md").read_text()
    page = Page(html)
    wanted = [summary["command"], summary["protocol"]["sentence"], summary["hardware"], *findings(summary)]
    wanted += [summary["dense"]["note"] or "", summary["corpus"]["warning"] or ""]
    wanted += [r[key] for r in summary["rows"] for key in ("stage", "method", "artifact", "export") if r[key]]
    wanted += [step[key] for step in summary["steps"] for key in ("name", "kind", "figure", "artifact")]
    wanted += [text for entry in summary["commands"] for text in entry.values()]
    wanted += [text for pair in flat(summary["settings"]) for text in pair]
    wanted += [text for pair in summary["versions"].items() for text in pair]
    plain = re.sub(r"\\([\\`*\[\]|])", r"\1", markdown).replace("&lt;", "<").replace("&amp;", "&")
    plain = f"{plain}\n{markdown}"  # code blocks are not escaped
    for text in wanted:
        assert text in page.text, text
        assert text in plain, text
    assert page.text.count("No curve was kept for this stage.") == (2 if name == "bad" else 0)
    assert "<script" not in re.sub(r"```.*?```", "", markdown, flags=re.DOTALL)


def figure(cell: str) -> float | None:
    text = cell.replace("−", "-").replace(",", "").removeprefix("± ").removesuffix(" %")
    return None if text in ("–", "no excess") else float(text)


@pytest.mark.parametrize(
    ("name", "summary"), [("good", sample()), ("seeds", sample(SEEDS)), ("baseline", with_baselines(SEEDS))]
)
def test_the_markdown_table_holds_the_figures(out: Path, name: str, summary: dict[str, Any]) -> None:
    lines = (
        (out / name / "report.md")
        .read_text()
        .split("## Round by round")[1]
        .split("\n| --- |")[1]
        .splitlines()
    )
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines[1 : 1 + len(summary["rows"])]
    ]
    for r, (stage, *texts) in zip(summary["rows"], cells, strict=True):
        keys = ("sparsity", "oneshot_ppl", "pre_ppl", "ppl", "std", "vs_dense", "recovered")
        found = dict(zip(keys, map(figure, texts), strict=True))
        assert stage == r["stage"]
        for key in keys:
            scale = 100 if key in ("sparsity", "vs_dense", "recovered") else 1
            if r["kind"] == "dense" and key == "vs_dense":
                assert found[key] is None
            else:
                assert found[key] == (None if r[key] is None else pytest.approx(r[key] * scale, abs=0.0501))


def test_students_beside_the_rounds_are_told_apart_and_nothing_of_them_is_said_without_any(out: Path) -> None:
    html, markdown = ((out / "baseline" / name).read_text() for name in ("report.html", "report.md"))
    assert html.count("<tbody") - (out / "seeds" / "report.html").read_text().count("<tbody") == 2
    # in both: figures, students against controls, all columns, domains; on the page their curves too
    assert html.count(">neurons 65%</th>") == markdown.count("\n| neurons 65% |") == 4
    assert html.count("<h3>neurons 65%</h3>") == 1
    assert (
        html.count("baselines, after distillation") == 2 and html.count("baselines, just after pruning") == 1
    )
    for name in ("report.html", "report.md"):
        assert "by the method named" in (out / "baseline" / name).read_text()
        assert "baselines," not in (out / "seeds" / name).read_text()
        assert "by the method named" not in (out / "seeds" / name).read_text()


def test_no_cell_of_a_hostile_markdown_table_is_split(out: Path) -> None:
    markdown = re.sub(r"(`{3,}).*?\1", "", (out / "bad" / "report.md").read_text(), flags=re.DOTALL)
    tables = re.findall(r"(?:^\|.*\n)+", markdown, flags=re.MULTILINE)
    assert len(tables) >= 7
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table


def paths(value: Any, free: set[str], path: str = "") -> set[str]:
    """Every leaf as the glossary names it: [] for an item of a list, * for a key of a free mapping."""
    if isinstance(value, dict) and path not in ("settings.*",):
        open_ended = path in free
        return set().union(
            *(paths(v, free, f"{path}.{'*' if open_ended else k}".lstrip(".")) for k, v in value.items())
        )
    if isinstance(value, list) and path != "settings.*":
        return set().union(*(paths(item, free, f"{path}[]") for item in value))
    return {path}


def test_the_json_is_the_summary_and_documents_every_field(out: Path) -> None:
    document = json.loads((out / "good" / "summary.json").read_text())
    fields, sentences = document.pop("fields"), document.pop("findings")
    assert document == sample() and sentences == findings(sample()) and fields == FIELDS
    free = {
        "corpus.domains",
        "rows[].per_seed",
        "rows[].domains",
        "curves[].points[].valid_domains",
        "settings",
        "versions",
    }
    assert paths(document | {"findings": sentences}, free) == set(FIELDS)
    assert all(len(meaning) > 4 for meaning in FIELDS.values())


def test_the_same_summary_gives_the_same_bytes(out: Path, tmp_path: Path) -> None:
    summary = sample(SEEDS)
    before = copy.deepcopy(summary)
    render(summary, tmp_path)
    assert summary == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.md", "summary.json"]
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (out / "seeds" / path.name).read_bytes()


def test_figures_that_are_not_finite_and_names_that_are_not_text_do_not_stop_a_report(tmp_path: Path) -> None:
    summary = sample()
    summary["rows"] = summary["rows"][:1] + summary["rows"][5:]
    last = summary["rows"][-1]
    last |= {
        "ppl": float("inf"),
        "vs_dense": float("inf"),
        "recovered": float("nan"),
        "pre_ppl": float("nan"),
    }
    last["domains"] = dict.fromkeys(DOMAINS, float("inf"))
    summary["run"] = "caf\udce9"  # how Python reads a file name that is not UTF-8
    summary["curves"][-1]["points"][3]["valid_ppl"] = float("nan")
    render(summary, tmp_path)
    document = json.loads(
        (tmp_path / "summary.json").read_text(), parse_constant=lambda name: pytest.fail(name)
    )
    assert document["rows"][-1]["ppl"] is None
    assert "∞" in Page((tmp_path / "report.html").read_text()).text


@pytest.mark.parametrize("kept", [1, 3])
def test_a_run_without_rounds_has_a_report(tmp_path: Path, kept: int) -> None:
    summary = sample()
    summary |= {"rows": summary["rows"][:kept], "curves": [], "steps": [], "settings": {}, "commands": []}
    render(summary, tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert "Nothing was pruned" in page.text and summary["command"] in page.text


def test_importing_the_report_loads_no_drawing() -> None:
    code = "import sys, sparsekd_ray.report.render; print({'matplotlib', 'jinja2'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_a_drawn_graph_keeps_every_dependence_and_no_lane_is_shared() -> None:
    steps = sample()["steps"]
    drawn = drawn_inputs(steps)
    names = [step["name"] for step in steps]

    def reach(inputs: list[list[int]]) -> list[set[int]]:
        above: list[set[int]] = []
        for direct in inputs:
            above.append(set(direct).union(*(above[j] for j in direct)))
        return above

    everything = [[names.index(name) for name in step["inputs"]] for step in steps]
    assert reach(drawn) == reach(everything)
    for i, inputs in enumerate(drawn):  # no line can be left out
        for j in inputs:
            fewer = [[k for k in line if (n, k) != (i, j)] for n, line in enumerate(drawn)]
            assert reach(fewer) != reach(drawn)
    placed = lanes(drawn)
    for j, lane in enumerate(placed):
        last = max((i for i, inputs in enumerate(drawn) if j in inputs), default=j)
        assert all(placed[i] != lane for i in range(j + 1, last))
    assert max(placed) < 6
    drawing, width = graph(steps)
    assert drawing.count("<circle") == len(steps) and drawing.count("<path") == sum(map(len, drawn))
    assert width < 130


def test_figures_are_written_for_readers() -> None:
    assert [number(x) for x in (21.058, 681.44, 681606.2, 3e7, None)] == [
        "21.06",
        "681.4",
        "681,606",
        "3e+07",
        "–",
    ]
    assert [count(n) for n in (352, 98_304, 1_003_648, 3_836_000_000)] == [
        "352",
        "98.3 k",
        "1.00 M",
        "3.84 B",
    ]
    assert [signed(x) for x in (0.0214, -0.151, 28985.5)] == ["+2.1 %", "−15.1 %", "+2,898,550 %"]
    assert percent(0.1501) == "15.0 %" and percent(-0.5, 0) == "−50 %"


def test_settings_keep_their_dotted_names() -> None:
    tree = {"a": {"b": [1, 2], "c": None}, "rounds": [{"s": 0.15}, {"s": 0.35}], "empty": {}}
    assert list(flat(tree)) == [
        ("a.b", "[1, 2]"), ("a.c", "null"), ("rounds.0.s", "0.15"), ("rounds.1.s", "0.35"), ("empty", "{}"),
    ]  # fmt: skip
