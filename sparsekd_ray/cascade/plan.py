"""The plan of a cascade: a pure function from settings to steps.

[tokenizer → pretraining text →] dense → corpus → cache(dense) → controls: dense + KD, CE only, KL only
round: [statistics →] prune(student so far) → distill(on the cache of the round's teacher) → evaluate → export
one-shot: plain SVD of the dense model to each round's size with uniform ranks, untrained (it shows the collapse)
baselines: the dense model pruned once by another method → distill → evaluate → export
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsekd_ray.cascade.steps import (
    Identify,
    PlanBuilder,
    Step,
    cache,
    dense,
    distill,
    evaluate,
    export,
    percent,
    prune,
)
from sparsekd_ray.config import Config, Control, Distill, Prune

PLAIN = Prune(method="svd", allocation="uniform")


def plan(config: Config, identify: Identify, model_identity: Mapping[str, Any]) -> list[Step]:
    """All steps in an order that respects their inputs.

    `identify` gives the identity of a text source (digests of its files, a hub revision). `model_identity` is that of
    a dense model that is not trained here.
    """
    builder = PlanBuilder(config)
    dense(builder, identify, model_identity)
    cache(builder, "dense")
    for round_ in config.cascade.rounds:
        name = f"one-shot {percent(round_.sparsity)}"
        settings = PLAIN.model_copy(update={"align": config.prune.align})
        prune(builder, name, round_.sparsity, "dense", settings)
        evaluate(builder, name)
    for seed in config.cascade.seeds:
        _controls(builder, config, seed)
        _rounds(builder, config, seed)
        _baselines(builder, config, seed)
    return builder.steps


def _controls(builder: PlanBuilder, config: Config, seed: int) -> None:
    for control in config.cascade.controls:
        name = config.seeded(control, seed)
        distill(builder, name, _control_settings(control, config.distill), seed, "dense", "cache dense")
        evaluate(builder, name)


def _control_settings(control: Control, settings: Distill) -> Distill:
    """Settings of a control. Dense + KD trains with both terms of the loss, CE only and KL only with one."""
    alpha = {"dense+kd": settings.alpha, "ce-only": 0.0, "kl-only": 1.0}[control]
    return settings.model_copy(update={"alpha": alpha})


def _rounds(builder: PlanBuilder, config: Config, seed: int) -> None:
    student = "dense"
    for number, round_ in enumerate(config.cascade.rounds, start=1):
        name = config.seeded(f"round {number}", seed)
        teacher = {"dense": "dense", "dense+kd": config.seeded("dense+kd", seed), "previous": student}[
            round_.teacher
        ]
        settings = config.distill.model_copy(update={"lr": round_.lr or config.distill.lr})
        _student(builder, name, round_.sparsity, student, teacher, config.prune, settings, seed)
        student = name


def _baselines(builder: PlanBuilder, config: Config, seed: int) -> None:
    for baseline in config.cascade.baselines:
        teacher = config.seeded("dense+kd", seed) if baseline.teacher == "dense+kd" else "dense"
        pruning = config.prune.model_copy(
            update={"method": baseline.method, "allocation": baseline.allocation}
        )
        changed = {key: value for key in ("lr", "epochs") if (value := getattr(baseline, key)) is not None}
        settings = config.distill.model_copy(update=changed)
        name = config.seeded(baseline.title, seed)
        _student(builder, name, baseline.sparsity, "dense", teacher, pruning, settings, seed)


def _student(
    builder: PlanBuilder,
    name: str,
    sparsity: float,
    source: str,
    teacher: str,
    pruning: Prune,
    settings: Distill,
    seed: int,
) -> None:
    """Adds one student: prune, distill, evaluate before and after, export."""
    prune(builder, f"{name} pruned", sparsity, source, pruning)
    evaluate(builder, f"{name} pruned")
    cache(builder, teacher)
    distill(builder, name, settings, seed, f"{name} pruned", f"cache {teacher}")
    evaluate(builder, name)
    export(builder, name, sparsity, pruning.method)
