"""Runs one stage by itself with the cascade's steps and driver, so that both share their artifacts.

`corpus`, `capture`, `prune`, `distill`, `evaluate` and `export` plan a stage together with the steps before it, and
check the settings before any work. `run` makes the missing artifacts of such a plan.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sparsekd_ray import corpus as texts
from sparsekd_ray.cascade import console, feasibility, fingerprint, job, stages, steps
from sparsekd_ray.cascade.steps import PlanBuilder, Step
from sparsekd_ray.config import Config, Model
from sparsekd_ray.errors import ConfigError
from sparsekd_ray.model import hub
from sparsekd_ray.prune.methods import METHODS
from sparsekd_ray.runtime.logging import headline, listening
from sparsekd_ray.runtime.tasks import map_on_ray
from sparsekd_ray.store import Record, Ref, Store, locate

if TYPE_CHECKING:
    from sparsekd_ray.prune.task import Task

Records = dict[str, Record]
Plan = list[Step]
ANY_SPARSITY = 1e-6  # of a pruning that is planned for the sake of what it reads; every method reaches it


def corpus(config: Config) -> Plan:
    return _with_inputs(_dense(config), "corpus")


def capture(config: Config) -> Plan:
    builder = _dense(config)
    return _with_inputs(builder, steps.cache(builder, "dense"))


def prune(config: Config, sparsity: float) -> Plan:
    """The plan that prunes the dense model once, evaluates both models, and exports the pruned model."""
    builder = _pruned(config, sparsity)
    steps.export(builder, "pruned", sparsity, config.prune.method)
    return _with_inputs(builder, "export pruned")


def distill(config: Config, sparsity: float) -> Plan:
    """The plan that prunes and distills the dense model once (with the cascade's first seed), evaluates and exports."""
    builder, seed = _pruned(config, sparsity), config.cascade.seeds[0]
    cache = steps.cache(builder, "dense")
    steps.distill(builder, "student", config.distill, seed, "pruned", cache)
    steps.evaluate(builder, "student")
    steps.export(builder, "student", sparsity, config.prune.method)
    return _with_inputs(builder, "evaluate pruned", "export student")


def evaluate(config: Config, model: str) -> Plan:
    """The plan that evaluates a model on the corpus's test text.

    model: a model of the store or an exported form of it, any directory, or a hub id.
    """
    builder = _dense(config)
    exported = stages.exported_model(model, config.execution.scratch)
    if exported is None and "/artifacts/" in model:
        _add_stored(builder, "model", model, ("dense", "prune", "distill"))
    else:
        source = Model(path=model)
        identity = hub.identify(source if exported is None else Model(path=str(exported)))
        builder.add("model", "dense", hub.label(source), identity, {}, source)
    steps.evaluate(builder, "model")
    return _with_inputs(builder, "evaluate model")


def export(config: Config, artifact: str) -> Plan:
    """The plan that exports a pruned or distilled model of the store, after evaluating it and its dense model."""
    builder = _dense(config)
    store, record = _add_stored(builder, "model", artifact, ("prune", "distill"))
    pruned = record if record.ref.kind == "prune" else _parent(store, record, "student")
    if pruned.ref.kind != "prune":
        raise ConfigError(f"{artifact} is as large as the dense model: only a pruned model is exported")
    dense = builder.names["dense"].ref
    if (source := pruned.inputs["dense"]) != dense.key:
        raise ConfigError(
            f"{artifact} was cut from {source}, and the dense model of these settings is {dense.key}: give the "
            "settings it was made with (--config, and the same options)"
        )
    steps.evaluate(builder, "model")
    steps.export(builder, "model", pruned.identity["sparsity"], pruned.identity["method"])
    return _with_inputs(builder, "export model")


def run(config: Config, stage: str, plan: Plan, dry_run: bool) -> dict[str, Any]:
    """Makes the missing artifacts of `plan`. The result names the last step's artifact and its figures.

    The plan and the settings are written to `<store>/runs/<name>-<stage>/`, apart from those of a cascade.
    """
    started, last = time.monotonic(), plan[-1]
    config = config.model_copy(update={"name": f"{config.name}-{stage}"})
    store = job.open_store(config)
    before = job.find(plan, store)
    result: dict[str, Any] = {
        "artifact": store.url(last.ref.key),
        "dry_run": dry_run,
        "reused": [step.name for step in plan if step.name in before],
        "missing" if dry_run else "made": [step.name for step in plan if step.name not in before],
    }
    if dry_run:
        headline(console.plan_text(config, plan, before))
        return result
    records = make(config, plan, store)
    headline(f"\n{last.kind:<8} {store.url(last.ref.key)}")
    if last.kind == "export":
        headline(f"load it  {job.load_command(store, last, records[last.name])}")
    return result | {
        "seconds": round(time.monotonic() - started, 1),
        "metrics": records[last.name].metrics,
        "perplexity": job.perplexities(plan, records),
    }


def make(config: Config, plan: Plan, store: Store) -> Records:
    """Makes the missing artifacts of a plan under the run's lease. Returns the records of all its steps."""
    store.check()
    records = job.find(plan, store)
    headline(console.plan_text(config, plan, records))
    with (
        store.lease(f"runs/{config.name}/driver", f"run {config.name}") as lease,
        console.live_figures(config, plan, store),
    ):
        job.write_run(config, plan, store)
        if len(records) < len(plan):
            from sparsekd_ray.cascade import driver  # imports Ray

            driver.run(config, plan, store, lease.ensure)
    return job.find(plan, store)


def preview(config: Config, sparsity: float, dry_run: bool) -> dict[str, Any]:
    """Makes the inputs of a pruning. Returns the rows of its table of matrices."""
    plan = prune(config, sparsity)
    step = next(step for step in plan if step.name == "pruned")
    result = run(config, "preview", _needed(plan, step.inputs.values()), dry_run)
    if dry_run:
        return result
    from sparsekd_ray.prune import preview as tables
    from sparsekd_ray.runtime.cluster import connected

    store = job.open_store(config)
    task = _task(step, plan, store, config.execution.gpus)
    with (
        store.lease(step.ref.key, f"run {config.name}-preview"),  # the pruning goes on with the spectra
        connected(config.execution),
        listening() as log_queue,
    ):
        rows = tables.table(task, map_on_ray(config.execution, log_queue))
    return {"rows": [row._asdict() for row in (*rows, tables.total(rows))]}


def sparsity_of_energy(config: Config, tau: float) -> float:
    """The sparsity that one energy threshold `tau` gives in the dense model.

    It is measured once and kept as an artifact. Raises ConfigError if the threshold removes nothing. That is common,
    since the spectra of language models are flat.
    """
    plan, store = _pruned(config, ANY_SPARSITY).steps, job.open_store(config)
    step = _energy_step(next(step for step in plan if step.name == "pruned"), plan, tau)
    run(config, "preview", _needed(plan, step.inputs.values()), dry_run=False)
    with store.lease(step.ref.key, f"run {config.name}-preview"):
        record = store.record(step.ref) or _measure_energy(config, step, plan, store, tau)
    sparsity = float(record.metrics["sparsity"])
    headline(f"energy {tau:g} stands for a sparsity of {sparsity:.4f}")
    if sparsity <= 0:
        raise ConfigError(
            f"with {tau:.1%} of their energy the matrices of this model are no smaller: lower --energy"
        )
    return sparsity


def _energy_step(pruning: Step, plan: Plan, tau: float) -> Step:
    """A step with the identity of `pruning`, except that an energy stands in place of the sparsity."""
    fingerprints = {step.name: step.ref.fingerprint for step in plan}
    inputs = {role: fingerprints[name] for role, name in pruning.inputs.items()}
    identity = {key: value for key, value in pruning.identity.items() if key != "sparsity"} | {"energy": tau}
    digest = fingerprint.of_step("prune", identity, inputs)
    ref = Ref("energy", f"{identity['method']}-{tau:g}", digest)
    return replace(pruning, name="energy", kind="energy", ref=ref, identity=identity)


def _measure_energy(config: Config, step: Step, plan: Plan, store: Store, tau: float) -> Record:
    """Measures the spectra and commits the sparsity. The spectra are checkpoints, which the commit deletes."""
    from sparsekd_ray.runtime.cluster import connected

    started, task = time.monotonic(), _task(step, plan, store, config.execution.gpus)
    energy = METHODS[task.settings.method].energy
    assert energy is not None, f"{task.settings.method} has singular values"
    with connected(config.execution), listening() as log_queue:
        sparsity = energy(task, tau, map_on_ray(config.execution, log_queue))
    with store.building(step.ref) as out:
        (out / "energy.json").write_text(json.dumps({"energy": tau, "sparsity": sparsity}))
    refs = {planned.name: planned.ref for planned in plan}
    return store.commit(
        step.ref,
        identity=step.identity,
        inputs={role: refs[name].key for role, name in step.inputs.items()},
        metrics={"sparsity": sparsity},
        seconds=time.monotonic() - started,
    )


def _dense(config: Config) -> PlanBuilder:
    """A plan with the dense model, the corpus and the dense model's evaluation."""
    job.check_vocabulary(config)
    builder = PlanBuilder(config)
    steps.dense(builder, texts.identify, {} if config.model.standin else hub.identify(config.model))
    return builder


def _pruned(config: Config, sparsity: float) -> PlanBuilder:
    feasibility.check_settings(config.prune)
    feasibility.check(f"--sparsity {sparsity:g}", hub.mlp_shapes(config.model), config.prune, [sparsity])
    builder = _dense(config)
    steps.prune(builder, "pruned", sparsity, "dense", config.prune)
    steps.evaluate(builder, "pruned")
    return builder


def _with_inputs(builder: PlanBuilder, *names: str) -> Plan:
    return _needed(builder.steps, [builder.names[name].name for name in names])


def _needed(plan: Plan, names: Iterable[str]) -> Plan:
    """The named steps and all steps that they need, in the plan's order."""
    wanted = set(names)
    for step in reversed(plan):
        if step.name in wanted:
            wanted |= set(step.inputs.values())
    return [step for step in plan if step.name in wanted]


def _add_stored(
    builder: PlanBuilder, name: str, artifact: str, kinds: tuple[str, ...]
) -> tuple[Store, Record]:
    """Adds a finished model of the run's store to the plan. Returns the store and the model's record."""
    store = job.open_store(builder.config)
    given, ref = locate(artifact, builder.config.execution.scratch)
    if ref.kind not in kinds:
        raise ConfigError(f"{artifact} is of the kind {ref.kind}; allowed: {', '.join(kinds)}")
    if given.root != store.root:
        raise ConfigError(
            f"{artifact} lies in another store than {store.root}: give --execution.store {given.root}"
        )
    record = store.record(ref)
    if record is None:
        raise ConfigError(f"{artifact} is no finished artifact: it has no record.json")
    planned = next((step for step in builder.steps if step.ref == ref), None)
    builder.names[name] = planned or Step(name, ref.kind, ref, record.identity, {}, Model(path=artifact))
    if planned is None:
        builder.steps.append(builder.names[name])
    return store, record


def _parent(store: Store, record: Record, role: str) -> Record:
    """The record of an artifact's input."""
    parent = store.record(Ref.from_key(record.inputs[role]))
    if parent is None:
        raise ConfigError(f"{record.inputs[role]}, which it was made from, is gone from {store.root}")
    return parent


def _task(step: Step, plan: Plan, store: Store, gpu: bool) -> Task:
    refs: dict[str, Ref] = {s.name: s.ref for s in plan}
    return stages.prune_task(step, {role: refs[name] for role, name in step.inputs.items()}, store, gpu)
