"""The connection to Ray: the cluster that `ray job submit` names, or a local Ray of this process's own."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

from sparsekd_ray.config import Execution
from sparsekd_ray.errors import SparseKDError

logger = logging.getLogger(__name__)


def unwrapped(call: Callable[[], Any]) -> Any:
    """Our own errors as they were raised in the other process, without Ray's traceback around them."""
    try:
        return call()
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, SparseKDError):
            raise error.cause from None
        raise


@contextmanager
def connected(execution: Execution) -> Iterator[None]:
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
        _check_resources(execution, needed)
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


def _check_resources(execution: Execution, needed: int) -> None:
    """Says at once, rather than waiting for ever, what the cluster lacks."""
    have = ray.cluster_resources()
    gpus = max(execution.workers, execution.actors) if execution.gpus else 0
    if have.get("CPU", 0) < needed or have.get("GPU", 0) < gpus:
        found = f"{have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs"
        logger.warning(
            f"the cluster has {found} now; this run asks for {needed} CPUs and {gpus} GPUs at a time and waits for an "
            "autoscaler to add them (or lower execution.workers, actors, threads)"
        )
