"""Prunes a model, or compares the methods of pruning, without a cascade around it; resumable.

    python jobs/prune.py run --sparsity 0.35 --prune.method neurons --dry-run      the table of matrices, no model
    python jobs/prune.py run --sparsity 0.35 --prune.method svd-whitened --prune.allocation optimal
    python jobs/prune.py compare --methods svd svd-whitened+optimal neurons --sparsity 0.15 0.65 --distill

Both take --config and every setting of jobs/cascade.py.

run       --sparsity S        share of the MLP parameters to remove; or
          --energy T          share of its energy that every matrix keeps (svd and svd-whitened)
          --dry-run           measure what is needed (dense model, statistics), print the table, make no model
compare   --methods M …       a method, and what differs from its plainest form: svd, svd-whitened+optimal+gauge, …
          --sparsity S …      shares to remove
          --draws N           samples of the calibration text, each measured on its own
          --distill           judge each student again after the same distillation from the same cache
          --dry-run           print the plan and stop
"""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch
sys.path.insert(0, str(Path(__file__).parent.parent))

from sparsekd_ray import cli
from sparsekd_ray.errors import ConfigError, SparseKDError
from sparsekd_ray.prune.methods import METHODS
from sparsekd_ray.runtime import logging


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sparsity", type=float, nargs="+", default=None)
    parser.add_argument("--energy", type=float, default=None)
    parser.add_argument("--methods", nargs="+", default=None)
    parser.add_argument("--draws", type=int, default=1)
    parser.add_argument("--distill", action="store_true")


def main() -> int:
    mode, rest = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    try:
        if mode not in ("run", "compare"):
            print(__doc__)
            if mode in ("-h", "--help"):
                return 0
            raise ConfigError(f"found {mode!r} where `run` or `compare` belongs")
        logging.setup()
        config, chosen = cli.parse(__doc__, rest, options)
        check(mode, chosen)
        if mode == "run":
            run(config, chosen)
        else:
            compare(config, chosen)
    except SparseKDError as error:
        return cli.fail(error)
    return 0


def check(mode: str, chosen: argparse.Namespace) -> None:
    wrong = [s for s in chosen.sparsity or () if not 0 < s < 1]
    if wrong:
        raise ConfigError(f"--sparsity {wrong[0]:g}: a share between 0 and 1 of the MLP parameters")
    if mode == "run" and (chosen.methods or chosen.distill or chosen.draws != 1):
        raise ConfigError("--methods, --draws and --distill belong to compare; run takes --prune.method")
    if chosen.energy is not None and (mode == "compare" or chosen.sparsity or not 0 < chosen.energy < 1):
        raise ConfigError(
            f"--energy {chosen.energy:g}: a share between 0 and 1, for run, in place of --sparsity"
        )
    if chosen.draws < 1:
        raise ConfigError(f"--draws {chosen.draws}: one sample of the calibration text at least")


def run(config: cli.Config, chosen: argparse.Namespace) -> None:
    if chosen.energy is None and (chosen.sparsity is None or len(chosen.sparsity) != 1):
        raise ConfigError("run prunes to one size: give one --sparsity S, or --energy T")
    if chosen.energy is not None and METHODS[config.prune.method].energy is None:
        raise ConfigError(
            f"--energy is of singular values, and {config.prune.method} has none: give --sparsity S"
        )
    from sparsekd_ray.compare import run  # after parsing: --help stays fast

    if chosen.energy is None:
        run.run(config, chosen.sparsity[0], chosen.dry_run, cli.table)
        return
    pruning_by_energy = config.prune.model_copy(update={"allocation": "energy"})
    config = config.model_copy(update={"prune": pruning_by_energy})
    sparsity = run.sparsity_of_energy(config, chosen.energy)
    run.run(config, sparsity, chosen.dry_run, cli.table)


def compare(config: cli.Config, chosen: argparse.Namespace) -> None:
    from sparsekd_ray.compare import comparison, run

    rows = run.compare(
        config,
        tuple(chosen.methods or comparison.ALL),
        tuple(chosen.sparsity or comparison.SPARSITIES),
        tuple(range(chosen.draws)),
        chosen.distill,
        f"python {shlex.join(sys.argv)}",
        chosen.dry_run,
    )
    if rows:
        cli.table([{key: value for key, value in row.items() if key in comparison.SHOWN} for row in rows])
        logging.headline(f"RESULT {json.dumps(rows)}")


if __name__ == "__main__":
    sys.exit(main())
