"""The command line of every job: a YAML file, dotted overrides, `--help` with the loaded values as defaults.

    python jobs/cascade.py --config jobs/configs/laptop.yaml --distill.lr 3e-4 --dry-run

Nothing heavy is imported here: help answers in well under a second.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sparsekd_ray.config import Config, load
from sparsekd_ray.errors import ConfigError

DEFAULT = Path(__file__).parent.parent / "jobs" / "configs" / "laptop.yaml"


def parse(description: str, argv: Sequence[str]) -> tuple[Config, argparse.Namespace]:
    """The configuration, and the options that are none of it: `config` and `dry_run`."""
    os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "false")
    import tyro

    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--config", type=Path, default=DEFAULT)
    options.add_argument("--dry-run", action="store_true")
    ours, overrides = options.parse_known_args(argv)
    usage = (
        f"{description}\n\n--config FILE   settings that differ from the defaults (now {ours.config})\n"
        "--dry-run       print the plan, with what is done and what will run, and stop"
    )
    default = load(ours.config)
    plain = (tyro.conf.AvoidSubcommands,)
    return tyro.cli(Config, description=usage, default=default, args=overrides, config=plain), ours


def fail(error: Exception) -> int:
    """Prints one clear message; the exit status is not 0."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    return 2 if isinstance(error, ConfigError) else 1
