"""Pruning alone, and all methods side by side: what `jobs/prune.py` runs, on the cascade's own steps and driver."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparsekd_ray import corpus
from sparsekd_ray.cascade import console, feasibility, job, steps
from sparsekd_ray.cascade.steps import PlanBuilder, Step
from sparsekd_ray.compare import comparison
from sparsekd_ray.config import Config
from sparsekd_ray.errors import ConfigError
from sparsekd_ray.model import hub
from sparsekd_ray.prune.methods import METHODS
from sparsekd_ray.runtime.logging import headline, listening
from sparsekd_ray.runtime.tasks import map_on_ray
from sparsekd_ray.store import Ref, Store

logger = logging.getLogger(__name__)

PRUNED = "pruned"
PROMPT, NEW_TOKENS, REPEATS = 128, 32, 7  # of a speed measurement


def run(config: Config, sparsity: float, dry_run: bool, table: Callable[[list[Any]], None]) -> None:
    """Prunes the dense model once, judges and exports it; with `dry_run`, measures what a plan needs, prints the
    table of matrices and makes no model."""
    planned = plan_one(config, sparsity)
    store, settings = job.open_store(config), next(s for s in planned if s.name == PRUNED)
    wanted = planned[: planned.index(settings)] if dry_run else planned
    records = make(config, wanted, store)
    if not dry_run:
        export = planned[-1]
        headline(f"\nmodel    {store.url(export.ref.key)}/{job.exported(records[export.name])}")
        headline(f"load it  {job.load_command(store, export, records[export.name])}")
        return
    from sparsekd_ray.prune import preview
    from sparsekd_ray.runtime.cluster import connected

    task = _task(settings, planned, store, config.execution.gpus)
    with connected(config.execution), listening() as log_queue:
        rows = preview.table(task, map_on_ray(config.execution, log_queue))
    table([row._asdict() for row in (*rows, preview.total(rows))])


def sparsity_of_energy(config: Config, tau: float) -> float:
    """The sparsity at which one energy threshold of `tau` prunes the dense model: the budget that it stands for.

    ConfigError where that is none, since the spectra of language models are flat."""
    planned = plan_one(config, 0.5)  # any size: only what comes before the cut is made
    store, step = job.open_store(config), next(s for s in planned if s.name == PRUNED)
    make(config, planned[: planned.index(step)], store)
    from sparsekd_ray.runtime.cluster import connected

    task = _task(step, planned, store, config.execution.gpus)
    measured = task.statistics.fingerprint if task.statistics else "plain"
    task = replace(
        task, out=Ref("prune", f"spectra-{task.settings.method}-{task.model.fingerprint}", measured)
    )
    with connected(config.execution), listening() as log_queue:
        energy = METHODS[task.settings.method].energy
        assert energy is not None, "whoever asks for an energy has checked that the method has one"
        found = energy(task, tau, map_on_ray(config.execution, log_queue))
    headline(f"energy {tau:g} stands for a sparsity of {found:.4f}")
    if found <= 0:
        raise ConfigError(
            f"with {tau:.1%} of their energy the matrices of this model are no smaller: lower --energy"
        )
    return found


def compare(
    config: Config,
    methods: Sequence[str],
    sparsities: Sequence[float],
    draws: Sequence[int],
    distilled: bool,
    command: str,
    dry_run: bool,
) -> list[dict[str, Any]]:
    """All methods at equal sizes; the rows of the table, also kept in the run's directory with a drawing, and once
    more when the students' speeds have been measured."""
    identity = {} if config.model.standin else hub.identify(config.model)
    arguments = (methods, sparsities, draws)
    shapes = hub.mlp_shapes(config.model)
    for text in methods:
        for sparsity in sparsities:
            settings = comparison.variant(text, config.prune)
            feasibility.check(f"--sparsity {sparsity:g}", shapes, settings, [sparsity])
    if ignored := comparison.ignored(config.prune):
        logger.warning(f"--methods says what is compared: {', '.join(ignored)} of the settings is not used")
    job.check_vocabulary(config)
    planned, names = comparison.plan(config, *arguments, distilled, corpus.identify, identity)
    store = job.open_store(config)
    if dry_run:
        headline(console.plan_text(config, planned, job.find(planned, store)))
        return []
    records = make(config, planned, store)
    made = {name: (step, records[step.name]) for name, step in names.items()}
    rows = comparison.rows(made, *arguments)
    about = {
        "command": command,
        "protocol": comparison.protocol(config, records, draws),
        "device": device(config),
    }
    keep(about | {"rows": rows}, config, store)
    names_of_rows = [
        comparison.title(text, sparsity, draws[0]) for sparsity in sparsities for text in methods
    ]
    _add_speeds(rows, [made[name][0] for name in ("dense", *names_of_rows)], store, config)
    keep(about | {"rows": rows}, config, store)
    folder = f"{store.root}/runs/{config.name}"
    headline(f"\ntable    {folder}/comparison.json\ndrawing  {folder}/comparison.png")
    return rows


def make(config: Config, planned: list[Step], store: Store) -> dict[str, dict[str, Any]]:
    """Makes what is missing of a plan, under the run's lease; the records of all of it."""
    store.check()
    records = job.find(planned, store)
    headline(console.plan_text(config, planned, records))
    with store.lease(f"runs/{config.name}/driver", f"run {config.name}") as lease:
        job.write_run(config, planned, store)
        if len(records) < len(planned):
            from sparsekd_ray.cascade import driver  # imports Ray

            driver.run(config, planned, store, lease.ensure)
    return job.find(planned, store)


def plan_one(config: Config, sparsity: float) -> list[Step]:
    feasibility.check_settings(config.prune)
    feasibility.check(f"--sparsity {sparsity:g}", hub.mlp_shapes(config.model), config.prune, [sparsity])
    job.check_vocabulary(config)
    builder = PlanBuilder(config)
    steps.dense(builder, corpus.identify, {} if config.model.standin else hub.identify(config.model))
    steps.prune(builder, PRUNED, sparsity, "dense", config.prune)
    steps.evaluate(builder, PRUNED)
    steps.export(builder, PRUNED, sparsity, config.prune.method)
    return builder.steps


def _task(step: Step, planned: list[Step], store: Store, gpu: bool) -> Any:
    from sparsekd_ray.cascade import stages

    refs: dict[str, Ref] = {s.name: s.ref for s in planned}
    return stages.prune_task(step, {role: refs[name] for role, name in step.inputs.items()}, store, gpu)


def device(config: Config) -> str:
    """Where this process measures speeds: a GPU if the run has them and one is here."""
    import torch

    return "cuda" if config.execution.gpus and torch.cuda.is_available() else "cpu"


def _add_speeds(rows: list[dict[str, Any]], models: list[Step], store: Store, config: Config) -> None:
    """Prefill and decode of every student against the dense model, in this process, one student at a time."""
    import torch

    from sparsekd_ray.evaluate import speed
    from sparsekd_ray.model import loading

    place = {"device": device(config), "dtype": "bfloat16" if device(config) == "cuda" else "float32"}
    torch.set_num_threads(config.execution.threads)
    dense = loading.load(store.fetch(models[0].ref), **place)
    context = dense.config.max_position_embeddings
    new_tokens = min(NEW_TOKENS, context // 2)
    prompt = min(PROMPT, context - new_tokens)
    rows[0] |= {"flops_per_token": speed.flops_per_token(dense, prompt)}
    for row, step in zip(rows[1:], models[1:], strict=True):
        student = loading.load(store.fetch(step.ref), **place)
        row |= {"flops_per_token": speed.flops_per_token(student, prompt)}
        row |= speed.compare(dense, student, prompt=prompt, new_tokens=new_tokens, repeats=REPEATS)
        headline(
            f"speed of {step.name}: prefill {row['prefill_speedup']:.2f} ×, decode {row['decode_speedup']:.2f} ×"
        )


def keep(table: dict[str, Any], config: Config, store: Store) -> None:
    """Writes the table and its drawing into the run's directory."""
    folder = f"runs/{config.name}"
    store.write_text(f"{folder}/comparison.json", json.dumps(table, indent=1))
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "comparison.png"
        comparison.draw(table["rows"], path)
        store.write_bytes(f"{folder}/comparison.png", path.read_bytes())
