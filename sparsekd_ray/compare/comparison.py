"""Compares pruning methods at equal sizes: the plan of a comparison, and its table from the finished records.

Every student comes from the same dense model. It is evaluated untrained and, on request, again after the same short
distillation from the same cache. A calibrated method prunes several times, each with another sample of the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal, get_args, get_origin

from sparsekd_ray.cascade import steps
from sparsekd_ray.cascade.steps import Identify, PlanBuilder, Step
from sparsekd_ray.config import Config, Prune
from sparsekd_ray.errors import ConfigError
from sparsekd_ray.prune.methods import METHODS
from sparsekd_ray.store import Record

ALL = tuple(f"{method.name}{variant}" for method in METHODS.values() for variant in method.variants)
SPARSITIES = (0.15, 0.35, 0.5, 0.65)
SHOWN = (
    "method", "allocation", "sparsity", "removed", "mlp_params", "ppl_all", "ppl_std", "ppl_after", "predicted_loss",
    "seconds", "flops_per_token", "prefill_speedup", "prefill_limit", "decode_speedup", "decode_limit",
)  # fmt: skip


def _choices() -> dict[str, dict[str, Any]]:
    """The settings of every `+change`: a value of a pruning setting that has named values, or True for a switch."""
    changes: dict[str, dict[str, Any]] = {}
    for name, field in Prune.model_fields.items():
        if get_origin(field.annotation) is Literal and name != "method":
            changes |= {value: {name: value} for value in get_args(field.annotation)}
        elif field.annotation is bool:
            changes[name] = {name: True}
    return changes


CHANGES = _choices()
PLAINEST = {key: Prune.model_fields[key].default for change in CHANGES.values() for key in change}
PLAINEST |= {"allocation": "uniform"}


def variant(text: str, base: Prune) -> Prune:
    """`svd-whitened+optimal+gauge` → settings: a method, and its differences from the method's plainest form."""
    name, *changes = text.split("+")
    unknown = [change for change in changes if change not in CHANGES]
    if name not in METHODS or unknown:
        raise ConfigError(
            f"no pruning method {text!r}: give one of {', '.join(METHODS)}, followed by any of "
            f"{', '.join('+' + change for change in CHANGES)}"
        )
    idle = [change for change in changes if not CHANGES[change].keys() & set(METHODS[name].settings)]
    if idle:
        raise ConfigError(f"{text!r}: +{idle[0]} changes nothing in {name}; leave it out")
    values = PLAINEST | {"method": name}
    for change in changes:
        values |= CHANGES[change]
    return base.model_copy(update=values)


def ignored(settings: Prune) -> list[str]:
    """Changed settings that a comparison does not use, because the names of its methods state them."""
    values = {name: getattr(settings, name) for name in ("method", *PLAINEST)}
    return [
        f"prune.{name} {value}" for name, value in values.items() if value != Prune.model_fields[name].default
    ]


def plan(
    config: Config,
    methods: Sequence[str],
    sparsities: Sequence[float],
    draws: Sequence[int],
    distilled: bool,
    identify: Identify,
    model_identity: Mapping[str, Any],
) -> tuple[list[Step], dict[str, Step]]:
    """Plans every method at every sparsity and calibration draw; with `distilled`, the first draw is distilled too.

    Returns the steps, and for every name its step. Names whose steps are equal in all draws share one step.
    """
    builder = PlanBuilder(config)
    steps.dense(builder, identify, model_identity)
    variants = [(text, sparsity, draw) for sparsity in sparsities for text in methods for draw in draws]
    for text, sparsity, draw in variants:
        name = title(text, sparsity, draw)
        steps.prune(
            builder, name, sparsity, "dense", variant(text, config.prune), config.calibrate.seed + draw
        )
        steps.evaluate(builder, name)
    for text, sparsity, draw in variants:
        if distilled and draw == draws[0]:
            name, signal, seed = (
                title(text, sparsity, draw),
                steps.cache(builder, "dense"),
                config.cascade.seeds[0],
            )
            steps.distill(builder, f"{name} distilled", config.distill, seed, name, signal)
            steps.evaluate(builder, f"{name} distilled")
    return builder.steps, builder.names


def title(text: str, sparsity: float, draw: int) -> str:
    return f"{text} {steps.percent(sparsity)} draw {draw}"


def rows(
    made: Mapping[str, tuple[Step, Record]],
    methods: Sequence[str],
    sparsities: Sequence[float],
    draws: Sequence[int],
) -> list[dict[str, Any]]:
    """One row per method and sparsity. `made`: name in the plan → step and record."""

    def figures(model: str) -> dict[str, Any]:
        return made[f"evaluate {model}"][1].metrics["paper"]

    table = [_row("dense", "–", 0.0, [figures("dense")]) | _sizes(made["dense"][1].metrics)]
    for sparsity in sparsities:
        for text in methods:
            names = [title(text, sparsity, draw) for draw in draws]
            first, record = made[names[0]]
            row = _row(
                text, first.identity.get("allocation", "uniform"), sparsity, [figures(n) for n in names]
            )
            row |= _sizes(record.metrics) | {
                "removed": record.metrics["sparsity"],
                "artifact": first.ref.key,
                "predicted_loss": record.metrics.get("predicted_loss"),
                "seconds": record.seconds,
            }
            if (after := f"{names[0]} distilled") in made:
                row |= {"ppl_after": figures(after)["ppl"], "ppl_after_by_corpus": _domains([figures(after)])}
            table.append(row)
    return table


def protocol(config: Config, records: Mapping[str, Record], draws: Sequence[int]) -> str:
    """The protocol of the figures, in words."""
    dense = records["evaluate dense"].metrics
    dtypes = sorted({record.metrics["dtype"] for record in records.values() if record.ref.kind == "evaluate"})
    rounding = "; small differences between figures of two types may be rounding" if len(dtypes) > 1 else ""
    return (
        f"Protocol `paper`: {dense['paper']['sentence']}; computed in {' and '.join(dtypes)}{rounding}. "
        f"Statistics of {config.calibrate.samples} training sequences, {len(draws)} "
        f"draw{'s' if len(draws) > 1 else ''} of them. Distillation, where done: of the first draw, "
        f"seed {config.cascade.seeds[0]}, {config.distill.epochs:g} × {config.corpus.samples} sequences of "
        f"{config.corpus.seq_len}, learning rate {config.distill.lr:g}."
    )


def _row(method: str, allocation: str, sparsity: float, figures: list[dict[str, Any]]) -> dict[str, Any]:
    totals = [figure["ppl"] for figure in figures]
    spread = stdev(totals) if len(totals) > 1 else 0.0
    named = {"method": method, "allocation": allocation, "sparsity": sparsity}
    unknown = dict.fromkeys(("removed", "ppl_after", "ppl_after_by_corpus", "predicted_loss", "seconds"))
    return named | {"ppl_all": fmean(totals), "ppl_std": spread, "ppl": _domains(figures)} | unknown


def _domains(figures: list[dict[str, Any]]) -> dict[str, float]:
    return {name: fmean(f["domains"][name]["ppl"] for f in figures) for name in figures[0]["domains"]}


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws perplexity over counted sparsity, one line per method: untrained and, if measured, after distillation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dense, *students = rows
    fields = ["ppl_all"] + ["ppl_after"] * any(row["ppl_after"] for row in students)
    figure, panels = plt.subplots(
        1, len(fields), figsize=(6.2 * len(fields), 4.2), layout="constrained", squeeze=False
    )
    for axes, field in zip(panels[0], fields, strict=True):
        for method in dict.fromkeys(row["method"] for row in students):
            line = [row for row in students if row["method"] == method]
            counted = [100 * (1 - row["mlp_params"] / dense["mlp_params"]) for row in line]
            axes.plot(counted, [row[field] for row in line], "o-", label=method)
        axes.axhline(dense["ppl_all"], color="grey", linestyle=":", label="dense")
        axes.set(yscale="log", xlabel="MLP parameters removed, %", ylabel="held-out perplexity")
        axes.set_title("right after pruning" if field == "ppl_all" else "after the same distillation")
    panels[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _sizes(metrics: Mapping[str, Any]) -> dict[str, int]:
    return {"params": metrics["params"], "mlp_params": metrics["mlp_params"]}
