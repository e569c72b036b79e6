"""Looks into a teacher cache: is it what the teacher says, what is in it, what does it cost.

    python jobs/cache.py verify store/artifacts/cache/top32-0123456789ab
    python jobs/cache.py show   store/artifacts/cache/top32-0123456789ab manual-train-000007
    python jobs/cache.py stats  s3://bucket/sparsekd/artifacts/cache/top32-0123456789ab

The path of every cache is in the plan and in the report of its run.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parent.parent))

import tyro
from tyro.conf import Positional

from sparsekd_ray import cli
from sparsekd_ray.errors import SparseKDError
from sparsekd_ray.runtime import logging
from sparsekd_ray.store import locate


def verify(cache: Positional[str], sequences: int = 16, seed: int = 0, scratch: str | None = None) -> None:
    """Check every file, row and id, and ask the teacher again about a seeded sample of sequences.

    Args:
        cache: Directory or URL of a finished cache.
        sequences: How many sequences the teacher is asked about again.
        seed: Chooses them.
        scratch: Local directory for downloads from an S3 store.
    """
    from sparsekd_ray.teacher import verify as verification

    store, ref = locate(cache, scratch)
    measured = verification.verify(store, ref, sequences, seed)
    print(f"RESULT {json.dumps(measured)}")


def show(
    cache: Positional[str],
    sample: Positional[str],
    temperature: float | None = None,
    top: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 5,
    scratch: str | None = None,
) -> None:
    """Print a sequence, and for each position the teacher's likeliest tokens and the mass of all others.

    Args:
        cache: Directory or URL of a finished cache.
        sample: Its id, such as manual-train-000007.
        temperature: One of those stored; by default 1, or the one that a sample was drawn at.
        top: Alternatives per position.
        scratch: Local directory for downloads from an S3 store.
    """
    from rich.console import Console

    from sparsekd_ray.teacher import inspect

    store, ref = locate(cache, scratch)
    Console(width=None if sys.stdout.isatty() else 140).print(
        inspect.sequence(store, ref, sample, temperature, top)
    )


def stats(cache: Positional[str], plot: Path | None = None, scratch: str | None = None) -> None:
    """Print bytes per token by column, and mass and entropy by domain and temperature; draw them.

    Args:
        cache: Directory or URL of a finished cache.
        plot: Where the drawing goes; by default <name of the cache>.png in the working directory.
        scratch: Local directory for downloads from an S3 store.
    """
    from sparsekd_ray.teacher import inspect

    store, ref = locate(cache, scratch)
    figures = inspect.statistics(store, ref)
    print(f"{figures['bytes_per_token']:.1f} bytes per token")
    for name, size in sorted(figures["columns"].items(), key=lambda pair: -pair[1]):
        print(f"  {name:<14} {size:7.2f}")
    for temperature, domains in figures["temperatures"].items():
        print(f"T = {temperature:<10} kept mass   likeliest   entropy")
        for domain, of in domains.items():
            print(f"  {domain:<12} {of['kept_mass']:9.3f} {of['top1_mass']:11.3f} {of['entropy']:9.3f}")
    path = plot or Path(f"{ref.name}-{ref.fingerprint}.png")
    inspect.plot(
        figures, path, f"{ref.name}-{ref.fingerprint}: {figures['bytes_per_token']:.1f} bytes per token"
    )
    print(f"drawn in {path}")
    print(f"RESULT {json.dumps(figures)}")


def main() -> int:
    logging.setup()
    try:
        tyro.extras.subcommand_cli_from_dict(
            {"verify": verify, "show": show, "stats": stats}, description=__doc__
        )
    except SparseKDError as error:
        return cli.fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
