"""Runs a plan: makes what has no record yet, one stage after the other, and prints what it does.

The driver holds no state that matters. What is done is what has a record in the store; a killed driver is replaced by
submitting the same command again. Stages run as Ray tasks, captures on Ray Data, distillations on Ray Train, as many as
possible in one worker group.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import ray
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sparsekd_ray.cascade import console, stages
from sparsekd_ray.cascade.steps import Step
from sparsekd_ray.config import Config, Execution
from sparsekd_ray.errors import SparseKDError
from sparsekd_ray.runtime.tasks import TaskMap, map_local, threads_for
from sparsekd_ray.store import Ref, Store

Say = Callable[[str], None]


class Lines:
    """Carries lines from any process of the cluster to the driver's console; picklable."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue

    def __call__(self, text: str) -> None:
        """Progress, of which the console prints at most one line a second."""
        self.queue.put_nowait((text, False))

    def keep(self, text: str) -> None:
        """A line that is printed in any case."""
        self.queue.put_nowait((text, True))


@ray.remote
def _run_stage(step: Step, parents: dict[str, Ref], store: Store, execution: Execution, lines: Lines) -> None:
    import torch

    torch.set_num_threads(execution.threads)
    stages.run(step, parents, store, execution, map_on_ray(execution), lines)


@ray.remote
def _task(function: Callable[..., Any], arguments: tuple[Any, ...], pieces: int, threads: int) -> Any:
    with threads_for(pieces, threads):
        return function(*arguments)


def map_on_ray(execution: Execution) -> TaskMap:
    """A stage's pieces as Ray tasks: on a GPU each where the run has them, on a core each otherwise."""

    def each(function: Callable[..., Any], pieces: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        cpus = 1 if len(pieces) > 1 else execution.threads
        resources = {"num_cpus": 0, "num_gpus": 1} if execution.gpus else {"num_cpus": cpus}
        task = _task.options(max_retries=execution.max_failures, **resources)
        waiting = {
            task.remote(function, arguments, len(pieces), execution.threads): index
            for index, arguments in enumerate(pieces)
        }
        while waiting:
            (done,), _ = ray.wait(list(waiting))
            index, ref = waiting.pop(done), done
            yield index, unwrapped(lambda ref=ref: ray.get(ref))  # type: ignore[misc]

    return each


def run(config: Config, steps: list[Step], store: Store, say: Say, still_ours: Callable[[], None]) -> None:
    """Makes every step that is not in the store yet, in the plan's order as far as inputs allow.

    `still_ours` raises StoreError if another driver has taken the run over.
    """
    pending = [step for step in steps if store.record(step.ref) is None]
    with connected(config.execution, say), _console(say) as lines:
        threading.Thread(target=_import_ahead, daemon=True).start()
        while pending:
            batch = next_batch(pending, apart=config.execution.gpus)
            with ExitStack() as held:  # another run may want the same artifacts
                for step in batch:
                    held.enter_context(store.lease(step.ref.key, f"run {config.name}", say=say))
                still_ours()
                todo = [step for step in batch if store.record(step.ref) is None]
                if todo:
                    _make(todo, steps, config, store, say, lines)
            pending = [step for step in pending if step not in batch]


def next_batch(pending: list[Step], apart: bool = False) -> list[Step]:
    """The next steps to run together; `pending` is in an order that respects inputs.

    A step that is ready and is no distillation runs alone, captures after the others: Ray keeps a process for the
    next task only until actors want its CPU. When only distillations are ready, a worker group starts, which costs
    more than a small distillation: it also takes all that becomes possible by its own work, up to the next capture
    and, with `apart`, up to the next work in pieces, which large models want on all GPUs.
    """
    waiting = {step.name for step in pending}
    ready = [step for step in pending if not waiting & set(step.inputs.values())]
    alone = sorted((step for step in ready if step.kind != "distill"), key=lambda step: step.kind == "cache")
    if alone:
        return alone[:1]
    group: list[Step] = []
    outside = ("cache", *stages.IN_PIECES) if apart else ("cache",)
    for step in pending:
        if step.kind not in outside and not waiting & set(step.inputs.values()):
            group.append(step)
            waiting.remove(step.name)
    return group


def _import_ahead() -> None:
    """Ray Data and Ray Train take seconds to import, which pass unnoticed beside the first stage."""
    import sparsekd_ray.distill.trainer
    import sparsekd_ray.teacher.capture  # noqa: F401


def _make(batch: list[Step], steps: list[Step], config: Config, store: Store, say: Say, lines: Lines) -> None:
    step, refs = batch[0], {step.name: step.ref for step in steps}
    if any(step.kind == "distill" for step in batch):
        _train(batch, steps, config, store, say, lines)
        return
    parents = {role: refs[name] for role, name in step.inputs.items()}
    say(console.begins(step))
    if step.kind == "cache":
        _capture(step, parents, config, store, say)
    else:
        resources = {"num_cpus": config.execution.threads, "num_gpus": int(config.execution.gpus)}
        if step.kind in stages.IN_PIECES:  # whose pieces take what they need
            resources = {"num_cpus": 0, "num_gpus": 0}
        task = _run_stage.options(**resources).remote(step, parents, store, config.execution, lines)
        unwrapped(lambda: ray.get(task))
    say(console.ends(step, store))


def _capture(step: Step, parents: dict[str, Ref], config: Config, store: Store, say: Say) -> None:
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
            say=lambda text: say(console.inside(text)),
        )
    )
    inputs = {role: ref.key for role, ref in parents.items()}
    seconds = time.monotonic() - started
    store.commit(step.ref, identity=step.identity, inputs=inputs, metrics=metrics, seconds=seconds)


def _train(
    batch: list[Step], steps: list[Step], config: Config, store: Store, say: Say, lines: Lines
) -> None:
    from sparsekd_ray.distill.trainer import Work, train

    work = []
    for step in batch:
        task = _job(step, steps) if step.kind == "distill" else partial(_alone, step, steps, store, config)
        begin, end = partial(console.begins, step), partial(console.ends, step, store)
        work.append(Work(step.ref, task, begin, end))
    train(work, store, config.execution, say, lines)


def _job(step: Step, steps: list[Step]) -> Any:
    from sparsekd_ray.distill.loop import Job

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


def _alone(step: Step, steps: list[Step], store: Store, config: Config, lines: Lines) -> None:
    """A step between distillations, on worker 0, with the threads it would have had as a task of its own."""
    import torch

    refs = {step.name: step.ref for step in steps}
    parents = {role: refs[name] for role, name in step.inputs.items()}
    before = torch.get_num_threads()
    torch.set_num_threads(config.execution.threads)
    stages.run(step, parents, store, config.execution, map_local, lines)  # Ray's cores are this group's own
    torch.set_num_threads(before)


def unwrapped(call: Callable[[], Any]) -> Any:
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
    os.environ.setdefault(
        "RAY_BACKEND_LOG_LEVEL", "fatal"
    )  # its warnings about actors are for Ray's developers
    # threads that sleep while they wait, instead of spinning, leave the cores to whatever else the machine does
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    needed = max(execution.workers, execution.actors, execution.threads)
    if address:
        try:
            _knock(address)
            ray.init(address=address, **quiet)
        except (ConnectionError, TimeoutError, ValueError, RuntimeError) as error:
            raise SparseKDError(
                f"no Ray cluster answers at RAY_ADDRESS={address} ({str(error).splitlines()[0]}): start one with "
                "`ray start --head`, correct the address, or unset RAY_ADDRESS to use this machine alone"
            ) from None
    else:
        cpus = max(os.cpu_count() or 1, needed)
        # a stage and its pieces are one process more than there are cores; a new one would import torch again
        os.environ.setdefault("RAY_num_workers_soft_limit", str(cpus + 2))
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
    try:
        _check_resources(execution, needed, say)
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """ConnectionError or TimeoutError within seconds where nothing listens; Ray alone would try for two minutes."""
    host, separator, port = address.rpartition(":")
    if separator and port.isdigit() and "/" not in host:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError as error:
            raise ConnectionError(str(error)) from None


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
    """Prints lines from everywhere in the cluster until the block ends."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})  # a spot node may go
    over = threading.Event()

    def drain() -> None:
        printed = 0.0
        while not (over.is_set() and queue.empty()):
            try:
                text, keep = queue.get(timeout=0.5)
            except Empty:
                continue
            if keep or time.monotonic() - printed > 1:
                say(text if keep else console.inside(text))
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
