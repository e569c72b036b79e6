"""A store with a small random teacher and a corpus of many shards; as a script, a driver that captures in it.

python tests/support/capturing.py STORE ACTORS
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import transformers
from tokenizers import Tokenizer, models

from sparsekd_ray.config import Execution, Teacher
from sparsekd_ray.corpus.shards import MANIFEST, SCHEMA, domain_table, write_shards
from sparsekd_ray.store import Ref, Store
from sparsekd_ray.teacher import capture

TEACHER, TEXTS, CACHE = (
    Ref("dense", "teacher", "aa11"),
    Ref("corpus", "texts", "bb22"),
    Ref("cache", "top8", "cc33"),
)
VOCAB, LENGTH, SHARD_ROWS, SHARDS = 512, 64, 8, 24
LAYERS = 12 if os.environ.get("SPARSEKD_KILLS") else 2  # kills need shards that take a while
TOPK = Teacher(k=8, temperatures=(2.0,), codec="compact")
PLAIN = Teacher(k=8, temperatures=(2.0,), codec="plain")
SAMPLED = Teacher(signal="sampled", temperatures=(2.0,), codec="compact", bytes_per_token=12)
PARENTS = {"teacher": TEACHER.key, "texts": TEXTS.key}


def prepare(store: Store, table: pa.Table | None = None, seq_len: int | None = LENGTH) -> Store:
    """The teacher and a corpus, by default of random rows of one length, as the cascade would have left them."""
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "max_position_embeddings": LENGTH}
    torch.manual_seed(0)
    config = transformers.Phi3Config(
        vocab_size=VOCAB,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
        **sizes,
        **heads,
    )
    with store.building(TEACHER) as out:
        transformers.Phi3ForCausalLM(config).save_pretrained(out)
    store.commit(TEACHER, identity={}, inputs={}, metrics={}, seconds=0)
    rows = np.random.default_rng(0).integers(0, VOCAB, (SHARDS * SHARD_ROWS - 3, LENGTH), dtype=np.int32)
    _write_corpus(store, domain_table("prose", "train", rows) if table is None else table, seq_len)
    return store


def unequal_rows(lengths: list[int]) -> pa.Table:
    """Random training rows of these lengths."""
    ids = np.random.default_rng(2).integers(0, VOCAB, sum(lengths), dtype=np.int32)
    return pa.table(
        {
            "sample_id": [f"prose-train-{i:06d}" for i in range(len(lengths))],
            "domain": ["prose"] * len(lengths),
            "input_ids": pa.ListArray.from_arrays(np.cumsum([0, *lengths]).astype(np.int32), ids),
        },
        SCHEMA,
    )


def _write_corpus(store: Store, table: pa.Table, seq_len: int | None) -> None:
    """A corpus artifact around these training rows; without `seq_len` they may differ in length."""
    manifest = {"vocab_size": VOCAB, "tokenizer_hash": "dd44", "shard_rows": SHARD_ROWS}
    manifest |= {} if seq_len is None else {"seq_len": seq_len}
    with store.building(TEXTS) as out:
        write_shards(table, out / "train", SHARD_ROWS)
        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, "w0"))
        transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(
            out / "tokenizer"
        )
        (out / MANIFEST).write_text(json.dumps(manifest | {"rows": {"train": {"prose": len(table)}}}))
    store.commit(TEXTS, identity={}, inputs={}, metrics={}, seconds=0)


def run(store: Store, actors: int = 2, settings: Teacher = TOPK, out: Ref = CACHE) -> dict[str, Any]:
    """A capture, from wherever an earlier one was killed to its record."""
    if (record := store.record(out)) is not None:  # as the cascade's driver does
        return record
    execution = Execution(store=store.root, actors=actors)
    metrics = capture.capture(TEACHER, TEXTS, out, settings=settings, store=store, execution=execution)
    return store.commit(out, identity=settings.model_dump(), inputs=PARENTS, metrics=metrics, seconds=0)


def content(store: Store, out: Ref = CACHE) -> dict[str, str]:
    """Every file's checksum, after all of them were verified."""
    folder = store.fetch(out)
    record = store.record(out)
    assert record is not None and folder.is_dir()
    return {name: file.sha256 for name, file in record.files.items()}


if __name__ == "__main__":
    from sparsekd_ray.cascade.driver import connected

    with connected(Execution()):
        run(Store(str(Path(sys.argv[1]))), actors=int(sys.argv[2]))
