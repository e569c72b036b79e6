"""Log lines: which the console prints, and how records of other processes reach it."""

import io
import logging
import queue
import subprocess
import sys

import pytest
from lines import recorded
from ray.exceptions import RayActorError

from sparsekd_ray.runtime import logging as lines
from sparsekd_ray.runtime.logging import (
    HEADLINES,
    PACKAGE,
    Console,
    Relay,
    forwarding,
    headline,
    is_progress,
    log_progress,
)

LOGGER = logging.getLogger("sparsekd_ray.some.module")


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A console whose clock, in seconds, stands in a list of one."""
    clock, level, handler = [100.0], PACKAGE.level, Console()
    monkeypatch.setattr(lines.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(PACKAGE, "handlers", [handler])  # another test's command may have left its own
    PACKAGE.setLevel(logging.INFO)
    yield clock
    PACKAGE.setLevel(level)


def test_progress_is_indented_and_printed_every_two_seconds(console, capsys):
    for seconds in (0.0, 0.8, 1.8, 2.2, 3.0, 4.4):
        console[0] = 100 + seconds
        log_progress(LOGGER, f"at {seconds}")
    assert capsys.readouterr().out == "      at 0.0\n      at 2.2\n      at 4.4\n"


def test_all_but_progress_is_always_printed(console, capsys):
    headline("  ▶ step")
    LOGGER.info("merged: none, because of the biases")
    LOGGER.info("left out 3 rows")
    LOGGER.warning("a setting is idle")
    headline("  ✓ step")
    assert capsys.readouterr().out.splitlines() == [
        "  ▶ step",
        "      merged: none, because of the biases",
        "      left out 3 rows",
        "warning: a setting is idle",
        "  ✓ step",
    ]


def test_the_last_progress_of_a_loop_is_printed(console, capsys):
    headline("  ▶ step")
    for done in range(1, 5):
        log_progress(LOGGER, f"{done}/4 layers")
    headline("  ✓ step")
    headline("  ▶ next")
    assert capsys.readouterr().out.splitlines() == [
        "  ▶ step",
        "      1/4 layers",
        "      4/4 layers",
        "  ✓ step",
        "  ▶ next",
    ]


def test_progress_of_another_process_stays_progress():
    records: queue.Queue = queue.Queue()
    with forwarding(records):
        log_progress(LOGGER, "1/2")
        LOGGER.info("resumes at step 4")
    assert [is_progress(record) for record in records.queue] == [True, False]


def test_debugging_lines_are_not_printed(console, capsys):
    LOGGER.debug("detail")
    assert capsys.readouterr().out == ""


def test_records_travel_through_a_queue_as_formatted_text():
    records: queue.Queue = queue.Queue()
    with forwarding(records):
        LOGGER.info("%d of %d shards", 3, 4)
        headline("  ▶ step")
    LOGGER.info("after the block")
    texts = [(record.name, record.getMessage()) for record in list(records.queue)]
    assert texts == [(LOGGER.name, "3 of 4 shards"), (HEADLINES.name, "  ▶ step")]


def test_all_that_was_sent_before_the_end_is_relayed():
    records: queue.Queue = queue.Queue()
    with forwarding(records):
        for index in range(500):
            headline(f"line {index}")
    with recorded() as relayed:
        relay = Relay(records)
        relay.start()
        relay.stop()
    assert relayed == [f"line {index}" for index in range(500)]


def test_a_lost_queue_ends_the_lines_and_not_the_run():
    class Lost:
        def get(self, *_: object) -> object:
            raise RayActorError()

        def put_nowait(self, _: object) -> None: ...

    with recorded() as relayed:
        relay = Relay(Lost())
        relay.start()
        relay.stop()
    assert relayed == ["warning: lines of other processes are no longer shown: RayActorError"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_the_output_cannot_hold_is_replaced(encoding):
    code = "from sparsekd_ray.runtime import logging; logging.setup(); logging.headline('▶ α·β')"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONIOENCODING": encoding}, capture_output=True, cwd="."
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("utf-8", "replace").startswith("▶ α·β" if encoding == "utf-8" else "? ?")


def test_a_reader_that_has_gone_does_not_end_the_run(console, monkeypatch):
    class Closed(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    closed = Closed()
    monkeypatch.setattr(sys, "stdout", closed)
    headline("nobody reads this")
    assert closed.getvalue() == ""
