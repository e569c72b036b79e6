"""Ray Train around the loop: one worker group for a list of distillations, started again when a worker is lost."""

from __future__ import annotations

import gc
import logging
import os
import uuid
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import ray.train
import ray.train.collective
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from sparsekd_ray.config import Execution
from sparsekd_ray.distill.job import Job
from sparsekd_ray.distill.loop import distill
from sparsekd_ray.errors import SparseKDError
from sparsekd_ray.runtime.logging import forwarding
from sparsekd_ray.store import Ref, Store

if TYPE_CHECKING:
    from ray.util.queue import Queue

logger = logging.getLogger(__name__)

# Ray notices a dead worker at once; this must only outlast worker 0's upload of a large checkpoint
COLLECTIVE_TIMEOUT_S = 1800


class Work(NamedTuple):
    """Work that makes the artifact `ref`: a distillation by all workers, or a function that worker 0 calls alone."""

    ref: Ref
    task: Job | Callable[[], None]
    begin: Callable[[], None]
    """Worker 0 calls `begin` before the work and `end` after it; they tell the driver."""
    end: Callable[[], None]


def train(work: list[Work], store: Store, execution: Execution, log_queue: Queue) -> None:
    """Does `work` in order in one worker group. Each piece commits its artifact to the store.

    When a worker is lost, the group starts again, at most `execution.max_failures` times, and goes on from the last
    checkpoint. An error of this package (bad input, damaged artifact) would come again, so it is raised at once.
    `log_queue` carries the log lines of worker 0 to this process.
    """
    # real models take longer to load than Ray's default of 30 s for a worker group to start
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "900")
    if not execution.gpus:  # nobody preempts a laptop, and the watcher costs seconds of every start
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    for failures in range(execution.max_failures + 1):
        name = uuid.uuid4().hex
        try:
            _trainer(name, work, store, execution, log_queue).fit()
            store.delete(f"ray/{name}")  # Ray Train's bookkeeping of a run that is over
            return
        except TrainingFailedError as error:
            ours = _cause(error)
            if ours is not None or failures == execution.max_failures:
                raise (ours or error) from None
            logger.warning(
                f"worker group lost ({_short(error)}); restart {failures + 1} of {execution.max_failures}"
            )


def _trainer(
    name: str, work: list[Work], store: Store, execution: Execution, log_queue: Queue
) -> TorchTrainer:
    resources = {"CPU": 1.0} | ({"GPU": 1.0} if execution.gpus else {})
    return TorchTrainer(
        _worker,
        train_loop_config={"work": work, "store": store, "execution": execution, "log_queue": log_queue},
        torch_config=TorchConfig(
            backend="nccl" if execution.gpus else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S
        ),
        scaling_config=ScalingConfig(
            num_workers=execution.workers, use_gpu=execution.gpus, resources_per_worker=resources
        ),
        run_config=RunConfig(name=name, failure_config=FailureConfig(max_failures=0), **_storage(store)),
    )


def _storage(store: Store) -> dict[str, Any]:
    """Ray Train's own bookkeeping goes to a place that all nodes see; our checkpoints do not pass through it."""
    if not store.remote:
        return {"storage_path": store.url("ray")}
    import s3fs
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    # s3fs, as in the store: pyarrow's own client does not speak to every S3 server
    return {
        "storage_path": store.url("ray").removeprefix("s3://"),
        "storage_filesystem": PyFileSystem(FSSpecHandler(s3fs.S3FileSystem())),
    }


def _worker(config: dict[str, Any]) -> None:
    import torch

    first = ray.train.get_context().get_world_rank() == 0
    if not config["execution"].gpus:
        torch.set_num_threads(1)
    with forwarding(config["log_queue"]) if first else nullcontext():
        _run_all(config["work"], config["store"], config["execution"], first)


def _run_all(works: list[Work], store: Store, execution: Execution, first: bool) -> None:
    import torch

    for work in works:
        # worker 0 decides for all: a shared disk may show one worker a record later than another
        if ray.train.collective.broadcast_from_rank_zero(store.record(work.ref) is not None):
            continue
        if first:
            work.begin()
        if isinstance(work.task, Job):
            with store.building(work.ref):
                distill(work.task, store, execution)
            gc.collect()  # the engine holds itself in cycles, and the next job wants the card's memory
            torch.cuda.empty_cache()
        elif first:
            work.task()
        if first:
            work.end()


def _cause(error: TrainingFailedError) -> SparseKDError | None:
    """The first error of this package that a worker raised, if any did."""
    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else []
    for failure in failures:
        raised = getattr(failure, "_base_exc", failure)  # Ray Train wraps what the loop raised
        if isinstance(raised, SparseKDError):
            return raised
    return None


def _short(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
