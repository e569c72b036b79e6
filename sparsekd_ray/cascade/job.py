"""Runs a cascade from its settings to its report. `jobs/cascade.py` calls it.

It checks the settings without work, prints the plan, takes the run's lease, makes missing artifacts, and writes
`<store>/runs/<name>/`: settings.yaml, plan.json, metrics.jsonl and, once all artifacts are made, the report.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from sparsekd_ray import corpus
from sparsekd_ray.cascade import console, feasibility
from sparsekd_ray.cascade.plan import plan
from sparsekd_ray.cascade.steps import Step
from sparsekd_ray.config import Config
from sparsekd_ray.errors import ConfigError
from sparsekd_ray.model import hub
from sparsekd_ray.runtime import trackers
from sparsekd_ray.runtime.logging import headline
from sparsekd_ray.store import Record, Store


def main(config: Config, command: str, dry_run: bool) -> dict[str, Any]:
    """Runs the cascade; with `dry_run` it only prints the plan. Returns paths of report and model, and figures."""
    started = time.monotonic()
    store = open_store(config)
    steps = preflight(config)
    if not dry_run:
        store.check()
    records = find(steps, store)
    headline(console.plan_text(config, steps, records))
    reused = set(records)
    if dry_run:
        return {
            "dry_run": True,
            "steps": len(steps),
            "missing": [s.name for s in steps if s.name not in reused],
        }
    with (
        store.lease(f"runs/{config.name}/driver", f"run {config.name}") as lease,
        console.live_figures(config, steps, store),
    ):
        write_run(config, steps, store)
        if len(records) < len(steps):
            from sparsekd_ray.cascade import driver  # imports Ray

            driver.run(config, steps, store, lease.ensure)
            records = find(steps, store)
        facts = {"command": command, "reused": reused, "seconds": time.monotonic() - started}
        paths = report(config, steps, records, store, facts)
    return paths | {
        "dry_run": False,
        "steps": len(steps),
        "made": len(steps) - len(reused),
        "seconds": round(time.monotonic() - started, 1),
        "perplexity": perplexities(steps, records),
    }


def preflight(config: Config) -> list[Step]:
    """The plan, after every check of the settings that needs no work. Writes nothing."""
    feasibility.check_cascade(config, hub.mlp_shapes(config.model))
    check_vocabulary(config)
    trackers.require(config.execution.tracker)
    identity = {} if config.model.standin else hub.identify(config.model)
    return plan(config, corpus.identify, identity)


def check_vocabulary(config: Config) -> None:
    """Raises ConfigError if teacher.k is not below the vocabulary's size, if that size is known before any work."""
    standin, shape = config.model.standin, config.model.shape
    vocab = standin.vocab if standin else shape.vocab if shape else None
    if vocab is not None and config.teacher.signal == "topk" and config.teacher.k >= vocab:
        raise ConfigError(
            f"teacher.k is {config.teacher.k}, the vocabulary has {vocab} entries: k must be smaller"
        )


def find(steps: list[Step], store: Store) -> dict[str, Record]:
    """The records of the steps that are done, by step name."""
    return {step.name: record for step in steps if (record := store.record(step.ref)) is not None}


def perplexities(steps: list[Step], records: dict[str, Record]) -> dict[str, float]:
    """Perplexity by protocol `paper` of every model that the plan evaluates."""
    evaluations = [step for step in steps if step.kind == "evaluate"]
    return {
        step.name.removeprefix("evaluate "): records[step.name].metrics["paper"]["ppl"]
        for step in evaluations
    }


def write_run(config: Config, steps: list[Step], store: Store) -> None:
    settings = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    listing = [
        {"step": s.name, "artifact": s.ref.key, "inputs": s.inputs, "identity": s.identity} for s in steps
    ]
    store.write_text(f"runs/{config.name}/settings.yaml", settings)
    store.write_text(f"runs/{config.name}/plan.json", json.dumps(listing, indent=1))


def report(
    config: Config,
    steps: list[Step],
    records: dict[str, Record],
    store: Store,
    facts: dict[str, Any],
) -> dict[str, str]:
    """Writes the report, and prints its path and how to load the smallest model. Returns both paths.

    If nothing had to be made and the present report is of the same plan, the report is kept as it is.
    """
    folder = f"runs/{config.name}"
    if facts["reused"] >= set(records) and _reported(store.read_text(f"{folder}/summary.json")) == [
        step.ref.key for step in steps
    ]:
        headline("nothing to do: every step was done before")
    else:
        _render(config, steps, records, store, facts)
    paths = {"report": f"{store.root}/{folder}/report.html"}
    headline(f"\nreport   {paths['report']}")
    if any(step.kind == "export" for step in steps):
        best = _best_export(steps, records)
        paths["model"] = f"{store.root}/{best.ref.key}/{exported(records[best.name])}"
        headline(f"model    {paths['model']}")
        headline(f"load it  {load_command(store, best, records[best.name])}")
    return paths


def _best_export(steps: list[Step], records: dict[str, Record]) -> Step:
    """The export with the lowest perplexity among those of the largest sparsity."""
    exports = [step for step in steps if step.kind == "export"]
    smallest = max(step.identity["sparsity"] for step in exports)
    return min(
        (step for step in exports if step.identity["sparsity"] == smallest),
        key=lambda step: records[step.inputs["figures"]].metrics["paper"]["ppl"],
    )


def _reported(summary: str | None) -> list[str] | None:
    """The artifacts of an earlier report, from its summary.json."""
    return None if summary is None else [step["artifact"] for step in json.loads(summary)["steps"]]


def _render(
    config: Config, steps: list[Step], records: dict[str, Record], store: Store, facts: dict[str, Any]
) -> None:
    from sparsekd_ray.report.render import render
    from sparsekd_ray.report.summary import summarise

    run = facts | {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commands": _commands(steps, records, store, facts["command"]),
        "versions": {name: version(name) for name in ("torch", "transformers", "ray", "deepspeed", "pyarrow")}
        | {"python": platform.python_version()},
        "hardware": _hardware(config),
    }
    figures = {step.name: console.figure(step.kind, records[step.name]) for step in steps}
    summary = summarise(config, steps, records, run | {"figures": figures})
    with tempfile.TemporaryDirectory() as folder:
        render(summary, Path(folder))
        for path in sorted(Path(folder).iterdir()):
            store.write_text(f"runs/{config.name}/{path.name}", path.read_text())


def _commands(
    steps: list[Step], records: dict[str, Record], store: Store, command: str
) -> list[dict[str, str]]:
    exports = [step for step in steps if step.kind == "export"]
    resuming = {"what": "this run, and resuming it", "command": command}
    return [resuming] + [
        {"what": f"load: {step.name}", "command": load_command(store, step, records[step.name])}
        for step in exports
    ]


def exported(record: Record) -> str:
    """The form of an export's smaller directory: low-rank factors if it has them, otherwise the stock model."""
    return "low-rank" if "low-rank" in record.metrics else "stock"


def load_command(store: Store, step: Step, record: Record) -> str:
    """A shell command that loads an export's smaller directory, as a user would.

    The command runs as printed with this run's Python and S3 settings. It first copies a directory of a bucket into
    the working directory.
    """
    form = exported(record)
    path, lines = f"{store.root}/{step.ref.key}/{form}", ["from transformers import AutoModelForCausalLM"]
    if store.remote:
        copy = f"{step.ref.name}-{step.ref.fingerprint}/{form}"
        lines += [
            "import fsspec",
            f"fsspec.filesystem('s3').get({path + '/'!r}, {copy + '/'!r}, recursive=True)",
        ]
        path = copy
    code = ", trust_remote_code=True" if form == "low-rank" else ""
    lines.append(f"print(AutoModelForCausalLM.from_pretrained({path!r}{code}))")
    return shlex.join([sys.executable, "-c", "; ".join(lines)])


def _hardware(config: Config) -> str:
    execution = config.execution
    if execution.gpus:
        cards = ", ".join(f"{card.count} × {card.name}" for card in execution.cards) or "GPUs of the cluster"
        return f"{cards}; {execution.workers} workers; bf16 with fp32 master weights"
    cpus, machine = os.cpu_count(), platform.machine()
    return f"{cpus} {machine} CPU cores; {execution.workers} workers; fp32, because bf16 is far slower on most CPUs"


def open_store(config: Config) -> Store:
    """The run's store. Raises StoreError if it does not answer or has another format.

    Raises ConfigError for a relative path in a submitted job, because its working directory is a temporary copy.
    """
    root = config.execution.store
    local = "://" not in root and not root.startswith(("/", "~"))
    if (
        local
        and os.environ.get("RAY_JOB_ID") is None
        and os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") is None
    ):
        root, local = str(Path(root).absolute()), False
    if local:
        raise ConfigError(
            f"execution.store is {root!r}, relative to the temporary directory of a submitted job: give an absolute "
            "path that every node sees, or s3://bucket/prefix"
        )
    store = Store(root, config.execution.scratch)
    store.check_version()
    return store
