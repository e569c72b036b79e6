"""Runs a comparison of pruning methods with the cascade's steps and driver (`sparsekd prune compare`)."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsekd_ray import corpus
from sparsekd_ray.cascade import console, feasibility, job
from sparsekd_ray.cascade.stage_plans import make
from sparsekd_ray.compare import comparison, speeds
from sparsekd_ray.config import Config
from sparsekd_ray.model import hub
from sparsekd_ray.runtime.logging import headline
from sparsekd_ray.store import Store

logger = logging.getLogger(__name__)


def compare(
    config: Config,
    methods: Sequence[str],
    sparsities: Sequence[float],
    draws: Sequence[int],
    distilled: bool,
    command: str,
    dry_run: bool,
) -> list[dict[str, Any]]:
    """Makes the students of all methods at equal sizes. Returns the rows of their table.

    The table and a drawing are also written to the run's directory.
    """
    identity = {} if config.model.standin else hub.identify(config.model)
    arguments = (methods, sparsities, draws)
    shapes = hub.mlp_shapes(config.model)
    for text in methods:
        for sparsity in sparsities:
            settings = comparison.variant(text, config.prune)
            feasibility.check(f"--sparsity {sparsity:g}", shapes, settings, [sparsity])
    if ignored := comparison.ignored(config.prune):
        logger.warning(f"--methods says what is compared: {', '.join(ignored)} of the settings is not used")
    job.check_vocabulary(config)
    planned, names = comparison.plan(config, *arguments, distilled, corpus.identify, identity)
    store = job.open_store(config)
    if dry_run:
        headline(console.plan_text(config, planned, job.find(planned, store)))
        return []
    records = make(config, planned, store)
    made = {name: (step, records[step.name]) for name, step in names.items()}
    rows = comparison.rows(made, *arguments)
    table = {"command": command, "protocol": comparison.protocol(config, records, draws), "rows": rows}
    keep(
        table, config, store
    )  # before the speeds: a run that is stopped while they are measured keeps the rest
    titles = [comparison.title(text, sparsity, draws[0]) for sparsity in sparsities for text in methods]
    students = [(title, made[title][0].ref) for title in titles]
    measured = speeds.measure(config, store, made["dense"][0].ref, students)
    for row, figures in zip(rows, measured.figures, strict=True):
        row |= figures
    keep(table | {"device": measured.device}, config, store)
    folder = f"{store.root}/runs/{config.name}"
    headline(f"\ntable    {folder}/comparison.json\ndrawing  {folder}/comparison.png")
    return rows


def keep(table: dict[str, Any], config: Config, store: Store) -> None:
    """Writes the table and its drawing into the run's directory."""
    folder = f"runs/{config.name}"
    store.write_text(f"{folder}/comparison.json", json.dumps(table, indent=1))
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "comparison.png"
        comparison.draw(table["rows"], path)
        store.write_bytes(f"{folder}/comparison.png", path.read_bytes())
