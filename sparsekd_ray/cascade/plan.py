"""What a cascade consists of: a pure function from settings to steps.

A step's fingerprint is a digest of what bears on its numbers: its own settings and its inputs' fingerprints. Nothing
of `execution` enters it, so another store, another number of GPUs or a second machine finds the same artifacts.

    [tokenizer → pretraining text →] dense → corpus → cache(dense) → controls: dense + KD, CE only, KL only
    round: prune(student so far) → distill(on the cache of the round's teacher) → evaluate → export
    one-shot: plain SVD of the dense model to each round's size, all matrices alike, untrained: the collapse
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sparsekd_ray.config import Config, Control, Corpus, Distill, Settings, Source, Standin
from sparsekd_ray.store import Ref

# raised when a stage's code changes what it computes, so that older artifacts are not taken for new ones
VERSIONS = {
    "tokenizer": 1,
    "corpus": 1,
    "dense": 1,
    "cache": 2,
    "prune": 1,
    "distill": 1,
    "evaluate": 1,
    "export": 1,
}


@dataclass(frozen=True)
class Step:
    """One artifact to be made: `inputs` maps a role to the name of the step that makes it."""

    name: str
    kind: str
    ref: Ref
    identity: dict[str, Any]
    inputs: dict[str, str]
    settings: Any = None
    seed: int = 0


Identify = Callable[[Source], dict[str, Any]]


def plan(config: Config, identify: Identify, model_identity: Mapping[str, Any]) -> list[Step]:
    """All steps in an order that respects their inputs.

    `identify` tells what of a text source bears identity (its files' digests, a hub revision);
    `model_identity` does so for a dense model that is not trained here.
    """
    book = _Book()
    if config.model.standin is None:
        label = str(config.model.path).rstrip("/").split("/")[-1][:48]
        book.add("dense", "dense", label, dict(model_identity), {}, config.model)
        _corpus(book, config, identify, "dense")
    else:
        _standin(book, config, config.model.standin, identify)
    _evaluate(book, config, "dense")
    _cache(book, config, "dense", "dense")
    for round_ in config.cascade.rounds:
        name = f"one-shot {_percent(round_.sparsity)}"
        _prune(book, config, name, round_.sparsity, "dense", "uniform")
        _evaluate(book, config, name)
    for seed in config.cascade.seeds:
        _controls(book, config, seed)
        _rounds(book, config, seed)
    return book.steps


class _Book:
    """Steps in order of addition; a step with a fingerprint already there is the same step under its first name."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.names: dict[str, Step] = {}

    def add(
        self,
        name: str,
        kind: str,
        label: str,
        identity: dict[str, Any],
        inputs: dict[str, str],
        settings: Any = None,
        seed: int = 0,
    ) -> None:
        parents = {role: self.names[parent] for role, parent in inputs.items()}
        digest = fingerprint(
            {
                "kind": kind,
                "version": VERSIONS[kind],
                "identity": identity,
                "inputs": {role: parent.ref.fingerprint for role, parent in parents.items()},
            }
        )
        step = Step(
            name,
            kind,
            Ref(kind, label, digest),
            identity,
            {role: parent.name for role, parent in parents.items()},
            settings,
            seed,
        )
        known = next((s for s in self.steps if s.ref == step.ref), None)
        self.names[name] = known or step
        if known is None:
            self.steps.append(step)


def fingerprint(value: Any) -> str:
    """First 12 hex digits of the SHA-256 of `value` as canonical JSON; refuses what has no canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()[:12]


def _corpus(book: _Book, config: Config, identify: Identify, tokenizer: str) -> None:
    book.add(
        "corpus",
        "corpus",
        "-".join(source.name for source in config.corpus.sources)[:48],
        _corpus_identity(config.corpus, identify, config.seed),
        {"tokenizer": tokenizer},
        config.corpus,
        config.seed,
    )


def _standin(book: _Book, config: Config, standin: Standin, identify: Identify) -> None:
    """The calibration text comes before the training, so that a source that is too small is found before the work."""
    sources = standin.sources or tuple(s for s in config.corpus.sources if s.name not in standin.unseen)
    texts = config.corpus.model_copy(
        update={
            "sources": sources,
            "samples": standin.steps * standin.batch,
            "valid_samples": 32,
            "test_samples": 32,
        }
    )
    book.add(
        "tokenizer",
        "tokenizer",
        f"bpe-{standin.vocab}",
        _corpus_identity(texts, identify, config.seed) | {"vocab": standin.vocab},
        {},
        (texts, standin),
        config.seed,
    )
    _corpus(book, config, identify, "tokenizer")
    book.add(
        "pretraining text",
        "corpus",
        "-".join(source.name for source in sources)[:48],
        _corpus_identity(texts, identify, config.seed),
        {"tokenizer": "tokenizer"},
        texts,
        config.seed,
    )
    book.add(
        "dense",
        "dense",
        f"standin-{standin.hidden}x{standin.layers}",
        _plain(standin, "sources", "unseen") | {"seed": config.seed},
        {"texts": "pretraining text"},
        standin,
        config.seed,
    )


def _controls(book: _Book, config: Config, seed: int) -> None:
    for control in config.cascade.controls:
        name = seeded(control, config, seed)
        _distill(book, config, name, _control_settings(control, config.distill), seed, "dense", "cache dense")
        _evaluate(book, config, name)


def _control_settings(control: Control, settings: Distill) -> Distill:
    """Dense + KD trains with both terms, the two others with one each."""
    alpha = {"dense+kd": settings.alpha, "ce-only": 0.0, "kl-only": 1.0}[control]
    return settings.model_copy(update={"alpha": alpha})


def _rounds(book: _Book, config: Config, seed: int) -> None:
    student = "dense"
    for number, round_ in enumerate(config.cascade.rounds, start=1):
        name = seeded(f"round {number}", config, seed)
        teacher = {"dense": "dense", "dense+kd": seeded("dense+kd", config, seed), "previous": student}[
            round_.teacher
        ]
        _prune(book, config, f"{name} pruned", round_.sparsity, student, "tiered")
        _evaluate(book, config, f"{name} pruned")
        _cache(book, config, f"{teacher}", teacher)
        settings = config.distill.model_copy(update={"lr": round_.lr or config.distill.lr})
        _distill(book, config, name, settings, seed, f"{name} pruned", f"cache {teacher}")
        _evaluate(book, config, name)
        book.add(
            f"export {name}",
            "export",
            f"student-minus-{_percent(round_.sparsity).rstrip('%')}",
            {"sparsity": round_.sparsity},
            {"model": name, "figures": f"evaluate {name}", "dense": "evaluate dense"},
        )
        student = name


def _prune(book: _Book, config: Config, name: str, sparsity: float, source: str, allocation: str) -> None:
    align = config.prune.align
    identity = {"method": "svd", "allocation": allocation, "sparsity": sparsity, "align": align}
    label, inputs = f"svd-{allocation}-{_percent(sparsity).rstrip('%')}", {"model": source, "dense": "dense"}
    book.add(name, "prune", label, identity, inputs, (sparsity, align, allocation))


def _cache(book: _Book, config: Config, name: str, teacher: str) -> None:
    book.add(
        f"cache {name}",
        "cache",
        f"top{config.teacher.k}"
        if config.teacher.signal == "topk"
        else f"sampled{config.teacher.bytes_per_token:g}",
        _plain(config.teacher),
        {"teacher": teacher, "texts": "corpus"},
        config.teacher,
    )


def _distill(
    book: _Book, config: Config, name: str, settings: Distill, seed: int, student: str, cache: str
) -> None:
    book.add(
        name,
        "distill",
        f"a{settings.alpha:g}-lr{settings.lr:g}-s{seed}",
        _plain(settings) | {"seed": seed},
        {"student": student, "cache": cache, "texts": "corpus"},
        settings,
        seed,
    )


def _evaluate(book: _Book, config: Config, model: str) -> None:
    identity = _plain(config.evaluate)
    book.add(
        f"evaluate {model}", "evaluate", "ppl", identity, {"model": model, "texts": "corpus"}, config.evaluate
    )


def _corpus_identity(texts: Corpus, identify: Identify, seed: int) -> dict[str, Any]:
    sources = [identify(source) | {"name": source.name, "weight": source.weight} for source in texts.sources]
    return _plain(texts, "sources") | {"sources": sources, "seed": seed}


def _plain(settings: Settings, *without: str) -> dict[str, Any]:
    return settings.model_dump(mode="json", exclude=set(without))


def seeded(name: str, config: Config, seed: int) -> str:
    """A step's name, with its seed where there are several."""
    return name if len(config.cascade.seeds) == 1 else f"{name} · seed {seed}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:g}%"
