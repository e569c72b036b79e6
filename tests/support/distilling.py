"""Distillations on several workers without Ray: forked processes over gloo, with the real engine.

`python tests/support/distilling.py STORE` runs all that `tests/unit/test_distill_loop.py` looks at, in one process that
has imported torch and DeepSpeed once, and writes what came of it to STORE/outcomes.json.
"""

import json
import multiprocessing
import os
import signal
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from models import VOCABULARY, dense_directory, dense_model
from safetensors.torch import save_file

from sparsekd_ray.config import Distill, Execution
from sparsekd_ray.corpus.shards import MANIFEST, domain_table, write_shards
from sparsekd_ray.distill import loop
from sparsekd_ray.distill.engine import Engine
from sparsekd_ray.distill.job import Job, Training
from sparsekd_ray.errors import SparseKDError
from sparsekd_ray.model import loading
from sparsekd_ray.store import Ref, Store
from sparsekd_ray.teacher import shards
from sparsekd_ray.teacher.forward import Forward
from sparsekd_ray.teacher.manifest import CacheManifest

SEQUENCES, LENGTH, SHARD_ROWS, TEMPERATURE = 5, 16, 2, 2.0
TEACHER, STUDENT = Ref("dense", "teacher", "aa11"), Ref("prune", "student", "bb22")
TEXTS, CACHE = Ref("corpus", "texts", "cc33"), Ref("cache", "top8", "dd44")
WORLDS = (1, 2, 3)
STEPS, VALIDATE_EVERY, KILLED_AT = 8, 3, 5


def prepare(store: Store) -> None:
    """A teacher, a student of the same shape with other weights, five sequences, and the teacher's cache of them."""
    with store.building(TEACHER) as out:
        dense_directory(out, "phi3", tied=True)
    with store.building(STUDENT) as out:
        dense_directory(out, "phi3", tied=True)
        model = dense_model("phi3", tied=True)
        torch.manual_seed(1)
        model.apply(model._init_weights)
        model.save_pretrained(out)
    rows = np.random.default_rng(0).integers(0, VOCABULARY, (SEQUENCES + 7, LENGTH), dtype=np.int32)
    train = domain_table("prose", "train", rows[:SEQUENCES])
    with store.building(TEXTS) as out:
        write_shards(train, out / "train", SHARD_ROWS)
        valid = [domain_table("prose", "valid", rows[SEQUENCES:-3]), domain_table("code", "valid", rows[-3:])]
        write_shards(pa.concat_tables(valid), out / "valid", SHARD_ROWS)
        (out / MANIFEST).write_text(json.dumps({"tokenizer_hash": "ee55"}))
    _commit(store, TEACHER, STUDENT, TEXTS)
    with store.building(CACHE) as out:
        _capture(store, train, out)
    _commit(store, CACHE)


def _commit(store: Store, *refs: Ref) -> None:
    for ref in refs:
        store.commit(ref, identity={}, inputs={}, metrics={}, seconds=0)


def _capture(store: Store, rows: pa.Table, out: Path) -> None:
    tables = [rows.slice(start, SHARD_ROWS) for start in range(0, SEQUENCES, SHARD_ROWS)]
    manifest = CacheManifest(
        signal="topk", codec="plain", k=8, temperatures=(TEMPERATURE,), vocab_size=VOCABULARY,
        tokenizer_hash="ee55", teacher=TEACHER.fingerprint, corpus=TEXTS.fingerprint, rows=SEQUENCES,
        shard_rows=tuple(len(table) for table in tables), tokens=SEQUENCES * LENGTH, dtype="float32",
        seq_len=LENGTH,
    )  # fmt: skip
    forward = Forward(loading.load(store.fetch(TEACHER)))
    for index, table in enumerate(tables):
        shards.write(out / shards.shard_name(index), table, forward.signal(table, manifest), manifest)
    manifest.write(out)


def job(name: str, **settings: Any) -> Job:
    """All five sequences in every step; `epochs` is the number of steps."""
    values = {"batch": SEQUENCES, "temperature": TEMPERATURE, "grad_clip": 1e9, "lr": 1e-3} | settings
    return Job(
        title=name,
        student=STUDENT,
        cache=CACHE,
        teacher=TEACHER,
        corpus=TEXTS,
        out=Ref("distill", name, "ff66"),
        settings=Distill(**values),
        seed=3,
        identity={},
        inputs={},
    )


def work(store: Store, task: Job, world: int, prepare_worker: Callable[[], None] = lambda: None) -> str:
    """The job on `world` processes; the message of our error, if it ended in one, "killed", or nothing."""
    rendezvous = f"file://{store.root}/{uuid.uuid4().hex}"
    context = multiprocessing.get_context("fork")
    outcomes: Any = context.SimpleQueue()

    def worker(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
        prepare_worker()
        try:
            loop.distill(task, store, Execution(micro_batch=1))
            outcomes.put("")
        except SparseKDError as error:
            outcomes.put(f"{type(error).__name__}: {error}")

    processes = [context.Process(target=worker, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    exits = {process.exitcode for process in processes}
    if exits == {-signal.SIGKILL}:
        return "killed"
    assert exits == {0}, f"a worker of {task.title} ended with {exits}"
    messages = {outcomes.get() for _ in processes}
    assert len(messages) == 1, f"workers of {task.title} ended differently: {messages}"
    return str(messages.pop())


def keep_gradients(path: Path) -> Callable[[], None]:
    """Makes a worker write the gradients of the only step, which AdamW's first moment holds ten times smaller."""

    def prepare_worker() -> None:
        start = loop.start_engine

        def started(*arguments: Any) -> Engine:
            engine: Any = start(*arguments)
            destroy = engine.destroy

            def write() -> None:
                from deepspeed.utils import safe_get_full_optimizer_state

                gradients = {
                    name: 10 * safe_get_full_optimizer_state(parameter, "exp_avg")
                    for name, parameter in engine.module.named_parameters()
                }
                if torch.distributed.get_rank() == 0:
                    save_file(gradients, path)
                destroy()

            engine.destroy = write
            return engine

        loop.start_engine = started  # type: ignore[assignment]

    return prepare_worker


def die_in_step(step: int) -> Callable[[], None]:
    def prepare_worker() -> None:
        honest = loop._step

        def fatal(training: Training) -> torch.Tensor:
            if training.progress.step == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return honest(training)

        loop._step = fatal

    return prepare_worker


def main(root: str) -> None:
    import deepspeed  # noqa: F401  once, before any worker is forked

    store = Store(root)
    prepare(store)
    outcomes: dict[str, str] = {}
    for world in WORLDS:
        hook = keep_gradients(Path(root) / f"gradients-{world}.safetensors")
        outcomes[f"one-step-{world}"] = work(store, job(f"one-step-{world}", epochs=1), world, hook)
    several: dict[str, Any] = {"epochs": STEPS, "validate_every": VALIDATE_EVERY, "patience": STEPS}
    outcomes["undisturbed"] = work(store, job("undisturbed", **several), 2)
    outcomes["killed"] = work(store, job("resumed", **several), 2, die_in_step(KILLED_AT))
    outcomes["resumed"] = work(store, job("resumed", **several), 2, die_in_step(VALIDATE_EVERY - 1))
    outcomes["diverged"] = work(store, job("diverged", epochs=4, lr=1e15, warmup=0.0), 2)
    outcomes["idle"] = work(store, job("idle", epochs=9, validate_every=1, patience=2, lr=1e-12), 2)
    (Path(root) / "outcomes.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main(sys.argv[1])
