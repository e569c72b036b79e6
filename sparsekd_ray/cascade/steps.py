"""The parts of a plan: steps, and functions that add one step and its inputs to a plan."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sparsekd_ray import corpus
from sparsekd_ray.cascade import fingerprint
from sparsekd_ray.config import (
    Calibrate,
    Config,
    Corpus,
    Distill,
    Evaluate,
    Model,
    Prune,
    Settings,
    Source,
    Standin,
    Teacher,
)
from sparsekd_ray.errors import ConfigError
from sparsekd_ray.model import hub
from sparsekd_ray.prune.methods import METHODS
from sparsekd_ray.store import Ref

logger = logging.getLogger(__name__)

Identify = Callable[[Source], dict[str, Any]]
"""Gives the identity of a text source: digests of its files, or a hub revision."""


@dataclass(frozen=True)
class TokenizerSettings:
    """Settings of the stand-in's tokenizer: the texts that it is trained on, and its vocabulary."""

    texts: Corpus
    standin: Standin


@dataclass(frozen=True)
class PruneSettings:
    """Settings of one pruning: `sparsity` of the dense model's MLP parameters, by the method in `prune`."""

    sparsity: float
    prune: Prune
    calibrate: Calibrate | None
    """None unless the method reads the calibration text: what is not in a step's identity must not reach its method."""


@dataclass(frozen=True)
class ExportSettings:
    """Settings of an export: facts about its student."""

    sparsity: float
    method: str


StepSettings = (
    TokenizerSettings | Corpus | Model | Standin | Teacher | Calibrate | PruneSettings | Distill | Evaluate
    | ExportSettings
)  # fmt: skip
"""There is one type for each function that makes an artifact. `stages` matches on it."""


@dataclass(frozen=True)
class Step:
    """One artifact to be made. `inputs` maps a role to the name of the step that makes it."""

    name: str
    kind: str
    ref: Ref
    identity: dict[str, Any]
    inputs: dict[str, str]
    settings: StepSettings
    seed: int = 0


class PlanBuilder:
    """Collects steps in order. A second step of the same fingerprint is not added: its name stands for the first."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.steps: list[Step] = []
        self.names: dict[str, Step] = {}

    def add(
        self,
        name: str,
        kind: str,
        label: str,
        identity: dict[str, Any],
        inputs: dict[str, str],
        settings: StepSettings,
        seed: int = 0,
    ) -> None:
        parents = {role: self.names[parent] for role, parent in inputs.items()}
        digest = fingerprint.of_step(
            kind, identity, {role: parent.ref.fingerprint for role, parent in parents.items()}
        )
        first_names = {role: parent.name for role, parent in parents.items()}
        step = Step(name, kind, Ref(kind, label, digest), identity, first_names, settings, seed)
        equal = next((s for s in self.steps if (s.kind, s.ref.fingerprint) == (kind, digest)), None)
        self.names[name] = equal or step
        if equal is None:
            self.steps.append(step)


def dense(builder: PlanBuilder, identify: Identify, model_identity: Mapping[str, Any]) -> None:
    """Adds the steps of the dense model, the corpus and the dense model's evaluation."""
    config = builder.config
    standin = config.model.standin
    corpus.check_settings(config.corpus, None if standin else hub.local_directory(config.model))
    _warn_unpinned(config)
    if standin is None:
        builder.add("dense", "dense", hub.label(config.model), dict(model_identity), {}, config.model)
        _corpus(builder, identify, "dense")
    else:
        _standin(builder, config, standin, identify)
    evaluate(builder, "dense")


def _warn_unpinned(config: Config) -> None:
    """One line that names the hub's models and data sets whose contents may change between two runs."""
    model, sources = config.model, (*config.corpus.sources, *config.corpus.exclude)
    names = [s.path for s in sources if s.path.startswith("hf://") and s.path[5:6] != "/" and not s.revision]
    if model.standin is None and hub.local_directory(model) is None and not model.revision:
        names.insert(0, str(model.path))
    if names:
        logger.warning(
            f"no revision is set for {', '.join(names)}: the artifacts are found again although the hub has newer files"
        )


def _corpus(builder: PlanBuilder, identify: Identify, tokenizer: str) -> None:
    config = builder.config
    builder.add(
        "corpus",
        "corpus",
        "-".join(source.name for source in config.corpus.sources)[:48],
        _corpus_identity(config.corpus, identify, config.seed),
        {"tokenizer": tokenizer},
        config.corpus,
        config.seed,
    )


def _standin(builder: PlanBuilder, config: Config, standin: Standin, identify: Identify) -> None:
    """Adds the steps of a stand-in: its tokenizer, the corpus, its pretraining text, its training.

    The corpus comes before the training, so that a source that is too small is found before the work. The test text of
    the calibration mix is excluded from the text of the stand-in and of its tokenizer.
    """
    sources = standin.sources or tuple(s for s in config.corpus.sources if s.name not in standin.unseen)
    texts = config.corpus.model_copy(
        update={
            "sources": sources,
            "samples": standin.steps * standin.batch,
            "valid_samples": 32,
            "exclude": (*config.corpus.sources, *config.corpus.exclude),
        }
    )
    builder.add(
        "tokenizer",
        "tokenizer",
        f"bpe-{standin.vocab}",
        _corpus_identity(texts, identify, config.seed) | {"vocab": standin.vocab},
        {},
        TokenizerSettings(texts, standin),
        config.seed,
    )
    _corpus(builder, identify, "tokenizer")
    builder.add(
        "pretraining text",
        "corpus",
        "-".join(source.name for source in sources)[:48],
        _corpus_identity(texts, identify, config.seed),
        {"tokenizer": "tokenizer"},
        texts,
        config.seed,
    )
    builder.add(
        "dense",
        "dense",
        f"standin-{standin.hidden}x{standin.layers}",
        _values(standin, "sources", "unseen") | {"seed": config.seed},
        {"texts": "pretraining text"},
        standin,
        config.seed,
    )


def prune(
    builder: PlanBuilder, name: str, sparsity: float, source: str, settings: Prune, seed: int | None = None
) -> None:
    """Adds a pruned model, and before it the statistics or the cache that its method needs.

    seed: draws the calibration sequences; by default `calibrate.seed`.
    """
    calibrate = builder.config.calibrate
    if seed is not None:
        calibrate = calibrate.model_copy(update={"seed": seed})
    method = METHODS[settings.method]
    settings, inputs = method.only_read(settings), {"model": source, "dense": "dense"}
    identity = settings.model_dump(mode="json", include={"method", *method.settings}) | {"sparsity": sparsity}
    needs = method.inputs_for(settings)
    if "statistics" in needs:
        inputs["statistics"] = title = f"statistics {source}" + ("" if seed is None else f" · draw {seed}")
        texts = {"model": source, "texts": "corpus"}
        builder.add(
            title, "statistics", f"{calibrate.samples}-sequences", _values(calibrate), texts, calibrate
        )
    if "texts" in needs:
        identity |= {"calibrate": _values(calibrate)}
        inputs["texts"] = "corpus"
    if "cache" in needs:
        _check_temperature(settings, builder.config)
        inputs["cache"] = cache(builder, "dense")
    words = [method.name, settings.allocation if "allocation" in method.settings else None]
    label = "-".join([word for word in words if word] + [percent(sparsity).rstrip("%")])
    read = calibrate if "texts" in needs else None
    builder.add(name, "prune", label, identity, inputs, PruneSettings(sparsity, settings, read))


def _check_temperature(settings: Prune, config: Config) -> None:
    """Raises ConfigError if the teacher's cache will not hold the temperature that the method reads."""
    stored = config.teacher.temperatures + ((1.0,) if config.teacher.signal == "topk" else ())
    if settings.temperature not in stored:
        raise ConfigError(
            f"{settings.method} reads the teacher at prune.temperature {settings.temperature:g}, but the cache will "
            f"hold only {', '.join(f'{t:g}' for t in stored)}: add it to teacher.temperatures"
        )


def cache(builder: PlanBuilder, teacher: str) -> str:
    """Adds the cache of `teacher` on the corpus. Returns the step's name."""
    settings = builder.config.teacher
    sampled = f"sampled{settings.bytes_per_token:g}"
    label = f"top{settings.k}" if settings.signal == "topk" else sampled
    inputs = {"teacher": teacher, "texts": "corpus"}
    builder.add(f"cache {teacher}", "cache", label, _values(settings), inputs, settings)
    return f"cache {teacher}"


def distill(builder: PlanBuilder, name: str, settings: Distill, seed: int, student: str, signal: str) -> None:
    builder.add(
        name,
        "distill",
        f"a{settings.alpha:g}-lr{settings.lr:g}-s{seed}",
        _values(settings) | {"seed": seed},
        {"student": student, "cache": signal, "texts": "corpus"},
        settings,
        seed,
    )


def evaluate(builder: PlanBuilder, model: str) -> None:
    settings, inputs = builder.config.evaluate, {"model": model, "texts": "corpus"}
    builder.add(f"evaluate {model}", "evaluate", "ppl", _values(settings), inputs, settings)


def export(builder: PlanBuilder, model: str, sparsity: float, method: str) -> None:
    """Adds the export of a student: directories that stock tools load."""
    inputs = {"model": model, "figures": f"evaluate {model}", "dense": "evaluate dense"}
    label = f"student-minus-{percent(sparsity).rstrip('%')}"
    identity, settings = {"sparsity": sparsity, "method": method}, ExportSettings(sparsity, method)
    builder.add(f"export {model}", "export", label, identity, inputs, settings)


def _corpus_identity(texts: Corpus, identify: Identify, seed: int) -> dict[str, Any]:
    sources = {
        field: [identify(source) | {"name": source.name, "weight": source.weight} for source in group]
        for field, group in (("sources", texts.sources), ("exclude", texts.exclude))
    }
    return _values(texts, "sources", "exclude") | sources | {"seed": seed}


def _values(settings: Settings, *without: str) -> dict[str, Any]:
    return settings.model_dump(mode="json", exclude=set(without))


def percent(fraction: float) -> str:
    return f"{100 * fraction:g}%"
