"""Log lines from any process of a cluster, printed by the driver.

Every module logs through `logging.getLogger(__name__)`. The console prints four kinds of lines:

- headlines (`headline`): the plan, the start and the end of a step, the result. They are always printed.
- INFO of any other module: a fact that is stated once. It is indented and always printed.
- progress (`log_progress`): how far a step is. It is indented, and at most one line every two seconds is printed. The
  last line before a line of another kind is always printed, so a reader sees the end of a loop.
- WARNING and above: always printed, after the name of the level.

A process on another machine sends its records through a Ray queue (`forwarding`), and the driver prints them
(`listening`). Live figures (`runtime.metrics`) travel the same way, by a separate logger that no console reads.
"""

from __future__ import annotations

import logging
import logging.handlers
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

PACKAGE = logging.getLogger("sparsekd_ray")
HEADLINES = logging.getLogger("sparsekd_ray.headlines")
METRICS = logging.getLogger("sparsekd_metrics")
METRICS.propagate = False
SECONDS_BETWEEN_PROGRESS_LINES = 2.0


def headline(text: str) -> None:
    """Logs a line that the console always prints, without indentation."""
    HEADLINES.info(text)


def log_progress(logger: logging.Logger, text: str) -> None:
    """Logs how far a step is. Loops call it as often as they like: the console prints a few of the lines."""
    logger.info(text, extra={"progress": True}, stacklevel=2)


def is_progress(record: logging.LogRecord) -> bool:
    return getattr(record, "progress", False)


class Console(logging.Handler):
    """Prints records on standard output. Every line is flushed, also when the output is a file."""

    def __init__(self) -> None:
        super().__init__()
        self.printed_progress = -SECONDS_BETWEEN_PROGRESS_LINES
        self.waiting: str | None = None
        """The newest line of progress, where it came too soon after the one before."""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        elif record.name != HEADLINES.name:
            text = f"      {text}"
        if is_progress(record):
            self._print_or_wait(text)
            return
        if self.waiting is not None:
            _print(self.waiting)
            self.waiting = None
        _print(text)

    def _print_or_wait(self, text: str) -> None:
        now = time.monotonic()
        if now - self.printed_progress < SECONDS_BETWEEN_PROGRESS_LINES:
            self.waiting = text
            return
        _print(text)
        self.printed_progress, self.waiting = now, None


def _print(line: str) -> None:
    with suppress(BrokenPipeError):  # the reader has closed the output; the run goes on
        print(line, flush=True)


def setup() -> None:
    """Prints this package's log lines. Every command calls it once. Characters that the output lacks are replaced."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # an ASCII log must not end a run at its first "·"
    PACKAGE.setLevel(logging.INFO)
    if not any(isinstance(handler, Console) for handler in PACKAGE.handlers):
        PACKAGE.addHandler(Console())


@contextmanager
def forwarding(queue: Any) -> Iterator[None]:
    """Sends this process's log lines and figures to the `queue` of `listening` while the block runs."""
    handler = logging.handlers.QueueHandler(queue)
    with attached(PACKAGE, handler), attached(METRICS, handler):
        yield


@contextmanager
def attached(logger: logging.Logger, handler: logging.Handler) -> Iterator[None]:
    """Adds `handler` to the logger, for INFO and above, while the block runs."""
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class Relay(logging.handlers.QueueListener):
    """Passes the records of other processes to the loggers of this process that they name."""

    def dequeue(self, block: bool) -> Any:
        from ray.exceptions import RayError

        try:
            return super().dequeue(block)
        except RayError as error:  # a run goes on without the log lines of other processes
            PACKAGE.warning(f"lines of other processes are no longer shown: {type(error).__name__}")
            return None  # ends the listener

    def handle(self, record: logging.LogRecord) -> None:
        logging.getLogger(record.name).handle(record)


@contextmanager
def listening() -> Iterator[Any]:
    """A Ray queue for `forwarding`, whose records reach this process's loggers until the block ends."""
    import ray
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # the queue is on the driver's node, since other nodes may be lost; if its process dies, Ray starts it again, empty
    driver_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    survives = {"max_restarts": -1, "max_task_retries": -1}
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": driver_node, **survives})
    listener = Relay(queue)
    listener.start()
    try:
        yield queue
    finally:
        with suppress(ray.exceptions.RayError):
            listener.stop()  # after it has passed on all records that arrived
        if ray.is_initialized():
            queue.shutdown(force=True)
