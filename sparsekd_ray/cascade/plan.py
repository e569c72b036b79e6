"""What a cascade consists of: a pure function from settings to steps.

[tokenizer → pretraining text →] dense → corpus → cache(dense) → controls: dense + KD, CE only, KL only
round: [statistics →] prune(student so far) → distill(on the cache of the round's teacher) → evaluate → export
one-shot: plain SVD of the dense model to each round's size, all matrices alike, untrained: the collapse
beside: the dense model pruned once by another method → distill → evaluate → export
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsekd_ray.cascade.steps import (
    Book,
    Identify,
    Step,
    cache,
    dense,
    distill,
    evaluate,
    export,
    percent,
    prune,
    seeded,
)
from sparsekd_ray.config import Config, Control, Distill, Prune

PLAIN = Prune(method="svd", allocation="uniform")


def plan(config: Config, identify: Identify, model_identity: Mapping[str, Any]) -> list[Step]:
    """All steps in an order that respects their inputs.

    `identify` tells what of a text source bears identity (its files' digests, a hub revision);
    `model_identity` does so for a dense model that is not trained here.
    """
    book = Book(config)
    dense(book, identify, model_identity)
    cache(book, "dense")
    for round_ in config.cascade.rounds:
        name = f"one-shot {percent(round_.sparsity)}"
        settings = PLAIN.model_copy(update={"align": config.prune.align})
        prune(book, name, round_.sparsity, "dense", settings)
        evaluate(book, name)
    for seed in config.cascade.seeds:
        _controls(book, config, seed)
        _rounds(book, config, seed)
        _beside(book, config, seed)
    return book.steps


def _controls(book: Book, config: Config, seed: int) -> None:
    for control in config.cascade.controls:
        name = seeded(control, config, seed)
        distill(book, name, _control_settings(control, config.distill), seed, "dense", "cache dense")
        evaluate(book, name)


def _control_settings(control: Control, settings: Distill) -> Distill:
    """Dense + KD trains with both terms, the two others with one each."""
    alpha = {"dense+kd": settings.alpha, "ce-only": 0.0, "kl-only": 1.0}[control]
    return settings.model_copy(update={"alpha": alpha})


def _rounds(book: Book, config: Config, seed: int) -> None:
    student = "dense"
    for number, round_ in enumerate(config.cascade.rounds, start=1):
        name = seeded(f"round {number}", config, seed)
        teacher = {"dense": "dense", "dense+kd": seeded("dense+kd", config, seed), "previous": student}[
            round_.teacher
        ]
        settings = config.distill.model_copy(update={"lr": round_.lr or config.distill.lr})
        _student(book, name, round_.sparsity, student, teacher, config.prune, settings, seed)
        student = name


def _beside(book: Book, config: Config, seed: int) -> None:
    for branch in config.cascade.beside:
        teacher = seeded("dense+kd", config, seed) if branch.teacher == "dense+kd" else "dense"
        pruning = config.prune.model_copy(update={"method": branch.method, "allocation": branch.allocation})
        changed = {key: value for key in ("lr", "epochs") if (value := getattr(branch, key)) is not None}
        settings = config.distill.model_copy(update=changed)
        name = seeded(branch.title, config, seed)
        _student(book, name, branch.sparsity, "dense", teacher, pruning, settings, seed)


def _student(
    book: Book,
    name: str,
    sparsity: float,
    source: str,
    teacher: str,
    pruning: Prune,
    settings: Distill,
    seed: int,
) -> None:
    """Prune, distill, judge before and after, export."""
    prune(book, f"{name} pruned", sparsity, source, pruning)
    evaluate(book, f"{name} pruned")
    cache(book, teacher)
    distill(book, name, settings, seed, f"{name} pruned", f"cache {teacher}")
    evaluate(book, name)
    export(book, name, sparsity, pruning.method)
