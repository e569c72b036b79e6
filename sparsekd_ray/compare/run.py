"""All methods side by side: what `sparsekd prune compare` runs, on the cascade's own steps and driver."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsekd_ray import corpus
from sparsekd_ray.cascade import console, feasibility, job
from sparsekd_ray.cascade.single import make
from sparsekd_ray.cascade.steps import Step
from sparsekd_ray.compare import comparison
from sparsekd_ray.config import Config
from sparsekd_ray.model import hub
from sparsekd_ray.runtime.logging import headline
from sparsekd_ray.store import Store

logger = logging.getLogger(__name__)

PROMPT, NEW_TOKENS, REPEATS = 128, 32, 7  # of a speed measurement


def compare(
    config: Config,
    methods: Sequence[str],
    sparsities: Sequence[float],
    draws: Sequence[int],
    distilled: bool,
    command: str,
    dry_run: bool,
) -> list[dict[str, Any]]:
    """All methods at equal sizes; the rows of the table, also kept in the run's directory with a drawing, and once
    more when the students' speeds have been measured."""
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
    about = {
        "command": command,
        "protocol": comparison.protocol(config, records, draws),
        "device": device(config),
    }
    keep(about | {"rows": rows}, config, store)
    names_of_rows = [
        comparison.title(text, sparsity, draws[0]) for sparsity in sparsities for text in methods
    ]
    _add_speeds(rows, [made[name][0] for name in ("dense", *names_of_rows)], store, config)
    keep(about | {"rows": rows}, config, store)
    folder = f"{store.root}/runs/{config.name}"
    headline(f"\ntable    {folder}/comparison.json\ndrawing  {folder}/comparison.png")
    return rows


def device(config: Config) -> str:
    """The device on which this process measures speeds: a GPU if the run uses GPUs and this machine has one."""
    import torch

    return "cuda" if config.execution.gpus and torch.cuda.is_available() else "cpu"


def _add_speeds(rows: list[dict[str, Any]], models: list[Step], store: Store, config: Config) -> None:
    """Prefill and decode of every student against the dense model, in this process, one student at a time."""
    import torch

    from sparsekd_ray.evaluate import speed
    from sparsekd_ray.model import loading

    place = {"device": device(config), "dtype": "bfloat16" if device(config) == "cuda" else "float32"}
    torch.set_num_threads(config.execution.threads)
    dense = loading.load(store.fetch(models[0].ref), **place)
    context = dense.config.max_position_embeddings
    new_tokens = min(NEW_TOKENS, context // 2)
    prompt = min(PROMPT, context - new_tokens)
    rows[0] |= {"flops_per_token": speed.flops_per_token(dense, prompt)}
    for row, step in zip(rows[1:], models[1:], strict=True):
        student = loading.load(store.fetch(step.ref), **place)
        row |= {"flops_per_token": speed.flops_per_token(student, prompt)}
        row |= speed.compare(dense, student, prompt=prompt, new_tokens=new_tokens, repeats=REPEATS)
        headline(
            f"speed of {step.name}: prefill {row['prefill_speedup']:.2f} ×, decode {row['decode_speedup']:.2f} ×"
        )


def keep(table: dict[str, Any], config: Config, store: Store) -> None:
    """Writes the table and its drawing into the run's directory."""
    folder = f"runs/{config.name}"
    store.write_text(f"{folder}/comparison.json", json.dumps(table, indent=1))
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "comparison.png"
        comparison.draw(table["rows"], path)
        store.write_bytes(f"{folder}/comparison.png", path.read_bytes())
