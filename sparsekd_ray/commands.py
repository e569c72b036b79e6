"""The commands of `sparsekd` and of jobs/: their options, the checks of these, and the calls into the package.

The functions import heavy packages only after they have checked their options.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import FlagCreatePairsOff, Positional

from sparsekd_ray.config import Config
from sparsekd_ray.config import shipped as shipped_configs
from sparsekd_ray.errors import ConfigError
from sparsekd_ray.prune.methods import METHODS
from sparsekd_ray.runtime.logging import headline

Result = dict[str, Any]


@dataclass(frozen=True)
class Common:
    """The options of every command that makes artifacts."""

    settings: Annotated[Config, tyro.conf.arg(name="")]
    config: str = "laptop"
    """YAML file of settings that differ from the defaults, or a name that `sparsekd configs` lists."""
    dry_run: FlagCreatePairsOff[bool] = False
    """Print the plan and stop; nothing is made."""


Shared = Annotated[Common, tyro.conf.arg(name="")]


def cascade(common: Shared) -> Result:
    """Run the whole cascade: prune and distill in rounds, evaluate every student, write the report.

    The same command resumes an interrupted run. A finished run does nothing.
    """
    from sparsekd_ray.cascade import job

    return job.main(common.settings, _command_line(), common.dry_run)


def corpus(common: Shared) -> Result:
    """Make the token shards of the training text and of the held-out text, and the tokenizer they need."""
    from sparsekd_ray.cascade import stage_plans

    return stage_plans.run(common.settings, "corpus", stage_plans.corpus(common.settings), common.dry_run)


def capture(common: Shared) -> Result:
    """Make the teacher cache: the dense model's probabilities at every training token."""
    from sparsekd_ray.cascade import stage_plans

    return stage_plans.run(common.settings, "capture", stage_plans.capture(common.settings), common.dry_run)


def prune(common: Shared, sparsity: float | None = None, energy: float | None = None) -> Result:
    """Prune the dense model once by --prune.method, evaluate the result and export it.

    Args:
        sparsity: Share of the MLP parameters to remove, between 0 and 1.
        energy: Instead of a sparsity, the share of its energy that every matrix keeps (svd and svd-whitened).
    """
    from sparsekd_ray.cascade import stage_plans

    settings = _settings_of_a_cut(common, sparsity, energy)
    share = sparsity if sparsity is not None else stage_plans.sparsity_of_energy(settings, energy or 0.0)
    return stage_plans.run(settings, "prune", stage_plans.prune(settings, share), common.dry_run)


def preview(common: Shared, sparsity: float | None = None, energy: float | None = None) -> Result:
    """Measure the statistics that a pruning reads and print its table, matrix by matrix. No model is made.

    Args:
        sparsity: Share of the MLP parameters to remove, between 0 and 1.
        energy: Instead of a sparsity, the share of its energy that every matrix keeps (svd and svd-whitened).
    """
    from sparsekd_ray.cascade import stage_plans
    from sparsekd_ray.cli import table

    settings = _settings_of_a_cut(common, sparsity, energy)
    share = sparsity if sparsity is not None else stage_plans.sparsity_of_energy(settings, energy or 0.0)
    result = stage_plans.preview(settings, share, common.dry_run)
    table(result.get("rows", []))
    return result


def compare(
    common: Shared,
    methods: tuple[str, ...] = (),
    sparsity: tuple[float, ...] = (),
    draws: int = 1,
    distill: FlagCreatePairsOff[bool] = False,
) -> Result:
    """Compare methods of pruning at equal sizes: a table and a drawing, with the speed of every student.

    Args:
        methods: Names of methods, each followed by the settings that differ from the method's plainest form: svd,
            svd-whitened+optimal+gauge, …. By default all methods.
        sparsity: Shares of the MLP parameters to remove. By default four.
        draws: Number of samples of the calibration text. Every sample is measured on its own.
        distill: Evaluate each student again after the same distillation from the same cache.
    """
    for share in sparsity:
        _check_share("--sparsity", share)
    if draws < 1:
        raise ConfigError(f"--draws {draws}: one sample of the calibration text at least")
    from sparsekd_ray.cli import table
    from sparsekd_ray.compare import comparison, run

    rows = run.compare(
        common.settings,
        methods or comparison.ALL,
        sparsity or comparison.SPARSITIES,
        tuple(range(draws)),
        distill,
        _command_line(),
        common.dry_run,
    )
    if rows:
        table([{key: value for key, value in row.items() if key in comparison.SHOWN} for row in rows])
    return {"dry_run": common.dry_run, "rows": rows}


def distill(common: Shared, sparsity: float) -> Result:
    """Prune the dense model once, distill it from the cache, evaluate it before and after, and export it.

    Args:
        sparsity: Share of the MLP parameters to remove, between 0 and 1.
    """
    _check_share("--sparsity", sparsity)
    from sparsekd_ray.cascade import stage_plans

    return stage_plans.run(
        common.settings, "distill", stage_plans.distill(common.settings, sparsity), common.dry_run
    )


def evaluate(common: Shared, model: Positional[str]) -> Result:
    """Evaluate a model on the held-out text of the corpus.

    Args:
        model: A Hugging Face directory (dense, or a low-rank student), a hub id, or the path or URL of a model in the
            store.
    """
    from sparsekd_ray.cascade import stage_plans

    return stage_plans.run(
        common.settings, "evaluate", stage_plans.evaluate(common.settings, model), common.dry_run
    )


def export(common: Shared, artifact: Positional[str]) -> Result:
    """Export a pruned or distilled model of the store to directories that stock tools load.

    Args:
        artifact: Path or URL of the model: <store>/artifacts/prune/… or <store>/artifacts/distill/….
    """
    from sparsekd_ray.cascade import stage_plans

    return stage_plans.run(
        common.settings, "export", stage_plans.export(common.settings, artifact), common.dry_run
    )


def verify(cache: Positional[str], sequences: int = 16, seed: int = 0, scratch: str | None = None) -> Result:
    """Check every file, row and id of a cache, and compare a seeded sample of sequences with the teacher.

    Args:
        cache: Directory or URL of a finished cache.
        sequences: Number of sequences that the teacher computes again.
        seed: Seed of the choice of these sequences.
        scratch: Local directory for downloads from an S3 store.
    """
    from sparsekd_ray.store import locate
    from sparsekd_ray.teacher import verify as verification

    store, ref = locate(cache, scratch)
    return dict(verification.verify(store, ref, sequences, seed))


def show(
    cache: Positional[str],
    sample: Positional[str],
    temperature: float | None = None,
    top: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 5,
    scratch: str | None = None,
) -> Result:
    """Print a sequence with the teacher's likeliest tokens at each position and the mass of all others.

    Args:
        cache: Directory or URL of a finished cache.
        sample: Id of the sequence, such as manual-train-000007.
        temperature: A temperature that the cache holds; by default 1, or that of a sampled cache.
        top: Number of tokens per position.
        scratch: Local directory for downloads from an S3 store.
    """
    from rich.console import Console

    from sparsekd_ray.store import locate
    from sparsekd_ray.teacher import inspect

    store, ref = locate(cache, scratch)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(inspect.sequence(store, ref, sample, temperature, top))
    return {"cache": store.url(ref.key), "sample": sample}


def stats(cache: Positional[str], plot: Path | None = None, scratch: str | None = None) -> Result:
    """Print and draw bytes per token by column, and mass and entropy by domain and temperature.

    Args:
        cache: Directory or URL of a finished cache.
        plot: Path of the drawing; by default <name of the cache>.png in the working directory.
        scratch: Local directory for downloads from an S3 store.
    """
    from sparsekd_ray.store import locate
    from sparsekd_ray.teacher import inspect

    store, ref = locate(cache, scratch)
    figures = inspect.statistics(store, ref)
    print(f"{figures['bytes_per_token']:.1f} bytes per token")
    for name, size in sorted(figures["columns"].items(), key=lambda pair: -pair[1]):
        print(f"  {name:<14} {size:7.2f}")
    for temperature, domains in figures["temperatures"].items():
        print(f"T = {temperature:<10} kept mass   likeliest   entropy")
        for domain, row in domains.items():
            print(f"  {domain:<12} {row['kept_mass']:9.3f} {row['top1_mass']:11.3f} {row['entropy']:9.3f}")
    name = f"{ref.name}-{ref.fingerprint}"
    path = plot or Path(f"{name}.png")
    inspect.plot(figures, path, f"{name}: {figures['bytes_per_token']:.1f} bytes per token")
    headline(f"drawn in {path}")
    return dict(figures)


def configs() -> Result:
    """List the configurations that come with the package. --config takes their names."""
    paths = shipped_configs()
    for name, path in paths.items():
        headline(f"{name:<14} {path.read_text().splitlines()[0].lstrip('# ')}\n{'':<14} {path}")
    return {name: str(path) for name, path in paths.items()}


Command = Any  # a function from options to a result
COMMANDS: Mapping[str, Command | Mapping[str, Command]] = {
    "cascade": cascade,
    "corpus": corpus,
    "capture": capture,
    "prune": {"run": prune, "preview": preview, "compare": compare},
    "distill": distill,
    "evaluate": evaluate,
    "export": export,
    "cache": {"verify": verify, "show": show, "stats": stats},
    "configs": configs,
}


def _settings_of_a_cut(common: Common, sparsity: float | None, energy: float | None) -> Config:
    """The settings of one pruning. Raises ConfigError unless its size is given exactly once and possible."""
    settings = common.settings
    if (sparsity is None) == (energy is None):
        raise ConfigError("a pruning has one size: give either --sparsity S or --energy T")
    if sparsity is not None:
        _check_share("--sparsity", sparsity)
        return settings
    _check_share("--energy", energy or 0.0)
    if METHODS[settings.prune.method].energy is None:
        raise ConfigError(
            f"--energy is a share of singular values, and {settings.prune.method} has none: give --sparsity S"
        )
    if common.dry_run:
        raise ConfigError(
            "--energy becomes a sparsity only by a measurement: give --sparsity for a --dry-run"
        )
    by_energy = settings.prune.model_copy(update={"allocation": "energy"})
    return settings.model_copy(update={"prune": by_energy})


def _check_share(option: str, value: float) -> None:
    if not 0 < value < 1:
        raise ConfigError(f"{option} {value:g}: give a share between 0 and 1 (0.35 for 35 %)")


def _command_line() -> str:
    """The command of this process, as a user would type it again."""
    script = sys.argv[0] if sys.argv[0].endswith(".py") else None
    return shlex.join(["python", *sys.argv] if script else ["sparsekd", *sys.argv[1:]])
