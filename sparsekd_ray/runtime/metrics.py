"""Live figures of a run: `runs/<name>/metrics.jsonl` grows while it works, and a tracker may follow.

Any process logs a row with `log`. A row travels as a log record, on another machine through the same queue as the log
lines (`runtime.logging.forwarding`). The driver alone writes the file (`recording`), since an object of an S3 store
cannot be appended to: it holds all rows and replaces the file every few seconds.

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

from sparsekd_ray.runtime.logging import METRICS, attached
from sparsekd_ray.store import Store

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_WRITES = 5.0
TRAINING = "training"

Row = Mapping[str, object]
Tracker = Callable[[Row], None]
"""Takes a row at once and raises nothing (`runtime.trackers.following`)."""


def log(stage: str, kind: str, **values: object) -> None:
    """One row: `kind` is `TRAINING` for a step of a training, else the kind of the stage that is finished."""
    now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    METRICS.info("", extra={"row": {"time": now, "stage": stage, "kind": kind, **values}})


def log_interval(steps: int) -> int:
    """Steps between two rows of a training: about 200 rows, however long it is."""
    return max(1, steps // 200)


class MetricsFile:
    """The rows of one run, in memory and, every few seconds, in the store. Its methods may be called by any thread."""

    def __init__(self, store: Store, key: str) -> None:
        self.store, self.key, self.lock = store, key, threading.Lock()
        self.rows: list[Row] = [json.loads(line) for line in (store.read_text(key) or "").splitlines()]
        self.changed = False

    def add(self, row: Row) -> bool:
        """Appends a row, in place of what a killed attempt at the same work wrote from there on.

        False, and nothing done, for a row that is there already.
        """
        row = json.loads(json.dumps(row))  # as it is read again
        with self.lock:
            if row in self.rows:
                return False
            self.rows = [other for other in self.rows if not _replaces(row, other)]
            self.rows.append(row)
            self.changed = True
        return True

    def write(self) -> None:
        """Puts the file into the store, if a row came since the last time."""
        with self.lock:
            if not self.changed:
                return
            text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in self.rows)
            self.changed = False
        self.store.write_text(self.key, text)


def _replaces(row: Row, other: Row) -> bool:
    """Whether `row` stands for `other`: the same stage finished again, or a training that resumed before `other`."""
    if (row["stage"], row["kind"]) != (other["stage"], other["kind"]):
        return False
    step, later = row.get("step"), other.get("step")
    return not isinstance(step, int) or not isinstance(later, int) or later >= step


class _Recorder(logging.Handler):
    """Hands the rows among the log records to the file and the tracker."""

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
    except Exception as error:  # a store that is away for a moment must not end a run for a file of figures
        file.changed = True
        logger.warning(f"{file.key} could not be written and is tried again: {error}")
