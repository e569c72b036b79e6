"""Capture against the bare forward pass, with the same weights, batches and cores, on a local store and on S3.

Bare: one process per core, weights loaded and warm, hidden states and logits of its share of the sequences, nothing
kept. Capture: everything from Ray Data to the published shard. `ratio` compares speeds between the first shards and the
last (so without start and end), `whole` includes both, on a text this short. Every capture is compared with the mean of
the bare passes before and after it, since the speed of a shared machine drifts. `cpu_ratio` compares tokens per second
of CPU time, of all processes that a capture needs but for an S3 server: the ratio where nobody else computes.
"""

import json
import logging
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks import s3_server, synthetic
from sparsekd_ray import corpus
from sparsekd_ray.config import Execution, Teacher
from sparsekd_ray.corpus.shards import MANIFEST, write_shards
from sparsekd_ray.model import loading
from sparsekd_ray.runtime.logging import headline, is_progress
from sparsekd_ray.store import Ref, Store
from sparsekd_ray.teacher.forward import SEQUENCES, Forward, tokens

LENGTH, SHARD_ROWS, CORES = 128, 16, 2
# 14,000 FLOP per token and entry of the vocabulary; Phi-4-mini has 38,000, so its signal costs it a smaller share
SIZES = {
    "vocab_size": 2048, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": LENGTH,
}  # fmt: skip
TEACHER, TEXTS = Ref("dense", "random", "aa"), Ref("corpus", "random", "bb")


def ratios(pairs: int, sequences: int) -> dict[str, Any]:
    """Medians over `pairs` of tokens per second, and of capture over bare within each pair."""
    with tempfile.TemporaryDirectory() as folder, s3_server.running(Path(folder) / "s3") as server:
        os.environ |= server.environment  # before Ray, whose workers inherit it
        stores = {"": Store(f"{folder}/store"), "_s3": Store(f"s3://{server.bucket}/x", f"{folder}/scratch")}
        with _ray():
            return _ratios(stores, pairs, sequences)


def _ratios(stores: dict[str, Store], pairs: int, sequences: int) -> dict[str, Any]:
    measured: dict[str, list[float]] = defaultdict(list)
    for store in stores.values():
        _prepare(store, sequences)
    before = np.array(_bare(stores[""]))
    for pair in range(pairs):
        for end, store in stores.items():
            steady, whole, cpu = _captured(store, Ref("cache", "random", f"cc{pair}"))
            after = np.array(_bare(stores[""]))
            (bare, bare_cpu), before = ((before + after) / 2).tolist(), after
            figures = {"ratio": steady / bare, "whole": whole / bare, "cpu_ratio": cpu / bare_cpu}
            measured["bare"].append(bare)
            for name, figure in figures.items():
                measured[f"{name}{end}"].append(figure)
            headline(
                f"pair {pair + 1}{end}: bare {bare:,.0f} tokens/s, capture {steady:,.0f} ({steady / bare:.3f}; by "
                f"CPU time {cpu / bare_cpu:.3f}), with start-up {whole:,.0f}"
            )
    medians = {name: statistics.median(values) for name, values in measured.items()}
    return medians | {"pairs": measured["ratio"], "pairs_s3": measured["ratio_s3"]}


@contextmanager
def _ray() -> Iterator[None]:
    import ray

    # Ray's workers give way to other processes, the bare ones do not: on a shared machine that would be all we measure
    os.environ |= {"RAY_worker_niceness": "0"}
    ray.init(
        address="local", num_cpus=CORES, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
    )  # fmt: skip
    yield
    ray.shutdown()


def _prepare(store: Store, sequences: int) -> None:
    with store.building(TEACHER) as out:
        synthetic.save_teacher(out, **SIZES)
    store.commit(TEACHER, identity={}, inputs={}, metrics={}, seconds=0)
    manifest = {"seq_len": LENGTH, "tokenizer_hash": "dd", "shard_rows": SHARD_ROWS}
    with store.building(TEXTS) as out:
        write_shards(synthetic.rows(sequences, LENGTH, SIZES["vocab_size"]), out / "train", SHARD_ROWS)
        (out / MANIFEST).write_text(json.dumps(manifest | {"rows": {"train": {"random": sequences}}}))
    store.commit(TEXTS, identity={}, inputs={}, metrics={}, seconds=0)


def _bare(store: Store) -> tuple[float, float]:
    """Tokens per second of `CORES` processes together, and per second of their CPU time."""
    teacher, texts = (str(store.fetch(ref)) for ref in (TEACHER, TEXTS))
    context = multiprocessing.get_context("spawn")
    barrier, seconds = context.Barrier(CORES), context.Queue()
    workers = [
        context.Process(target=_forward, args=(teacher, texts, i, barrier, seconds)) for i in range(CORES)
    ]
    for worker in workers:
        worker.start()
    found = [seconds.get() for _ in workers]
    for worker in workers:
        worker.join()
    count, duration, cpu = np.array(found).T
    return float(count.sum() / duration.max()), float(count.sum() / cpu.sum())


def _forward(teacher: str, texts: str, index: int, barrier: Any, seconds: Any) -> None:
    torch.set_num_threads(1)
    forward = Forward(loading.load(Path(teacher)))
    batches = tokens(corpus.read_rows(Path(texts), "train")).split(SEQUENCES["cpu"])[index::CORES]
    for _ in forward.logits(batches[0]):  # warm
        pass
    barrier.wait()
    started, cpu = time.perf_counter(), time.process_time()
    for batch in batches:
        for _ in forward.logits(batch):
            pass
    count = sum(batch.numel() for batch in batches)
    seconds.put((count, time.perf_counter() - started, time.process_time() - cpu))


def _captured(store: Store, out: Ref) -> tuple[float, float, float]:
    """Tokens per second between the first and the last shards, all actors at work at both ends; of the whole; and per
    second of CPU time between those shards."""
    from sparsekd_ray.teacher.capture import capture

    moments = [(time.perf_counter(), _cpu_seconds())]
    with _each_shard(lambda: moments.append((time.perf_counter(), _cpu_seconds()))):
        settings, execution = Teacher(codec="compact"), Execution(actors=CORES)
        capture(TEACHER, TEXTS, out, settings=settings, store=store, execution=execution)
    finished, cpu = np.array(moments).T
    first, last = CORES, len(finished) - 1 - CORES
    tokens_between = (last - first) * SHARD_ROWS * LENGTH
    whole = (len(finished) - 1) * SHARD_ROWS * LENGTH / (finished[-1] - finished[0])
    return (
        tokens_between / (finished[last] - finished[first]),
        whole,
        tokens_between / (cpu[last] - cpu[first]),
    )


@contextmanager
def _each_shard(note: Callable[[], None]) -> Iterator[None]:
    """Calls `note` at every line of progress of the capture: one per finished shard."""
    handler, source = logging.Handler(), logging.getLogger("sparsekd_ray.teacher.capture")
    handler.addFilter(is_progress)
    handler.emit = lambda record: note()  # type: ignore[method-assign]
    source.addHandler(handler)
    try:
        yield
    finally:
        source.removeHandler(handler)


def _cpu_seconds() -> float:
    """So far, of this process and of what it started and is still there, but for the S3 server."""
    me, total = psutil.Process(), 0.0
    for process in [me, *me.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += 0.0 if "rclone" in process.name() else times.user + times.system
    return total
