"""Maps a function over tasks: one after the other in this process, or side by side on Ray.

A stage gives its tasks to a `TaskMap`, so it does not import what runs them. Large results go through the store, so
only small values return.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sparsekd_ray.config import Execution
from sparsekd_ray.runtime.logging import forwarding

TaskMap = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], Iterator[tuple[int, Any]]]
"""(function, arguments of each task) → (index, result) of every task as it finishes, in any order. The function stands
at a module's top level and its arguments can be pickled, since they may travel to another machine."""


def map_local(function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
    """Runs the tasks in this process, in order."""
    for index, arguments in enumerate(tasks):
        with threads_for(len(tasks)):
            result = function(*arguments)
        yield index, result


def map_on_ray(execution: Execution, log_queue: Any) -> TaskMap:
    """Runs every task as a Ray task: with one GPU if the run uses GPUs, otherwise with one core."""
    import ray

    from sparsekd_ray.runtime.cluster import unwrapped

    def task_map(function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        cpus = 1 if len(tasks) > 1 else execution.threads
        resources = {"num_cpus": 0, "num_gpus": 1} if execution.gpus else {"num_cpus": cpus}
        remote = ray.remote(_task).options(max_retries=execution.max_failures, **resources)
        waiting = {
            remote.remote(function, arguments, len(tasks), execution.threads, log_queue): index
            for index, arguments in enumerate(tasks)
        }
        while waiting:
            (done,), _ = ray.wait(list(waiting))
            index, ref = waiting.pop(done), done
            yield index, unwrapped(lambda ref=ref: ray.get(ref))  # type: ignore[misc]

    return task_map


def _task(
    function: Callable[..., Any], arguments: tuple[Any, ...], tasks: int, threads: int, log_queue: Any
) -> Any:
    with forwarding(log_queue), threads_for(tasks, threads):
        return function(*arguments)


@contextmanager
def threads_for(tasks: int, threads: int | None = None) -> Iterator[None]:
    """Sets one CPU thread per task if there are several, and `threads` (by default as before) for a single task.

    A task has the same number of threads on every machine, because the last bits of a sum depend on it.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1 if tasks > 1 else threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
