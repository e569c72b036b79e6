"""Ray Data streams the corpus through a pool of teacher actors: exactly one cache shard for each corpus shard.

An actor reads a corpus shard, runs the teacher, and publishes the finished shard with its checksum. A published shard
is never computed again, so a resumed capture computes only the missing shards. While an actor writes and
uploads one shard, its forward pass is at the next. The manifest and the artifact's record come last, once every shard
is published and counted. Actors of all kinds of cards take their shards from one queue.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy

from sparsekd_ray import corpus
from sparsekd_ray.config import Execution, Teacher
from sparsekd_ray.errors import ConfigError, CorpusError, IntegrityError
from sparsekd_ray.model import loading, spec
from sparsekd_ray.runtime.logging import log_progress
from sparsekd_ray.store import Ref, Store
from sparsekd_ray.store.dtype import dtype_on, require_one_dtype
from sparsekd_ray.teacher import shards, threshold
from sparsekd_ray.teacher.codec import LARGEST_ID
from sparsekd_ray.teacher.forward import Forward, lengths
from sparsekd_ray.teacher.manifest import CacheManifest

logger = logging.getLogger(__name__)

THRESHOLD = "threshold.json"
PILOT = 64  # sequences on which a sampler's threshold is set


class CaptureMetrics(TypedDict):
    tokens: int
    shards: int


class ActorArguments(NamedTuple):
    store: Store
    teacher: Ref
    texts: Ref
    out: Ref
    manifest: CacheManifest
    gpu: bool


class TeacherActor:
    """Holds the teacher's weights and turns corpus shards into cache shards, two at a time: one in the model, one on
    its way to the store."""

    def __init__(
        self, store: Store, teacher: Ref, texts: Ref, out: Ref, manifest: CacheManifest, gpu: bool
    ) -> None:
        if not gpu:
            torch.set_num_threads(1)
        self.store, self.teacher, self.texts, self.out = store, teacher, texts, out
        self.manifest, self.one_at_a_time = manifest, threading.Lock()
        device, dtype = "cuda" if gpu else "cpu", getattr(torch, manifest.dtype)
        self.forward = Forward(loading.load(store.fetch(teacher), dtype=dtype, device=device))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for index in batch["shard"]:
            self.shard(int(index))
        return batch

    def shard(self, index: int) -> int:
        """Computes and publishes one shard; returns its number of rows."""
        name, rows = shards.shard_name(index), self.rows(index)
        if self.store.pull(self.out, name):  # published by an actor that was lost before it answered
            return len(rows)
        if len(rows) != self.manifest.shard_rows[index]:
            raise IntegrityError(
                f"{name} of the corpus has {len(rows)} rows, its manifest says {self.manifest.shard_rows[index]}"
            )
        self.store.fetch(self.teacher)  # compares the files' dates; raises if a file has changed
        with self.one_at_a_time:
            signal = self.forward.signal(rows, self.manifest)
        if self.store.pull(self.out, name):  # another attempt was faster
            return len(rows)
        with self.store.publishing(self.out, name) as path:
            shards.write(path, rows, signal, self.manifest)
        return len(rows)

    def rows(self, index: int) -> pa.Table:
        name = shards.shard_name(index)
        return corpus.read_shard(self.store.fetch(self.texts, [f"train/{name}"]) / "train" / name)

    def fit_threshold(self, bytes_per_token: float) -> float:
        return threshold.fit_teacher(
            self.forward, self.rows(0).slice(0, PILOT), self.manifest, bytes_per_token
        )


def capture(
    teacher: Ref,
    texts: Ref,
    out: Ref,
    *,
    settings: Teacher,
    store: Store,
    execution: Execution,
) -> CaptureMetrics:
    """Fills `out`'s working directory with shards and manifest; returns the metrics for its record."""
    source = corpus.read_manifest(store.fetch(texts, [corpus.MANIFEST]))
    vocab_size = spec.sizes(store.fetch(teacher, ["config.json"]), "vocab_size")[0]
    rows, seq_len = source["rows"]["train"], source.get("seq_len")
    shard_rows = _shard_rows(sum(rows.values()), source["shard_rows"])
    _check_vocabulary(settings, vocab_size)
    tokens = _tokens_by_shard(store.fetch(texts), shard_rows, seq_len)
    manifest = CacheManifest(
        signal=settings.signal,
        codec=settings.codec,
        k=settings.k,
        temperatures=settings.temperatures,
        vocab_size=vocab_size,
        tokenizer_hash=source["tokenizer_hash"],
        teacher=teacher.fingerprint,
        corpus=texts.fingerprint,
        shard_rows=shard_rows,
        rows=sum(shard_rows),
        tokens=sum(tokens),
        dtype=dtype_on(execution.gpus),
        seq_len=seq_len,
    )
    require_one_dtype(store, out, manifest.dtype)
    arguments = ActorArguments(store, teacher, texts, out, manifest, execution.gpus)
    if settings.signal == "sampled":
        manifest = replace(manifest, threshold=_threshold(arguments, settings.bytes_per_token))
        arguments = arguments._replace(manifest=manifest)
    done = {name for name in store.published(out, "") if name.endswith(".parquet")}
    todo = {index: n for index, n in enumerate(tokens) if shards.shard_name(index) not in done}
    if done:
        logger.info(f"{len(tokens) - len(todo)} of {len(tokens)} shards are captured already")
    _fill(todo, len(tokens), _stream(list(todo), arguments, execution))
    published = set(store.published(out))
    missing = [name for name in map(shards.shard_name, range(len(tokens))) if name not in published]
    if missing:
        raise IntegrityError(
            f"capture ended without {len(missing)} of {len(tokens)} shards, the first is {missing[0]}"
        )
    manifest.write(store.workdir(out))
    return CaptureMetrics(tokens=manifest.tokens, shards=len(tokens))


def _fill(todo: dict[int, int], count: int, finished: Iterable[int]) -> None:
    """Waits for the shards of `todo` (shard → tokens) to be finished, and logs the speed."""
    started, wanted = time.monotonic(), sum(todo.values())
    left, open_shards = wanted, len(todo)
    for index in finished:
        left, open_shards = left - todo[index], open_shards - 1
        rate = (wanted - left) / (time.monotonic() - started)
        log_progress(
            logger, f"{count - open_shards}/{count} shards  {rate:,.0f} tokens/s  {left / rate:.0f} s left"
        )


def _check_vocabulary(settings: Teacher, vocab_size: int) -> None:
    """ConfigError if the signal or its codec cannot hold ids of this vocabulary."""
    if settings.signal == "topk" and settings.k >= vocab_size:
        raise ConfigError(
            f"teacher.k is {settings.k}, the vocabulary has {vocab_size} entries: k must be smaller"
        )
    if settings.codec == "compact" and vocab_size > LARGEST_ID + 1:
        raise ConfigError(
            f"the vocabulary has {vocab_size} entries, the compact codec {LARGEST_ID + 1}: set teacher.codec to plain"
        )


def _shard_rows(rows: int, shard_rows: int) -> tuple[int, ...]:
    """Rows of each shard: `shard_rows` in all but the last."""
    return tuple(min(shard_rows, rows - first) for first in range(0, rows, shard_rows))


def _tokens_by_shard(texts: Path, shard_rows: tuple[int, ...], seq_len: int | None) -> list[int]:
    """Tokens of every shard. CorpusError unless sample ids are distinct and rows are as many and as long as stated.

    Where `seq_len` is None, rows may have any length from two tokens on.
    """
    rows = corpus.read_rows(texts, "train")
    names, lengths_B = rows["sample_id"].to_pylist(), lengths(rows)
    if len(set(names)) < len(names):
        twice = next(name for name in sorted(names) if names.count(name) > 1)
        raise CorpusError(f"{texts}: sample id {twice} occurs more than once; build the corpus again")
    if len(names) != sum(shard_rows):
        raise CorpusError(f"{texts}: {len(names)} training rows, its manifest says {sum(shard_rows)}")
    if seq_len is not None and (lengths_B != seq_len).any():
        place = int(np.argmax(lengths_B != seq_len))
        raise CorpusError(
            f"{texts}: sample {names[place]} has {lengths_B[place]} tokens, its manifest says that all have {seq_len}"
        )
    ends = np.cumsum(shard_rows)[:-1]
    return [int(part.sum()) for part in np.split(lengths_B, ends)]


def _threshold(arguments: ActorArguments, bytes_per_token: float) -> float:
    """The sampler's threshold, published by an earlier attempt at this cache or else fitted by one actor now."""
    store, out = arguments.store, arguments.out
    if (published := store.pull(out, THRESHOLD)) is None:
        logger.info(
            f"searching for the threshold at which a sample takes {bytes_per_token:g} bytes per token"
        )
        options = {"num_gpus": 1} if arguments.gpu else {"num_cpus": 1}
        actor: Any = ray.remote(TeacherActor).options(**options).remote(*arguments)
        fitted = float(ray.get(actor.fit_threshold.remote(bytes_per_token)))
        ray.kill(actor)
        with store.building(out) as folder:
            (folder / THRESHOLD).write_text(json.dumps(fitted))
            store.publish(out, THRESHOLD)
        return fitted
    return float(json.loads(published.read_text()))


def _stream(todo: list[int], arguments: ActorArguments, execution: Execution) -> Iterator[int]:
    """The number of each shard when it is finished."""
    if not todo:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # our own line per shard shows the progress
    context.raise_original_map_exception = True  # Ray's wrapping would hide the advice in our errors
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    # all actors from the start: Ray Data would add them only after a while
    pool = ActorPoolStrategy(
        size=min(execution.actors, len(todo)),
        max_tasks_in_flight_per_actor=2,
        max_concurrent_calls_per_actor=2,
        enable_true_multi_threading=True,
    )
    finished = ray.data.from_items(
        [{"shard": index} for index in todo], override_num_blocks=len(todo)
    ).map_batches(
        TeacherActor,
        fn_constructor_args=arguments,
        batch_size=1,
        compute=pool,
        num_gpus=1 if execution.gpus else None,
        num_cpus=None if execution.gpus else 1,
    )
    for row in finished.iter_rows():
        yield int(row["shard"])
