"""Measures, prints a table and ends in one line `RESULT {json}`. Machines are noisy: ratios within a run, medians.

    python -m benchmarks cache-size --store store     bytes and errors of the codecs, angle of a sample's gradient
    python -m benchmarks cache-read                   tokens per second of reading a cache, one core
    python -m benchmarks capture                      capture against the bare forward pass, local and S3
    python -m benchmarks signals --store store        students of topk, sampled and live full KL, three seeds
    python -m benchmarks prune [--gpu]                seconds and memory of factorisations at real shapes
    python -m benchmarks speed [--gpu]                prefill and decode of pruned models, beside their limits

`--store` is a store that holds a finished `make demo`, for its trained models.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch

import tyro
from tyro.conf import FlagCreatePairsOff

from sparsekd_ray import cli
from sparsekd_ray.errors import ConfigError, SparseKDError
from sparsekd_ray.runtime.logging import headline, setup

Flag = FlagCreatePairsOff[bool]


def cache_size(store: str, sequences: int = 32, real_sequences: int = 256) -> dict[str, Any]:
    """Args:
    store: A store with a finished `make demo`.
    sequences: Synthetic sequences of 128 positions.
    real_sequences: Sequences of the trained teacher's calibration text.
    """
    from benchmarks import cache, trained

    made = cache.of_synthetic(sequences)
    demo = trained.open_store(store)
    teacher, students = (
        demo.model("dense+kd"),
        {"round 3 pruned": demo.model("round 3 pruned"), "round 2": demo.model("round 2")},
    )
    real, angles = cache.of_model(teacher, students, demo.rows(real_sequences), real_sequences // 2)
    cli.table([{"of": "synthetic"} | made, {"of": "trained"} | {key: real[key] for key in made}])
    cli.table(angles)
    worst = {
        key: max(made[key], real[key], key=lambda v: abs(v - (key == "sampled_norm_ratio"))) for key in made
    }
    return worst | {"synthetic": made, "trained": real, "angles": angles}


def cache_read(sequences: int = 64, repeats: int = 15) -> dict[str, Any]:
    """Args:
    sequences: Sequences in the shard, V = 200,064, k = 32.
    repeats: Readings, of which the median counts.
    """
    from benchmarks import cache

    with tempfile.TemporaryDirectory() as folder:
        figures = cache.read_speed(sequences, repeats, Path(folder))
    cli.table([figures])
    return figures


def capture(pairs: int = 3, sequences: int = 384) -> dict[str, Any]:
    """Args:
    pairs: Times that the bare pass and each capture are measured, in turn.
    sequences: Sequences of 128 tokens in each measurement.
    """
    from benchmarks import capture as measured

    figures = measured.ratios(pairs, sequences)
    cli.table([{key: value for key, value in figures.items() if not isinstance(value, list)}])
    return figures


def signals(
    store: str, seeds: tuple[int, ...] = (42, 123, 456), steps: int = 128, temperature: float = 1.0
) -> dict[str, Any]:
    """Args:
    store: A store with a finished `make demo`.
    seeds: Of the order of samples.
    steps: Steps of 8 sequences for every student.
    temperature: Of teacher and student.
    """
    from benchmarks import signals as trainings

    rows = trainings.compare(store, seeds, steps, temperature)
    cli.table(rows)
    return {"rows": rows}


def prune(models: str = "phi4-mini,qwen3-0.6b", processes: int = 2, gpu: Flag = False) -> dict[str, Any]:
    """Args:
    models: Whose shapes, with random weights.
    processes: Over which factorisations are spread on a CPU.
    gpu: Factorise on this machine's GPU.
    """
    from benchmarks import prune as measured

    figures = measured.factorisations(models, processes, _device(gpu))
    cli.table([{"figure": key, "value": value} for key, value in figures.items()])
    return figures


def speed(
    shape: str = "qwen3_0_6b",
    layers: int = 4,
    sparsities: tuple[float, ...] = (0.35, 0.65),
    repeats: int = 5,
    gpu: Flag = False,
) -> dict[str, Any]:
    """Args:
    shape: Widths of the models, qwen3_0_6b or phi4_mini.
    layers: Layers, of which a model needs few to be measured.
    sparsities: Shares of the MLP parameters removed.
    repeats: Turns of each pair of models, of which the medians count.
    gpu: Measure on this machine's GPU, in bf16.
    """
    from benchmarks import speed as measured

    device = _device(gpu)
    rows = measured.table(shape, layers, sparsities, repeats, device)
    cli.table(rows)
    return {"shape": shape, "layers": layers, "device": device, "rows": rows}


def _device(gpu: bool) -> str:
    """Where to measure. ConfigError if a GPU is asked for and none is here."""
    import torch

    if gpu and not torch.cuda.is_available():
        raise ConfigError("--gpu: torch finds no GPU on this machine; leave --gpu out to measure its CPU")
    return "cuda" if gpu else "cpu"


BENCHMARKS: dict[str, Callable[..., dict[str, Any]]] = {
    "cache-size": cache_size,
    "cache-read": cache_read,
    "capture": capture,
    "signals": signals,
    "prune": prune,
    "speed": speed,
}


def main() -> int:
    setup()
    try:
        figures: Any = tyro.extras.subcommand_cli_from_dict(BENCHMARKS, description=__doc__)
    except SparseKDError as error:
        return cli.fail(error)
    headline(f"RESULT {json.dumps(figures)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
