"""The connection to Ray: the cluster that `ray job submit` names, or a local Ray of this process's own.

A local Ray cannot grow, so a run that asks for more GPUs than this machine has is refused at once. A cluster may have
an autoscaler, so a run waits there for missing CPUs and GPUs, and logs what is missing every minute.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import ray

from sparsekd_ray.config import Execution
from sparsekd_ray.errors import ClusterError, SparseKDError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

SECONDS_BETWEEN_REMINDERS = 60.0
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}

# Ray's longest socket below its temporary directory; the system allows 107 bytes in all (103 on a Mac)
SOCKET = "/ray/session_2026-01-31_23-59-59_000000_4194304/sockets/plasma_store"
LONGEST_TEMPORARY_DIRECTORY = (103 if sys.platform == "darwin" else 107) - len(SOCKET)


def unwrapped(call: Callable[[], Result]) -> Result:
    """Runs `call`, and raises an error of this package as the other process raised it, without Ray's traceback."""
    try:
        return call()
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, SparseKDError):
            raise error.cause from None
        raise


@contextmanager
def connected(execution: Execution, processes: int = 1) -> Iterator[None]:
    """A connection to the cluster of RAY_ADDRESS (`ray job submit` sets it), or a local Ray of this process.

    `processes`: number of workers or actors that the run needs side by side, each with a GPU if `execution.gpus`.
    Raises ClusterError if Ray cannot be reached or started, or if a local Ray has too few GPUs.
    """
    if ray.is_initialized():  # a test has started its cluster
        yield
        return
    # Ray's C++ warnings about actors are for Ray's developers
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # waiting threads sleep instead of spinning, and leave the cores to other work
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            _join(address)
            with _reminding(lambda: shortage(execution, processes)):
                yield
        else:
            _start(max(os.cpu_count() or 1, execution.workers, execution.actors, execution.threads))
            _refuse_missing_gpus(execution, processes)
            yield
    finally:
        ray.shutdown()


def _join(address: str) -> None:
    if address.startswith(("http://", "https://")):
        raise ClusterError(
            f"RAY_ADDRESS={address} is where jobs are submitted. Submit this command with `ray job submit --address "
            f"{address} --working-dir . -- python …`, or unset RAY_ADDRESS to use this machine alone."
        )
    try:
        _knock(address)
        with _silent_stderr():
            ray.init(address=address, **QUIET)
    except Exception as error:  # Ray raises many types here
        raise ClusterError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({_first_line(error)}): start one with "
            "`ray start --head`, correct the address, or unset RAY_ADDRESS to use this machine alone"
        ) from None


def _knock(address: str) -> None:
    """Raises ConnectionError within seconds if nothing listens at the address. Ray would try for two minutes."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if separator and port.isdigit() and "/" not in host:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            raise ConnectionError(str(error)) from None


def _start(cpus: int) -> None:
    check_temporary_directory()
    # a stage and its tasks need one process more than there are cores; a new process would import torch again
    os.environ.setdefault("RAY_num_workers_soft_limit", str(cpus + 2))
    try:
        with _silent_stderr():
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, **QUIET)
    except Exception as error:  # Ray raises many types here
        raise ClusterError(
            f"Ray does not start on this machine ({_first_line(error)}). Its files and logs go to "
            f"{_temporary_directory()[1]}/ray: give a directory that this user may write, and that has space, in "
            "RAY_TMPDIR."
        ) from None


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drops the lines that Ray's C++ code writes to standard error at its start. Ray raises its errors as well."""
    before, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nothing)


def check_temporary_directory() -> None:
    """Raises ClusterError if the paths of Ray's sockets would be too long, as below a batch system's scratch."""
    variable, directory = _temporary_directory()
    if len(os.fsencode(directory)) > LONGEST_TEMPORARY_DIRECTORY:
        raise ClusterError(
            f"{variable}={directory} is too long for Ray: its sockets lie below it, and their paths may have only "
            f"{LONGEST_TEMPORARY_DIRECTORY + len(SOCKET)} bytes. Set RAY_TMPDIR to a directory of at most "
            f"{LONGEST_TEMPORARY_DIRECTORY} bytes, such as RAY_TMPDIR=/tmp."
        )


def _temporary_directory() -> tuple[str, str]:
    """(the variable that Ray takes its temporary directory from, the directory)."""
    for variable in ("RAY_TMPDIR", "TMPDIR"):
        if variable in os.environ and (variable == "RAY_TMPDIR" or sys.platform.startswith("linux")):
            return variable, os.environ[variable]
    return "RAY_TMPDIR", "/tmp"


def _refuse_missing_gpus(execution: Execution, processes: int) -> None:
    """Raises ClusterError if this machine has too few GPUs. No autoscaler can add any to a local Ray."""
    if not execution.gpus or (gpus := _count("GPU")) >= processes:
        return
    if gpus == 0:
        advice = "Leave out --execution.gpus, or submit the job to a cluster that has GPUs (RAY_ADDRESS)."
    else:
        advice = f"Set --execution.workers {gpus} --execution.actors {gpus}, or submit the job to a larger cluster."
    raise ClusterError(
        f"execution.gpus asks for {processes} GPU{'s' * (processes > 1)} at a time; Ray finds {gpus} on this machine "
        f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}). {advice}"
    )


def shortage(execution: Execution, processes: int) -> str | None:
    """The CPUs and GPUs that the cluster lacks at present, in words; None if it lacks nothing."""
    cpus, gpus = _count("CPU"), _count("GPU")
    needed_cpus = max(processes, execution.threads)
    needed_gpus = processes if execution.gpus else 0
    if cpus >= needed_cpus and gpus >= needed_gpus:
        return None
    return (
        f"the cluster has {cpus} CPUs and {gpus} GPUs; this run needs {needed_cpus} CPUs and {needed_gpus} GPUs at a "
        "time and waits for them. If no autoscaler adds them, stop the run and lower execution.workers, "
        "actors or threads, or leave out execution.gpus"
    )


def _count(resource: str) -> int:
    return int(ray.cluster_resources().get(resource, 0))  # type: ignore[no-untyped-call]


@contextmanager
def _reminding(missing: Callable[[], str | None]) -> Iterator[None]:
    """Logs what is missing, at once and every minute until nothing is missing, while the block runs."""
    done = threading.Event()

    def remind() -> None:
        while (text := missing()) is not None:
            logger.warning(text)
            if done.wait(SECONDS_BETWEEN_REMINDERS):
                return

    thread = threading.Thread(target=remind, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
