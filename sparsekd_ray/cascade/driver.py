"""Runs a plan: makes what has no record yet, one stage after the other, and prints what it does.

The driver holds no state that matters. What is done is what has a record in the store; a killed driver is replaced by
submitting the same command again. Stages run as Ray tasks, captures on Ray Data, and distillations that are ready at
the same time share one Ray Train worker group, since starting a group costs more than a small distillation.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.queue import Empty, Queue

from sparsekd_ray.cascade import console, stages
from sparsekd_ray.cascade.plan import Step
from sparsekd_ray.config import Config, Execution
from sparsekd_ray.errors import SparseKDError
from sparsekd_ray.store import Ref, Store

Say = Callable[[str], None]


class Lines:
    """Carries progress lines from any process of the cluster to the driver's console; picklable."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue

    def __call__(self, text: str) -> None:
        self.queue.put_nowait(text)


@ray.remote
def _run_stage(step: Step, parents: dict[str, Ref], store: Store, execution: Execution, lines: Lines) -> None:
    import torch

    torch.set_num_threads(execution.threads)
    stages.run(step, parents, store, lines)


def run(config: Config, steps: list[Step], store: Store, say: Say) -> None:
    """Makes every step that is not in the store yet, in the plan's order as far as inputs allow."""
    pending = [step for step in steps if store.record(step.ref) is None]
    with connected(config.execution, say), _console(say) as lines:
        while pending:
            batch = next_batch(pending)
            for step in batch:
                say(console.begins(step))
            _make(batch, steps, config, store, say, lines)
            for step in batch:
                say(console.ends(step, store.record(step.ref) or {}))
            pending = [step for step in pending if step not in batch]


def next_batch(pending: list[Step]) -> list[Step]:
    """The next steps to run together: any one that is ready and is no distillation, else all distillations that are."""
    waiting = {step.name for step in pending}
    ready = [step for step in pending if not waiting & set(step.inputs.values())]
    single = next((step for step in ready if step.kind != "distill"), None)
    return [single] if single else ready


def _make(batch: list[Step], steps: list[Step], config: Config, store: Store, say: Say, lines: Lines) -> None:
    step = batch[0]
    refs = {step.name: step.ref for step in steps}
    parents = {role: refs[name] for role, name in step.inputs.items()}
    if step.kind == "distill":
        _distill(batch, steps, config, store, say, lines)
    elif step.kind == "cache":
        _capture(step, parents, config, store, say)
    else:
        resources = {"num_cpus": config.execution.threads, "num_gpus": int(config.execution.gpus)}
        task = _run_stage.options(**resources).remote(step, parents, store, config.execution, lines)
        _unwrapped(lambda: ray.get(task))


def _capture(step: Step, parents: dict[str, Ref], config: Config, store: Store, say: Say) -> None:
    from sparsekd_ray.teacher.capture import capture

    started = time.monotonic()
    metrics = _unwrapped(
        lambda: capture(
            parents["teacher"],
            parents["texts"],
            step.ref,
            settings=config.teacher,
            store=store,
            execution=config.execution,
            say=lambda text: say(console.inside(text)),
        )
    )
    inputs = {role: ref.key for role, ref in parents.items()}
    seconds = time.monotonic() - started
    store.commit(step.ref, identity=step.identity, inputs=inputs, metrics=metrics, seconds=seconds)


def _distill(
    batch: list[Step], steps: list[Step], config: Config, store: Store, say: Say, lines: Lines
) -> None:
    from sparsekd_ray.distill.loop import Job
    from sparsekd_ray.distill.trainer import train

    refs = {step.name: step.ref for step in steps}
    teachers = {step.name: refs[step.inputs["teacher"]] for step in steps if step.kind == "cache"}
    jobs = [
        Job(
            title=step.name,
            student=refs[step.inputs["student"]],
            cache=refs[step.inputs["cache"]],
            teacher=teachers[step.inputs["cache"]],
            corpus=refs[step.inputs["texts"]],
            out=step.ref,
            settings=step.settings,
            seed=step.seed,
            identity=step.identity,
            inputs={role: refs[name].key for role, name in step.inputs.items()},
        )
        for step in batch
    ]
    train(jobs, store, config.execution, say, lines)


def _unwrapped(call: Callable[[], Any]) -> Any:
    """Our own errors as they were raised in the other process, without Ray's traceback around them."""
    try:
        return call()
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, SparseKDError):
            raise error.cause from None
        raise


@contextmanager
def connected(execution: Execution, say: Say) -> Iterator[None]:
    """A connection to the cluster of RAY_ADDRESS (set by `ray job submit`), or a local Ray of our own."""
    if ray.is_initialized():  # a test's cluster
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its warnings about actors are for Ray's developers
    # threads that sleep while they wait, instead of spinning, train twice as fast on a machine that does other work too
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    needed = max(execution.workers, execution.actors, execution.threads)
    if address:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, TimeoutError, ValueError, RuntimeError) as error:
            raise SparseKDError(
                f"no Ray cluster answers at RAY_ADDRESS={address} ({str(error).splitlines()[0]}): start one with "
                "`ray start --head`, correct the address, or unset RAY_ADDRESS to use this machine alone"
            ) from None
    else:
        cpus = max(os.cpu_count() or 1, needed)
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
    try:
        _check_resources(execution, needed, say)
        yield
    finally:
        ray.shutdown()


def _check_resources(execution: Execution, needed: int, say: Say) -> None:
    """Says at once, rather than waiting for ever, what the cluster lacks."""
    have = ray.cluster_resources()
    gpus = max(execution.workers, execution.actors) if execution.gpus else 0
    if have.get("CPU", 0) < needed or have.get("GPU", 0) < gpus:
        found = f"{have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs"
        say(
            f"the cluster has {found} now; this run asks for {needed} CPUs and {gpus} GPUs at a time and waits for an "
            "autoscaler to add them (or lower execution.workers, actors, threads)"
        )


@contextmanager
def _console(say: Say) -> Iterator[Lines]:
    """Prints progress lines from everywhere in the cluster until the block ends, at most one a second."""
    queue = Queue(actor_options={"num_cpus": 0})
    over = threading.Event()

    def drain() -> None:
        printed = 0.0
        while not over.is_set():
            try:
                text = queue.get(timeout=0.5)
            except Empty:
                continue
            if time.monotonic() - printed > 1:
                say(console.inside(text))
                printed = time.monotonic()

    printer = threading.Thread(target=drain, daemon=True)
    printer.start()
    try:
        yield Lines(queue)
    finally:
        over.set()
        printer.join(timeout=5)
        if ray.is_initialized():
            queue.shutdown(force=True)
