"""The package's log lines as a list, for tests that read what a user would see."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from sparsekd_ray.runtime.logging import PACKAGE


@contextmanager
def recorded() -> Iterator[list[str]]:
    """Messages logged while the block runs; a warning has its level before it."""
    lines: list[str] = []

    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            level = "warning: " if record.levelno >= logging.WARNING else ""
            lines.append(level + record.getMessage())

    recorder, level = Recorder(), PACKAGE.level
    PACKAGE.addHandler(recorder)
    PACKAGE.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        PACKAGE.removeHandler(recorder)
        PACKAGE.setLevel(level)
