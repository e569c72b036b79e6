"""Whitened SVD at the shapes of real models: seconds and memory of each matrix, and how well it spreads over cores.

Weights and Grams are random, which costs the decompositions as much as trained ones. A matrix is decomposed twice, as
in pruning: its spectrum, from which ranks are chosen, then its factors. Every matrix has a process of its own, so that
its peak of resident memory is its own (with Python and torch, about 0.3 GiB). Parallel efficiency compares the same
factorisations in one process with one thread, and spread over processes with one thread each, start-up not counted.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from sparsekd_ray.model.spec import shapes_from_config
from sparsekd_ray.prune import allocate, svd
from sparsekd_ray.runtime.logging import headline

MODELS = {
    "phi4-mini": {
        "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    },
}  # fmt: skip
SPARSITY, ALIGN, EACH = 0.15, 64, 4  # EACH: factorisations per process in the measurement of efficiency


def factorisations(models: str, processes: int, device: str) -> dict[str, Any]:
    """Figures of the named models ("phi4-mini,qwen3-0.6b"); on a CPU also the parallel efficiency over its cores.

    Of each model the seconds of one layer (spectra and factors, `processes` threads) and its peak in GiB; then,
    from these, seconds of all spectra and of all factors, and of the optimal allocation at full size.
    """
    found: dict[str, Any] = {} if device == "cuda" else {"parallel_efficiency": _efficiency(processes)}
    for model in models.split(","):
        key, layers = model.replace("-", "_").replace(".", "_"), MODELS[model]["num_hidden_layers"]
        matrices = [_alone(_matrix, shape, processes, device) for shape in _layer(model).values()]
        for (name, shape), (spectrum, factors, peak) in zip(_layer(model).items(), matrices, strict=True):
            headline(
                f"{model} {name} {shape}: spectrum {spectrum:.1f} s, factors {factors:.1f} s, peak {peak:.2f} GiB"
            )
        spectra, factors, peaks = (list(column) for column in zip(*matrices, strict=True))
        found |= {
            f"{key}_layer_seconds": sum(spectra) + sum(factors),
            f"{key}_layer_peak_gib": max(peaks),
            f"{key}_all_spectra_seconds": layers * sum(spectra),
            f"{key}_all_factors_seconds": layers * sum(factors),
            f"{key}_allocation_seconds": _allocation(model),
        }
        headline(", ".join(f"{name} {value:.2f}" for name, value in found.items() if name.startswith(key)))
    return found


def _layer(model: str) -> dict[str, tuple[int, int]]:
    """Shapes of one layer's MLP matrices by their short names."""
    shapes = shapes_from_config(MODELS[model] | {"num_hidden_layers": 1})
    return {name.rpartition(".")[2]: shape for name, shape in shapes.items()}


def _problem(shape: tuple[int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """W_mn, gram_nn (both float32, well conditioned) and the aligned rank of `SPARSITY`."""
    (m, n), generator = shape, torch.Generator().manual_seed(seed)
    X_tn = torch.randn(n // 4, n, generator=generator)
    gram_nn = X_tn.T @ X_tn
    gram_nn.diagonal().add_(n / 4)
    rank = round((1 - SPARSITY) * m * n / (m + n) / ALIGN) * ALIGN
    return torch.randn(m, n, generator=generator), gram_nn, rank


def _matrix(shape: tuple[int, int], threads: int, device: str) -> tuple[float, float, float]:
    """Seconds of the spectrum and of the factors, and the peak memory in GiB: of this process, or of the GPU."""
    torch.set_num_threads(threads)
    W_mn, gram_nn, rank = _problem(shape, 0)
    W_mn, gram_nn = W_mn.to(device), gram_nn.to(device)
    started = _now(device)
    svd.singular_values(W_mn, gram_nn)
    between = _now(device)
    svd.truncated_factors(W_mn, rank, gram_nn)
    ended = _now(device)
    if device == "cuda":
        return between - started, ended - between, torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss: bytes there, KiB on Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    return between - started, ended - between, peak


def _now(device: str) -> float:
    """Seconds, once the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result, from a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _efficiency(processes: int) -> float:
    """Time of all factorisations in one process over processes × their time spread over as many."""
    total = EACH * processes
    one, spread = (_spread(count, total // count) for count in (1, processes))
    efficiency = one / (processes * spread)
    headline(
        f"{total} factorisations: {one:.1f} s in 1 process, {spread:.1f} s in {processes}: efficiency {efficiency:.2f}"
    )
    return efficiency


def _spread(processes: int, each: int) -> float:
    """Seconds until the last of the processes, which start together, has done its factorisations."""
    context = multiprocessing.get_context("spawn")
    barrier, seconds = context.Barrier(processes), context.Queue()
    workers = [context.Process(target=_work, args=(i, each, barrier, seconds)) for i in range(processes)]
    for worker in workers:
        worker.start()
    found = [seconds.get(timeout=600) for _ in workers]
    for worker in workers:
        worker.join()
    return max(found)


def _work(index: int, each: int, barrier: Any, seconds: Any) -> None:
    torch.set_num_threads(1)
    W_mn, gram_nn, rank = _problem(_layer("qwen3-0.6b")["gate_proj"], index)
    svd.truncated_factors(W_mn, rank, gram_nn)  # warm
    barrier.wait()
    started = time.perf_counter()
    for _ in range(each):
        svd.truncated_factors(W_mn, rank, gram_nn)
    seconds.put(time.perf_counter() - started)


def _allocation(model: str) -> float:
    """Seconds of the optimal allocation of all layers, from random spectra of unlike sizes."""
    shapes, rng = shapes_from_config(MODELS[model]), np.random.default_rng(0)
    spectra = {
        name: rng.uniform(0.3, 3) * np.sort(rng.gamma(2, 1, min(shape)))[::-1]
        for name, shape in shapes.items()
    }
    dense = sum(m * n for m, n in shapes.values())
    started = time.perf_counter()
    allocate.choose("optimal", spectra, shapes, SPARSITY, ALIGN, dense)
    return time.perf_counter() - started
