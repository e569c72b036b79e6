"""Ray Data streams the corpus through a pool of teacher actors: exactly one cache shard for each corpus shard.

An actor reads a corpus shard, runs the teacher, and publishes the finished shard with its checksum; what is published
is done, whatever is killed afterwards. A resumed capture asks only for the missing shards. The manifest and the
artifact's record come last, once every shard is there and counted.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch
from ray.data import ActorPoolStrategy

from sparsekd_ray import corpus
from sparsekd_ray.config import Execution, Teacher
from sparsekd_ray.errors import ConfigError, IntegrityError, ModelError
from sparsekd_ray.model import checkpoint
from sparsekd_ray.store import Ref, Store
from sparsekd_ray.teacher import shards
from sparsekd_ray.teacher.signal import Signal, topk_from_hidden

SEQUENCES_PER_FORWARD = 16


class TeacherActor:
    """Holds the teacher's weights and turns corpus shards into cache shards."""

    def __init__(
        self, store: Store, teacher: Ref, texts: Ref, out: Ref, settings: Teacher, gpu: bool
    ) -> None:
        if not gpu:
            torch.set_num_threads(1)
        self.store, self.texts, self.out, self.settings = store, texts, out, settings
        device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
        self.model = checkpoint.load(store.fetch(teacher), dtype=dtype, device=device).eval()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        done = [self.shard(int(index)) for index in batch["shard"]]
        return {"shard": batch["shard"], "rows": np.array(done)}

    def shard(self, index: int) -> int:
        name = shards.shard_name(index)
        source = self.store.fetch(self.texts, [f"train/{name}"]) / "train" / name
        rows = corpus.read_shard(source)
        signal = self.signal(rows)
        with self.store.building(self.out) as folder:
            # whole or not at all: another attempt may be writing the same shard
            passing = folder / f".{name}.{os.getpid()}.tmp"
            shards.write(passing, rows, signal)
            passing.replace(folder / name)
            self.store.publish(self.out, name)
        return len(rows)

    @torch.inference_mode()
    def signal(self, rows: pa.Table) -> Signal:
        """The teacher's signal for every position of every row, in order."""
        flat = rows["input_ids"].combine_chunks().flatten().to_numpy()
        input_ids_BL = torch.from_numpy(flat.copy()).long().view(len(rows), -1)
        parts: list[Signal] = []
        for first in range(0, len(rows), SEQUENCES_PER_FORWARD):
            ids_BL = input_ids_BL[first : first + SEQUENCES_PER_FORWARD].to(self.model.device)
            hidden_BLD = self.model.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state[:, :-1]
            head_VD = self.model.get_output_embeddings().weight
            signal = topk_from_hidden(
                hidden_BLD.flatten(0, 1), head_VD, self.settings.k, self.settings.temperatures
            )
            parts.append(Signal(*(column.cpu() for column in signal)))
            _finite(parts[-1], rows["sample_id"].slice(first, len(ids_BL)).to_pylist())
        return Signal(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _finite(signal: Signal, sample_ids: list[str]) -> None:
    bad_B = ~torch.isfinite(signal.logprobs_NK.sum(-1) + signal.log_z_NT.sum(-1)).view(
        len(sample_ids), -1
    ).all(-1)
    if bad_B.any():
        names = [sample for sample, bad in zip(sample_ids, bad_B.tolist(), strict=True) if bad]
        raise ModelError(
            f"the teacher's probabilities for {names[0]} ({len(names)} of this batch) are NaN or infinite: "
            "its weights or its precision are broken; nothing was written for this shard"
        )


def capture(
    teacher: Ref,
    texts: Ref,
    out: Ref,
    *,
    settings: Teacher,
    store: Store,
    execution: Execution,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Fills `out`'s working directory with shards and manifest; returns the metrics for its record."""
    source = corpus.read_manifest(store.fetch(texts, [corpus.MANIFEST]))
    vocab_size = checkpoint.config_dict(store.fetch(teacher, ["config.json"]))["vocab_size"]
    manifest = _manifest(source, vocab_size, teacher, texts, settings)
    count = len(manifest["shard_rows"])
    done = {name for name in store.published(out, "") if name.endswith(".parquet")}
    todo = [index for index in range(count) if shards.shard_name(index) not in done]
    if done:
        say(f"{count - len(todo)} of {count} shards are there already")
    started, tokens = time.monotonic(), 0
    for index, rows in _stream(todo, teacher, texts, out, settings, store, execution):
        if rows != manifest["shard_rows"][index]:
            raise IntegrityError(
                f"shard {index}: {rows} rows captured, the corpus has {manifest['shard_rows'][index]}"
            )
        tokens += rows * manifest["seq_len"]
        done.add(shards.shard_name(index))
        rate = tokens / (time.monotonic() - started)
        left = sum(manifest["shard_rows"][i] for i in todo) * manifest["seq_len"] - tokens
        say(f"{len(done)}/{count} shards  {rate:,.0f} tokens/s  {left / rate:.0f} s left")
    missing = [shards.shard_name(i) for i in range(count) if shards.shard_name(i) not in done]
    if missing:
        raise IntegrityError(
            f"capture ended without {len(missing)} of {count} shards, the first is {missing[0]}"
        )
    (store.workdir(out) / shards.MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
    return {"tokens": manifest["tokens"], "shards": count}


def _manifest(
    source: dict[str, Any], vocab_size: int, teacher: Ref, texts: Ref, settings: Teacher
) -> dict[str, Any]:
    """`vocab_size` is the width of the teacher's logits, which may exceed the tokenizer's vocabulary."""
    if settings.k >= vocab_size:
        raise ConfigError(
            f"teacher.k is {settings.k}, the vocabulary has {vocab_size} entries: k must be smaller"
        )
    rows, size = sum(source["rows"]["train"].values()), source["shard_rows"]
    shard_rows = [min(size, rows - first) for first in range(0, rows, size)]
    return {
        "format": shards.FORMAT,
        "k": settings.k,
        "temperatures": list(settings.temperatures),
        "vocab_size": vocab_size,
        "tokenizer_hash": source["tokenizer_hash"],
        "teacher": teacher.fingerprint,
        "corpus": texts.fingerprint,
        "seq_len": source["seq_len"],
        "shard_rows": shard_rows,
        "rows": rows,
        "tokens": rows * source["seq_len"],
    }


def _stream(
    todo: list[int], teacher: Ref, texts: Ref, out: Ref, settings: Teacher, store: Store, execution: Execution
) -> Any:
    """(shard, rows) of every finished shard, as it finishes."""
    if not todo:
        return
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # our own line per shard says how far it is
    actors = min(execution.actors, len(todo))
    finished = ray.data.from_items(
        [{"shard": index} for index in todo], override_num_blocks=len(todo)
    ).map_batches(
        TeacherActor,
        fn_constructor_args=(store, teacher, texts, out, settings, execution.gpus),
        batch_size=1,
        compute=ActorPoolStrategy(min_size=1, max_size=actors),
        num_gpus=1 if execution.gpus else None,
        num_cpus=None if execution.gpus else 1,
    )
    for row in finished.iter_rows():
        yield int(row["shard"]), int(row["rows"])
