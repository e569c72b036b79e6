"""The command line of every job: a YAML file, dotted overrides, `--help` with the loaded values as defaults.

    python jobs/cascade.py --config jobs/configs/laptop.yaml --distill.lr 3e-4 --dry-run

Nothing heavy is imported here: help answers in well under a second.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparsekd_ray.config import Config, load
from sparsekd_ray.errors import ConfigError

DEFAULT = Path(__file__).parent.parent / "jobs" / "configs" / "laptop.yaml"


def parse(
    description: str,
    argv: Sequence[str],
    more: Callable[[argparse.ArgumentParser], None] = lambda options: None,
) -> tuple[Config, argparse.Namespace]:
    """The configuration, and the options that are none of it: `config`, `dry_run` and those that `more` adds."""
    os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "false")
    import tyro

    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--config", type=Path, default=DEFAULT)
    options.add_argument("--dry-run", action="store_true")
    more(options)
    ours, overrides = options.parse_known_args(argv)
    usage = (
        f"{description}\n\n--config FILE   settings that differ from the defaults (now {ours.config})\n"
        "--dry-run       print what would be done, and stop"
    )
    default = load(ours.config)
    plain = (tyro.conf.AvoidSubcommands,)
    return tyro.cli(Config, description=usage, default=default, args=overrides, config=plain), ours


def table(rows: Sequence[dict[str, Any]]) -> None:
    """Prints rows as columns as wide as they need; a value that a row lacks or that is None as –."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    names = list(dict.fromkeys(name for row in rows for name in row))
    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in names:
        texts = any(isinstance(row.get(name), str) for row in rows)
        drawn.add_column(escape(name), justify="left" if texts else "right", no_wrap=True)
    for row in rows:
        drawn.add_row(*(escape(_cell(row.get(name))) for name in names))
    # a log file has no width: without one of its own the table would be cut at 80 columns
    width = Console(width=10_000).measure(drawn).maximum
    Console(width=max(width, 1), soft_wrap=True, highlight=False).print(drawn)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return (
        f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    )


def fail(error: Exception) -> int:
    """Prints one clear message; the exit status is not 0."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    return 2 if isinstance(error, ConfigError) else 1
