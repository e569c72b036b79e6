"""The rows of a report: one for the dense model, each control, each round and each baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, Protocol

from sparsekd_ray.config import Baseline, Config, Distill, Round
from sparsekd_ray.report.document import CONTROLS, Kind, Row
from sparsekd_ray.store import Record, Ref

Records = Mapping[str, Record]


class Step(Protocol):
    """What a report reads of a step of the plan. `inputs` maps a role to the name of the step that makes it."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def ref(self) -> Ref: ...
    @property
    def identity(self) -> Mapping[str, Any]: ...
    @property
    def inputs(self) -> Mapping[str, str]: ...
    @property
    def settings(self) -> object: ...


class RunIndex:
    """Looks up artifacts by the name of a step. An equal earlier step of the plan may stand for the named step."""

    def __init__(self, config: Config, steps: Sequence[Step], records: Records) -> None:
        self.config = config
        self.records = records
        self.steps = {step.name: step for step in steps}
        self.by_input = {(step.kind, step.inputs.get("model")): step for step in steps}
        self.dense_ppl: float = records["evaluate dense"].metrics["paper"]["ppl"]

    def metrics(self, name: str) -> dict[str, Any]:
        return self.records[name].metrics

    def trained(self, name: str, seed: int) -> str:
        """The step that trains `name`. A baseline that equals the first round is trained by that round's step."""
        own = self.config.seeded(name, seed)
        return own if own in self.steps else self.config.seeded("round 1", seed)

    def evaluation(self, model: str) -> dict[str, Any]:
        """The figures of a model, by the name of the step that made it."""
        return self.metrics(self.by_input["evaluate", model].name)


def students(config: Config) -> list[tuple[str, str, Round | Baseline]]:
    """Title, name of the step and settings of the rounds, then of the baselines."""
    rounds = [(f"Round {n}", f"round {n}", round_) for n, round_ in enumerate(config.cascade.rounds, start=1)]
    return [*rounds, *((baseline.title, baseline.title, baseline) for baseline in config.cascade.baselines)]


def rows(index: RunIndex) -> list[Row]:
    """Dense, controls, rounds, baselines."""
    controls = [
        _trained_row(index, CONTROLS[name], "control", name) for name in index.config.cascade.controls
    ]
    return [
        _dense_row(index),
        *controls,
        *(_student_row(index, title, name, settings) for title, name, settings in students(index.config)),
    ]


def _dense_row(index: RunIndex) -> Row:
    step, metrics = index.steps["dense"], index.metrics("dense")
    return _row(index, "Dense", "dense", step, metrics, {"": index.evaluation("dense")})


def _trained_row(index: RunIndex, title: str, kind: Kind, name: str) -> Row:
    """The row of one control or student, over all seeds."""
    names = {str(seed): index.trained(name, seed) for seed in index.config.cascade.seeds}
    first = next(iter(names.values()))
    step, metrics = index.steps[first], index.metrics(first)
    evaluations = {seed: index.evaluation(model) for seed, model in names.items()}
    row = _row(index, title, kind, step, index.metrics(step.inputs["student"]), evaluations)
    teacher = index.steps[step.inputs["cache"]].inputs["teacher"]
    row["teacher"] = "dense"
    row["teacher_ppl"] = index.evaluation(teacher)["paper"]["ppl"]
    row["trained_tokens"] = _trained_tokens(index, first)
    assert isinstance(step.settings, Distill), f"{step.name} is a distillation"
    row["lr"] = step.settings.lr
    row["stopped"] = metrics["stopped"]
    return row


def _student_row(index: RunIndex, title: str, name: str, student: Round | Baseline) -> Row:
    row = _trained_row(index, title, "round" if isinstance(student, Round) else "baseline", name)
    trained = [index.steps[index.trained(name, seed)] for seed in index.config.cascade.seeds]
    pruned = index.steps[trained[0].inputs["student"]]
    pre = fmean(index.evaluation(step.inputs["student"])["paper"]["ppl"] for step in trained)
    excess = pre - index.dense_ppl
    row["method"] = ", ".join(pruned.identity[k] for k in ("method", "allocation") if k in pruned.identity)
    row["teacher"] = student.teacher
    row["sparsity_requested"] = student.sparsity
    row["oneshot_ppl"] = _oneshot(index, student.sparsity) if isinstance(student, Round) else None
    row["pre_ppl"] = pre
    row["recovered"] = (pre - row["ppl"]) / excess if excess > 0 else None
    row["export"] = index.by_input["export", trained[0].name].ref.key
    return row


def _row(
    index: RunIndex,
    title: str,
    kind: Kind,
    made_by: Step,
    size: dict[str, Any],
    evaluations: dict[str, dict[str, Any]],
) -> Row:
    """What every model has; `size` are the metrics that count its parameters, `evaluations` are by seed."""
    per_seed = {seed: measured["paper"]["ppl"] for seed, measured in evaluations.items()}
    by_domain = [measured["paper"]["domains"] for measured in evaluations.values()]
    ppl = fmean(per_seed.values())
    return {
        "stage": title,
        "kind": kind,
        "method": None,
        "sparsity_requested": 0.0,
        "sparsity": size.get("sparsity", 0.0),
        "params": size["params"],
        "mlp_params": size["mlp_params"],
        "artifact": made_by.ref.key,
        "export": None,
        "teacher": None,
        "teacher_ppl": None,
        "oneshot_ppl": None,
        "pre_ppl": None,
        "ppl": ppl,
        "std": stdev(per_seed.values()) if len(per_seed) > 1 else None,
        "per_seed": {seed: value for seed, value in per_seed.items() if seed},
        "gptq_ppl": _mean(evaluations, "gptq"),
        "words_ppl": _mean(evaluations, "words"),
        "domains": {name: fmean(domains[name]["ppl"] for domains in by_domain) for name in by_domain[0]},
        "vs_dense": ppl / index.dense_ppl - 1,
        "recovered": None,
        "trained_tokens": 0,
        "lr": None,
        "stopped": None,
    }


def _mean(evaluations: dict[str, dict[str, Any]], protocol: str) -> float | None:
    """Mean perplexity over seeds; None if the protocol was not measured."""
    measured = [of_seed[protocol]["ppl"] for of_seed in evaluations.values() if protocol in of_seed]
    return fmean(measured) if measured else None


def _oneshot(index: RunIndex, sparsity: float) -> float:
    """Perplexity of the dense model cut to this size at once by plain SVD, and not trained."""
    wanted = ("svd", sparsity, "uniform")
    step = next(
        step
        for step in index.steps.values()
        if step.kind == "prune"
        and step.inputs["model"] == "dense"
        and tuple(step.identity.get(key) for key in ("method", "sparsity", "allocation")) == wanted
    )
    ppl: float = index.evaluation(step.name)["paper"]["ppl"]
    return ppl


def _trained_tokens(index: RunIndex, name: str) -> int:
    """Tokens of all distillations on the way from the dense model to this one."""
    step = index.steps[name]
    own = index.metrics(name)["trained_tokens"] if step.kind == "distill" else 0
    before = step.inputs.get("student") or (step.inputs.get("model") if step.kind == "prune" else None)
    return own + (_trained_tokens(index, before) if before else 0)
