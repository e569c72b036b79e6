"""Runs a plan: makes the artifacts that have no record yet, one stage after the other, and logs each step.

The driver holds no state that matters: a step is done when the store has its record. A user who loses the driver
submits the same command again. Stages run as Ray tasks and captures on Ray Data. Distillations run on Ray Train, as
many as possible in one worker group.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import ray

from sparsekd_ray import corpus
from sparsekd_ray.cascade import console, stages
from sparsekd_ray.cascade.steps import Step
from sparsekd_ray.config import Config, Corpus, Distill, Execution
from sparsekd_ray.runtime.cluster import connected, unwrapped
from sparsekd_ray.runtime.logging import forwarding, listening
from sparsekd_ray.runtime.tasks import map_local, map_on_ray
from sparsekd_ray.store import Ref, Store

if TYPE_CHECKING:
    from sparsekd_ray.distill.job import Job


@ray.remote
def _run_stage(
    step: Step, parents: dict[str, Ref], store: Store, execution: Execution, log_queue: Any
) -> None:
    import torch

    torch.set_num_threads(execution.threads)
    with forwarding(log_queue):
        stages.run(step, parents, store, execution, map_on_ray(execution, log_queue))


def run(config: Config, steps: list[Step], store: Store, ensure_lease: Callable[[], None]) -> None:
    """Makes every step that is not in the store yet, in an order that respects inputs.

    `ensure_lease` raises StoreError if another driver has taken the run over.
    """
    pending = [step for step in steps if store.record(step.ref) is None]
    for step in pending:
        if isinstance(step.settings, Corpus):
            corpus.check_hub(step.settings)  # fails before a model is fetched
    processes = side_by_side(pending, config.execution)
    with connected(config.execution, processes), listening() as log_queue:
        threading.Thread(target=_import_ahead, daemon=True).start()
        while pending:
            batch = next_batch(pending, apart=config.execution.gpus)
            with ExitStack() as leases:  # another run may make the same artifacts
                for step in batch:
                    leases.enter_context(store.lease(step.ref.key, f"run {config.name}"))
                ensure_lease()
                todo = [step for step in batch if store.record(step.ref) is None]
                if todo:
                    _run_batch(todo, steps, config, store, log_queue)
            pending = [step for step in pending if step not in batch]


def side_by_side(steps: list[Step], execution: Execution) -> int:
    """The largest number of workers or actors that `steps` need at one time."""
    counts = {"distill": execution.workers, "cache": execution.actors}
    return max((counts.get(step.kind, 1) for step in steps), default=1)


def next_batch(pending: list[Step], apart: bool = False) -> list[Step]:
    """The next steps to run together; `pending` is in an order that respects inputs.

    A ready step that is no distillation runs alone. Captures come after other such steps, because Ray keeps a process
    for the next task only until actors need its CPU. If only distillations are ready, a worker group starts. Starting
    it costs more than a small distillation, so the group also takes the steps that its own work makes possible, up to
    the next capture. With `apart` it also ends before steps that run tasks of their own, so that these get all GPUs.
    """
    waiting = {step.name for step in pending}
    ready = [step for step in pending if not waiting & set(step.inputs.values())]
    others = sorted((step for step in ready if step.kind != "distill"), key=lambda step: step.kind == "cache")
    if others:
        return others[:1]
    group: list[Step] = []
    outside = ("cache", *stages.MAPPED) if apart else ("cache",)
    for step in pending:
        if step.kind not in outside and not waiting & set(step.inputs.values()):
            group.append(step)
            waiting.remove(step.name)
    return group


def _import_ahead() -> None:
    """Imports Ray Data and Ray Train while the first stage runs, because these imports take seconds."""
    import sparsekd_ray.distill.trainer
    import sparsekd_ray.teacher.capture  # noqa: F401


def _run_batch(batch: list[Step], steps: list[Step], config: Config, store: Store, log_queue: Any) -> None:
    """Makes the artifacts of one step, or of a group with distillations."""
    step, refs = batch[0], {step.name: step.ref for step in steps}
    if any(step.kind == "distill" for step in batch):
        _train(batch, steps, config, store, log_queue)
        return
    parents = {role: refs[name] for role, name in step.inputs.items()}
    console.begins(step)
    if step.kind == "cache":
        _capture(step, parents, config, store)
    else:
        resources = {"num_cpus": config.execution.threads, "num_gpus": int(config.execution.gpus)}
        if step.kind in stages.MAPPED:  # their tasks ask for the resources
            resources = {"num_cpus": 0, "num_gpus": 0}
        task = _run_stage.options(**resources).remote(step, parents, store, config.execution, log_queue)
        unwrapped(lambda: ray.get(task))
    console.ends(step, store)


def _capture(step: Step, parents: dict[str, Ref], config: Config, store: Store) -> None:
    from sparsekd_ray.teacher.capture import capture

    started = time.monotonic()
    metrics = unwrapped(
        lambda: capture(
            parents["teacher"],
            parents["texts"],
            step.ref,
            settings=config.teacher,
            store=store,
            execution=config.execution,
        )
    )
    inputs = {role: ref.key for role, ref in parents.items()}
    seconds = time.monotonic() - started
    store.commit(step.ref, identity=step.identity, inputs=inputs, metrics=dict(metrics), seconds=seconds)


def _train(batch: list[Step], steps: list[Step], config: Config, store: Store, log_queue: Any) -> None:
    from sparsekd_ray.distill.trainer import Work, train

    work = []
    for step in batch:
        task = (
            _job(step, steps)
            if step.kind == "distill"
            else partial(_run_on_first_worker, step, steps, store, config)
        )
        begin, end = partial(console.begins, step), partial(console.ends, step, store)
        work.append(Work(step.ref, task, begin, end))
    train(work, store, config.execution, log_queue)


def _job(step: Step, steps: list[Step]) -> Job:
    from sparsekd_ray.distill.job import Job

    assert isinstance(step.settings, Distill), f"{step.name} is a distillation"
    by_name = {step.name: step for step in steps}
    parents = {role: by_name[name].ref for role, name in step.inputs.items()}
    return Job(
        title=step.name,
        student=parents["student"],
        cache=parents["cache"],
        teacher=by_name[by_name[step.inputs["cache"]].inputs["teacher"]].ref,
        corpus=parents["texts"],
        out=step.ref,
        settings=step.settings,
        seed=step.seed,
        identity=step.identity,
        inputs={role: ref.key for role, ref in parents.items()},
    )


def _run_on_first_worker(step: Step, steps: list[Step], store: Store, config: Config) -> None:
    """Runs a step between two distillations on worker 0, with as many threads as it has as a separate task."""
    import torch

    refs = {step.name: step.ref for step in steps}
    parents = {role: refs[name] for role, name in step.inputs.items()}
    before = torch.get_num_threads()
    torch.set_num_threads(config.execution.threads)
    stages.run(step, parents, store, config.execution, map_local)  # the worker group occupies Ray's cores
    torch.set_num_threads(before)
