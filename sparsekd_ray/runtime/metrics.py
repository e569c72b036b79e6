"""Live figures of a run: rows of `runs/<name>/metrics.jsonl`, written during the run and sent to a tracker if set.

Any process logs a row with `log`. A row is a log record, and comes from another machine through the same queue as the
log lines (`runtime.logging.forwarding`). Only the driver writes the file (`recording`). An S3 object cannot be appended
to, so the driver keeps all rows and replaces the file every few seconds.

    {"stage": "round 1", "kind": "training", "step": 12, "kl": 0.41, "ce": 2.93, "lr": 0.001, …}
    {"stage": "round 1", "kind": "distill", "artifact": …, "seconds": 31.5, "metrics": {…}}
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from sparsekd_ray.runtime.logging import METRICS, attached
from sparsekd_ray.store import Store

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_WRITES = 5.0
TRAINING = "training"

Row = Mapping[str, object]
Tracker = Callable[[Row], None]
"""Takes a row at once and raises nothing (`runtime.trackers.following`)."""


def log(stage: str, kind: str, **values: object) -> None:
    """Logs one row. `kind` is `TRAINING` for a step of a training, otherwise the kind of the finished stage."""
    now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    METRICS.info("", extra={"row": {"time": now, "stage": stage, "kind": kind, **values}})


def log_interval(steps: int) -> int:
    """Steps between two rows of a training: 200 to 399 rows, or one per step of a shorter one."""
    return max(1, steps // 200)


def memory_gb(device: torch.device) -> float:
    """The most that was in use on a GPU since it started, or what this process uses of the host's memory now."""
    import psutil
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return float(psutil.Process().memory_info().rss / 1e9)


class MetricsFile:
    """The rows of one run, in memory and in the store. Any thread may call its methods."""

    def __init__(self, store: Store, key: str) -> None:
        self.store, self.key, self.lock = store, key, threading.Lock()
        self.rows: list[Row] = [json.loads(line) for line in (store.read_text(key) or "").splitlines()]
        self.changed = False

    def add(self, row: Row) -> bool:
        """Appends a row and removes the rows that a killed attempt at the same work wrote from this step on.

        A row that the file holds already is not added again; the result is then False.
        """
        row = json.loads(json.dumps(row))  # the form in which later attempts read it
        with self.lock:
            if row in self.rows:
                return False
            self.rows = [other for other in self.rows if not _replaces(row, other)]
            self.rows.append(row)
            self.changed = True
        return True

    def write(self) -> None:
        """Writes the file to the store if a row was added since the last write."""
        with self.lock:
            if not self.changed:
                return
            text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in self.rows)
            self.changed = False
        self.store.write_text(self.key, text)


def _replaces(row: Row, other: Row) -> bool:
    """Whether `row` replaces `other`: its stage finished again, or its training resumed before `other`."""
    if (row["stage"], row["kind"]) != (other["stage"], other["kind"]):
        return False
    step, later = row.get("step"), other.get("step")
    return not isinstance(step, int) or not isinstance(later, int) or later >= step


class _Recorder(logging.Handler):
    """Adds the row of every log record to the file and the tracker."""

    def __init__(self, file: MetricsFile, tracker: Tracker | None) -> None:
        super().__init__()
        self.file, self.tracker = file, tracker

    def emit(self, record: logging.LogRecord) -> None:
        row: Row = record.__dict__["row"]
        if self.file.add(row) and self.tracker is not None:
            self.tracker(row)


@contextmanager
def recording(store: Store, key: str, tracker: Tracker | None = None) -> Iterator[None]:
    """Writes every row that reaches this process to `key` and to `tracker` while the block runs."""
    file, finished = MetricsFile(store, key), threading.Event()

    def write_regularly() -> None:
        while not finished.wait(SECONDS_BETWEEN_WRITES):
            _write(file)

    handler, writer = _Recorder(file, tracker), threading.Thread(target=write_regularly, daemon=True)
    writer.start()
    try:
        with attached(METRICS, handler):
            yield
    finally:
        finished.set()
        writer.join()
        _write(file)


def _write(file: MetricsFile) -> None:
    try:
        file.write()
    except Exception as error:  # a file of figures must not end a run while the store is away for a moment
        file.changed = True
        logger.warning(f"{file.key} could not be written; the next write tries again: {error}")
