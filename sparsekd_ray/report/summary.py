"""Records of a finished plan → the one dictionary that report.html, report.md and summary.json are made of."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean, stdev
from typing import Any

from sparsekd_ray.cascade import console
from sparsekd_ray.cascade.steps import Step, seeded
from sparsekd_ray.config import Baseline, Config, Round

Records = Mapping[str, dict[str, Any]]
FAMILIES = {"phi3": "Phi-3", "qwen3": "Qwen3"}
CONTROLS = {"dense+kd": "Dense + KD", "ce-only": "CE only", "kl-only": "KL only"}


def summarise(config: Config, steps: list[Step], records: Records, run: Mapping[str, Any]) -> dict[str, Any]:
    """`run` holds what only the driver knows: command, times, which steps were reused, versions, hardware, paths."""
    index = RunIndex(config, steps, records)
    figures = index.metrics("evaluate dense")
    return {
        **run,
        "run": config.name,
        "seeds": list(config.cascade.seeds),
        "protocol": _protocol(figures),
        "corpus": _corpus(config, index),
        "dense": _dense(config, index),
        "rows": [_dense_row(index), *_control_rows(config, index), *_student_rows(config, index)],
        "curves": _curves(config, index),
        "steps": [_step(step, index, run["reused"]) for step in steps],
        "settings": config.model_dump(mode="json"),
    }


class RunIndex:
    """Looks artifacts up by a step's name, also where an equal step earlier in the plan stands for it."""

    def __init__(self, config: Config, steps: list[Step], records: Records) -> None:
        self.records = records
        self.steps = {step.name: step for step in steps}
        self.by_input = {(step.kind, step.inputs.get("model")): step for step in steps}
        self.dense_ppl = records["evaluate dense"]["metrics"]["paper"]["ppl"]

    def metrics(self, name: str) -> dict[str, Any]:
        return self.records[name]["metrics"]

    def trained(self, name: str, config: Config, seed: int) -> str:
        """The step that trains `name`; of a student beside the rounds that equals the first, that round's."""
        own = seeded(name, config, seed)
        return own if own in self.steps else seeded("round 1", config, seed)

    def figures(self, model: str) -> dict[str, Any]:
        """What was measured of a model, by the name of the step that made it."""
        return self.metrics(self.by_input["evaluate", model].name)


def _protocol(figures: dict[str, Any]) -> dict[str, Any]:
    measured = [name for name in ("paper", "gptq", "words") if name in figures]
    sentences = [f"Protocol {name}: {figures[name]['sentence']}." for name in measured]
    return {
        "window": figures["paper"]["window"],
        "stride": figures["paper"]["stride"],
        "sentence": " ".join([*sentences, f"Computed in {figures['dtype']}."]),
    }


def _mean(figures: dict[str, dict[str, Any]], protocol: str) -> float | None:
    """Over seeds; None where the protocol was not measured."""
    measured = [of_seed[protocol]["ppl"] for of_seed in figures.values() if protocol in of_seed]
    return fmean(measured) if measured else None


def _corpus(config: Config, index: RunIndex) -> dict[str, Any]:
    tokens = index.metrics("corpus")["tokens"]
    standin = config.model.standin
    unseen = set(standin.unseen) if standin else set()
    trained_on = (
        {s.name for s in standin.sources} if standin and standin.sources else set(tokens["train"]) - unseen
    )
    domains = {
        name: {
            "train_tokens": tokens["train"].get(name, 0),
            "test_tokens": tokens["test"].get(name, 0),
            "in_dense_training": name in trained_on if standin else None,
        }
        for name in tokens["train"]
    }
    shared = [source.name for source in config.corpus.sources if source.test is not None]
    warning = (
        f"The training mix holds the training split of {', '.join(shared)}, and the figures are measured on the "
        "test split of the same: part of any gain is adaptation to the domain, which the control CE only shows."
        if shared
        else "The training mix and the test text are different documents of the same domains: part of any gain is "
        "adaptation to these domains, which the control CE only shows."
    )
    total = sum(tokens["train"].values())
    return {
        "artifact": index.steps["corpus"].ref.key,
        "train_tokens": total,
        "domains": domains,
        "warning": warning,
    }


def _dense(config: Config, index: RunIndex) -> dict[str, Any]:
    metrics, standin = index.metrics("dense"), config.model.standin
    note = (
        f"The dense model is a stand-in of the {FAMILIES[standin.family]} architecture with "
        f"{metrics['params'] / 1e6:.2f} M parameters, trained by this cascade on {metrics['tokens']:,} tokens: small "
        "and partly trained. Its figures show that the system works, not what a large model would do."
        if standin
        else None
    )
    keys = ("params", "mlp_params")
    return {"artifact": index.steps["dense"].ref.key, "note": note} | {key: metrics[key] for key in keys}


def _dense_row(index: RunIndex) -> dict[str, Any]:
    figures = index.figures("dense")
    return _row(index, "Dense", "dense", {"": figures}) | {
        "artifact": index.steps["dense"].ref.key,
        "sparsity_requested": 0.0,
        "sparsity": 0.0,
        "params": index.metrics("dense")["params"],
        "mlp_params": index.metrics("dense")["mlp_params"],
    }


def _control_rows(config: Config, index: RunIndex) -> list[dict[str, Any]]:
    return [
        _trained_row(config, index, CONTROLS[control], "control", control, None)
        for control in config.cascade.controls
    ]


def _students(config: Config) -> list[tuple[str, str, Round | Baseline]]:
    """Title, name of the step and settings of the rounds, then of the students of other methods."""
    rounds = [(f"Round {n}", f"round {n}", round_) for n, round_ in enumerate(config.cascade.rounds, start=1)]
    return [*rounds, *((branch.title, branch.title, branch) for branch in config.cascade.baselines)]


def _student_rows(config: Config, index: RunIndex) -> list[dict[str, Any]]:
    return [
        _trained_row(
            config, index, title, "round" if isinstance(settings, Round) else "baseline", name, settings
        )
        for title, name, settings in _students(config)
    ]


def _trained_row(
    config: Config, index: RunIndex, title: str, kind: str, name: str, student: Round | Baseline | None
) -> dict[str, Any]:
    """The row of one control or student, over all seeds."""
    names = {str(seed): index.trained(name, config, seed) for seed in config.cascade.seeds}
    first = names[str(config.cascade.seeds[0])]
    step, metrics = index.steps[first], index.metrics(first)
    source = index.steps[step.inputs["student"]]
    row = _row(index, title, kind, {seed: index.figures(n) for seed, n in names.items()})
    row |= {
        "params": index.metrics(source.name)["params"],
        "mlp_params": index.metrics(source.name)["mlp_params"],
        "sparsity": index.metrics(source.name).get("sparsity", 0.0),
        "trained_tokens": _trained_tokens(index, first),
        "lr": step.settings.lr,
        "stopped": metrics["stopped"],
        "artifact": step.ref.key,
    }
    teacher = index.steps[index.steps[step.inputs["cache"]].inputs["teacher"]]
    row |= {"teacher": "dense", "teacher_ppl": index.figures(teacher.name)["paper"]["ppl"]}
    if student is None:
        return row | {"sparsity_requested": 0.0}
    pre = fmean(index.figures(index.steps[n].inputs["student"])["paper"]["ppl"] for n in names.values())
    excess = pre - index.dense_ppl
    export = index.by_input["export", first]
    return row | {
        "method": ", ".join(source.identity[k] for k in ("method", "allocation") if k in source.identity),
        "teacher": student.teacher,
        "sparsity_requested": student.sparsity,
        "oneshot_ppl": _oneshot(index, student.sparsity) if isinstance(student, Round) else None,
        "pre_ppl": pre,
        "recovered": (pre - row["ppl"]) / excess if excess > 0 else None,
        "export": export.ref.key,
    }


def _row(index: RunIndex, title: str, kind: str, figures: dict[str, dict[str, Any]]) -> dict[str, Any]:
    per_seed = {seed: f["paper"]["ppl"] for seed, f in figures.items()}
    ppl = fmean(per_seed.values())
    domains = next(iter(figures.values()))["paper"]["domains"]
    return {
        "stage": title,
        "kind": kind,
        "ppl": ppl,
        "std": stdev(per_seed.values()) if len(per_seed) > 1 else None,
        "per_seed": {seed: value for seed, value in per_seed.items() if seed},
        "gptq_ppl": _mean(figures, "gptq"),
        "words_ppl": _mean(figures, "words"),
        "domains": {d: fmean(f["paper"]["domains"][d]["ppl"] for f in figures.values()) for d in domains},
        "vs_dense": ppl / index.dense_ppl - 1,
        "method": None,
        "teacher": None,
        "teacher_ppl": None,
        "oneshot_ppl": None,
        "pre_ppl": None,
        "recovered": None,
        "trained_tokens": 0,
        "lr": None,
        "stopped": None,
        "export": None,
    }


def _oneshot(index: RunIndex, sparsity: float) -> float:
    """Perplexity of the dense model cut to this size at once by plain SVD, and not trained."""
    step = next(
        s
        for s in index.steps.values()
        if s.kind == "prune"
        and s.inputs["model"] == "dense"
        and (s.identity["method"], s.identity["sparsity"], s.identity.get("allocation"))
        == ("svd", sparsity, "uniform")
    )
    return index.figures(step.name)["paper"]["ppl"]


def _trained_tokens(index: RunIndex, name: str) -> int:
    """Tokens of all distillations on the way from the dense model to this one."""
    step = index.steps[name]
    own = index.metrics(name)["trained_tokens"] if step.kind == "distill" else 0
    before = step.inputs.get("student") or (step.inputs.get("model") if step.kind == "prune" else None)
    return own + (_trained_tokens(index, before) if before else 0)


def _curves(config: Config, index: RunIndex) -> list[dict[str, Any]]:
    titles: list[tuple[str, str]] = [(CONTROLS[c], c) for c in config.cascade.controls]
    titles += [(title, name) for title, name, _ in _students(config)]
    keys = ("step", "tokens", "valid_ppl", "valid_domains")
    return [
        {
            "stage": title,
            "seed": seed,
            "best_step": index.metrics(index.trained(name, config, seed))["best_step"],
            "points": [
                {k: p[k] for k in keys} for p in index.metrics(index.trained(name, config, seed))["history"]
            ],
        }
        for title, name in titles
        for seed in config.cascade.seeds
    ]


def _step(step: Step, index: RunIndex, reused: set[str]) -> dict[str, Any]:
    record = index.records[step.name]
    return {
        "name": step.name,
        "kind": step.kind,
        "artifact": step.ref.key,
        "inputs": list(step.inputs.values()),
        "seconds": record["seconds"],
        "reused": step.name in reused,
        "figure": console.figure(step.kind, record),
    }
