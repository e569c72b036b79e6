"""One process at a time works on a key: a lease is a small file in the store that names the holder.

The holder renews a heartbeat in the file. A new lease is created on condition that there is none. A lease whose
process died on this machine is taken over at once. A lease of another machine is taken over once its heartbeat has
been watched to stand still, since the clocks of two machines may differ. Some writes cannot be conditional (a
takeover; rclone): the process writes, waits a moment, and reads whose token the file holds. A holder that lost its
lease (a laptop that slept) learns it at its next heartbeat, or from ``ensure``.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from sparsekd_ray.errors import StoreError

if TYPE_CHECKING:
    from sparsekd_ray.store import Store

logger = logging.getLogger(__name__)

# Longest time between a rival's read and its write: {store is remote: seconds}.
SETTLE_SECONDS = {False: 0.3, True: 1.0}


class Lease:
    """A lease of this process; ``lost`` is set once another process has taken it over."""

    def __init__(self, store: "Store", key: str, body: dict[str, Any], ttl: float) -> None:
        self.store, self.key, self.body, self.ttl = store, key, body, ttl
        self.lost = threading.Event()

    def ensure(self) -> None:
        """Raises StoreError if another process took the lease over. Called before work that must not be done twice."""
        if time.time() - self.body["heartbeat"] > self.ttl / 2:  # the heartbeat thread is late
            self.beat()
        if self.lost.is_set():
            holder = _read(self.store, self.key).get("holder", "nobody")
            raise StoreError(
                f"{self.store.url(self.key)} was taken over while this process was silent: {holder} holds it. "
                f"Let that process work, or stop it and resubmit."
            )

    def beat(self) -> None:
        if _read(self.store, self.key).get("token") != self.body["token"]:
            self.lost.set()
        else:
            self.body["heartbeat"] = time.time()
            self.store.write_text(self.key, json.dumps(self.body))


@contextmanager
def hold(store: "Store", key: str, holder: str, ttl: float) -> Iterator[Lease]:
    """Holds the file ``key`` while the block runs. StoreError: another process holds it. ``ttl`` in seconds."""
    lease = Lease(store, key, _body(holder), ttl)
    _claim(lease)
    stop = threading.Event()
    heart = threading.Thread(target=_beat_until, args=(lease, stop), name=f"lease {key}", daemon=True)
    heart.start()
    try:
        yield lease
    finally:
        stop.set()
        heart.join()
        with suppress(StoreError):  # a lease that cannot be deleted now is stale after ttl
            if _read(store, key).get("token") == lease.body["token"]:
                store.delete(key)


def _claim(lease: Lease) -> None:
    store, key = lease.store, lease.key
    if not _read(store, key) and store.create(key, json.dumps(lease.body).encode()):
        return
    rival = _read(store, key)
    if rival.get("token") != lease.body["token"]:
        if rival and not _dead(rival):
            _watch(lease, rival)
        lease.body["heartbeat"] = time.time()
        store.write_text(key, json.dumps(lease.body))
    time.sleep(SETTLE_SECONDS[store.remote])
    if (rival := _read(store, key)).get("token") != lease.body["token"]:
        raise _held_by(lease, rival)


def _watch(lease: Lease, rival: dict[str, Any]) -> None:
    """Returns once the holder counts as dead. Raises StoreError at its first sign of life."""
    silent = time.time() - rival.get("heartbeat", 0)
    if silent <= lease.ttl and _same_machine(rival):
        raise _held_by(lease, rival)
    seconds = lease.ttl / 3 if silent > lease.ttl else lease.ttl  # a heartbeat comes every ttl / 4
    logger.warning(
        f"{rival.get('holder', 'somebody')} holds {lease.key}: watching for {seconds:.0f} s whether it is alive"
    )
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(lease.ttl / 60)
        if (current := _read(lease.store, lease.key)) != rival:
            if current:
                raise _held_by(lease, current)
            return  # the holder released it


def _beat_until(lease: Lease, stop: threading.Event) -> None:
    while not stop.wait(lease.ttl / 4) and not lease.lost.is_set():
        with suppress(StoreError):  # the store may be away for a moment; ensure() raises if it stays away
            lease.beat()


def _body(holder: str) -> dict[str, Any]:
    return {
        "holder": f"{holder} (process {os.getpid()} on {socket.gethostname()})",
        "host": socket.gethostname(),
        "processes": _process_table(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "token": uuid.uuid4().hex,
        "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        "heartbeat": time.time(),
    }


def _process_table() -> str:
    """Names the process table that this process's number belongs to. A host name is not enough: machines are cloned,
    and containers on the host's network share its name but not its processes."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    if not boot.exists():
        return f"{uuid.getnode():x}"
    return f"{boot.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def _same_machine(body: dict[str, Any]) -> bool:
    return (body.get("host"), body.get("processes")) == (socket.gethostname(), _process_table())


def _dead(body: dict[str, Any]) -> bool:
    """Whether a lease's process is known to have ended. Processes of other machines are never known to."""
    if not _same_machine(body):
        return False
    try:
        process = psutil.Process(body["pid"])
        # The same number may have been given to a newer process; clock corrections move start times a little.
        return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - body["started"]) > 2
    except psutil.NoSuchProcess:
        return True


def _read(store: "Store", key: str) -> dict[str, Any]:
    """The lease's body; empty if there is no lease, or if it cannot be parsed."""
    try:
        body = json.loads(store.read_bytes(key) or b"{}")
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _held_by(lease: Lease, rival: dict[str, Any]) -> StoreError:
    age = time.time() - rival.get("heartbeat", 0)
    holder, since = rival.get("holder", "somebody"), rival.get("since", "an unknown time")
    return StoreError(
        f"{lease.store.url(lease.key)} is held by {holder} since {since}, last heard of {age:.0f} s ago. "
        f"Only one process may work on it at a time. Wait for its end or stop it, then resubmit."
    )
