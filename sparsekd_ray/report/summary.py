"""Makes the document behind report.html, report.md and summary.json from the records of a finished plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

from sparsekd_ray.config import Config
from sparsekd_ray.config.base import PROTOCOL_NAMES
from sparsekd_ray.model.families import FAMILIES
from sparsekd_ray.report.document import CONTROLS, Corpus, Curve, Dense, Point, Protocol, StepRow, Summary
from sparsekd_ray.report.rows import Records, RunIndex, Step, rows, students


def summarise(config: Config, steps: Sequence[Step], records: Records, run: Mapping[str, Any]) -> Summary:
    """`run` holds what only the driver knows: the `created` time, `command`, `commands`, `seconds`, `versions`,
    `hardware`, as `figures` the figure of every step in words, and as `reused` the names of the steps that it found
    done."""
    index = RunIndex(config, steps, records)
    return {
        "run": config.name,
        "created": run["created"],
        "command": run["command"],
        "seconds": run["seconds"],
        "seeds": list(config.cascade.seeds),
        "protocol": _protocol(index.metrics("evaluate dense"), _models_by_dtype(index)),
        "corpus": _corpus(index),
        "dense": _dense(index),
        "rows": rows(index),
        "curves": _curves(index),
        "steps": [_step(step, index, run["figures"][step.name], run["reused"]) for step in steps],
        "settings": config.model_dump(mode="json"),
        "commands": run["commands"],
        "versions": run["versions"],
        "hardware": run["hardware"],
    }


def _models_by_dtype(index: RunIndex) -> dict[str, list[str]]:
    """The models that were evaluated, by the type that their weights had then."""
    models: dict[str, list[str]] = {}
    for (kind, model), step in index.by_input.items():
        if kind == "evaluate":
            models.setdefault(index.metrics(step.name)["dtype"], []).append(str(model))
    return models


def _mixture(models: Mapping[str, list[str]]) -> str | None:
    """The sentence that warns of figures in several dtypes; None where all have one."""
    if len(models) == 1:
        return None
    kinds = "; ".join(f"{', '.join(names)} in {dtype}" for dtype, names in sorted(models.items()))
    return f"The figures are not all computed in one type, so small differences may be rounding: {kinds}."


def _protocol(evaluation: Mapping[str, Any], models: Mapping[str, list[str]]) -> Protocol:
    measured = [name for name in PROTOCOL_NAMES if name in evaluation]
    sentences = [f"Protocol {name}: {evaluation[name]['sentence']}." for name in measured]
    return {
        "window": evaluation["paper"]["window"],
        "stride": evaluation["paper"]["stride"],
        "sentence": " ".join([*sentences, f"Computed in {' and '.join(sorted(models))}."]),
        "mixture": _mixture(models),
    }


def _corpus(index: RunIndex) -> Corpus:
    tokens = index.metrics("corpus")["tokens"]
    seen = _seen_by_standin(index)
    return {
        "artifact": index.steps["corpus"].ref.key,
        "train_tokens": sum(tokens["train"].values()),
        "domains": {
            name: {
                "train_tokens": tokens["train"].get(name, 0),
                "test_tokens": tokens["test"].get(name, 0),
                "in_dense_training": None if seen is None else name in seen,
            }
            for name in tokens["train"]
        },
        "warning": _warning(index.config),
    }


def _seen_by_standin(index: RunIndex) -> set[str] | None:
    """The domains that the stand-in was trained on; None for a model whose training is not known."""
    standin = index.config.model.standin
    if standin is None:
        return None
    if standin.sources:
        return {source.name for source in standin.sources}
    return set(index.metrics("corpus")["tokens"]["train"]) - set(standin.unseen)


def _warning(config: Config) -> str:
    shared = [source.name for source in config.corpus.sources if source.test is not None]
    if shared:
        what = (
            f"The training mix holds the training split of {', '.join(shared)}, and the figures are measured on the "
            "test split of the same."
        )
    else:
        what = "The training mix and the test text are different documents of the same domains."
    return f"{what} Part of any gain is adaptation to these domains; the control CE only shows how much."


def _dense(index: RunIndex) -> Dense:
    metrics, standin = index.metrics("dense"), index.config.model.standin
    note = (
        f"The dense model is a stand-in of the {FAMILIES[standin.family].name} architecture with "
        f"{metrics['params'] / 1e6:.2f} M parameters. This cascade trained it on {metrics['tokens']:,} tokens, so it "
        "is small and partly trained. Its figures show that the system works, not what a large model would do."
        if standin
        else None
    )
    return {
        "artifact": index.steps["dense"].ref.key,
        "note": note,
        "params": metrics["params"],
        "mlp_params": metrics["mlp_params"],
    }


def _curves(index: RunIndex) -> list[Curve]:
    cascade = index.config.cascade
    titles: list[tuple[str, str]] = [(CONTROLS[control], control) for control in cascade.controls]
    titles += [(title, name) for title, name, _ in students(index.config)]
    return [
        _curve(title, seed, index.metrics(index.trained(name, seed)))
        for title, name in titles
        for seed in cascade.seeds
    ]


def _curve(title: str, seed: int, metrics: Mapping[str, Any]) -> Curve:
    points: list[Point] = [
        {
            "step": point["step"],
            "tokens": point["tokens"],
            "valid_ppl": point["valid_ppl"],
            "valid_domains": point["valid_domains"],
        }
        for point in metrics["history"]
    ]
    return {"stage": title, "seed": seed, "best_step": metrics["best_step"], "points": points}


def _step(step: Step, index: RunIndex, figure: str, reused: Set[str]) -> StepRow:
    record = index.records[step.name]
    return {
        "name": step.name,
        "kind": step.kind,
        "artifact": step.ref.key,
        "inputs": list(step.inputs.values()),
        "seconds": record.seconds,
        "reused": step.name in reused,
        "figure": figure,
    }
