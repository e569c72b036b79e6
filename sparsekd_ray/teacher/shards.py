"""The teacher's signal on disk: Parquet shards that any program can read, and the manifest that binds them.

A cache is a directory of `00000.parquet`, `00001.parquet`, … , one for each train shard of the corpus and in its order.
One row is one sequence of L tokens, hence L − 1 predictions:

    sample_id      string          the corpus's id
    domain         string          the corpus's domain
    input_ids      list<int32>     L token ids
    topk_ids       list<int32>     (L − 1) · k ids, position after position, by falling probability
    topk_logprobs  list<float32>   their natural log-probabilities at temperature 1
    log_z          list<float32>   (L − 1) · T log-normalisers, temperatures in the manifest's order

`manifest.json` holds k, the temperatures, vocabulary size, tokenizer hash, the fingerprints of teacher and corpus,
row and token counts. The trainer reads it and refuses what does not match: nobody types these values twice.

Shapes: B sequences, L tokens each, K kept ids, T temperatures.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sparsekd_ray.errors import IntegrityError, ModelError
from sparsekd_ray.teacher.signal import Signal

FORMAT = "sparsekd-topk-1"
MANIFEST = "manifest.json"


class Rows(NamedTuple):
    """Decoded rows of a shard."""

    sample_ids: list[str]
    input_ids_BL: torch.Tensor
    """int64"""
    topk_ids_BLK: torch.Tensor
    """int32, L − 1 positions"""
    logprobs_BLK: torch.Tensor
    log_z_BLT: torch.Tensor


def shard_name(index: int) -> str:
    return f"{index:05d}.parquet"


def write(path: Path, corpus_rows: pa.Table, signal: Signal) -> None:
    """Writes one shard: `corpus_rows` (sample_id, domain, input_ids) and the signal of their positions, in order."""
    rows = len(corpus_rows)
    columns = {
        "topk_ids": _lists(signal.ids_NK.numpy(), rows),
        "topk_logprobs": _lists(signal.logprobs_NK.numpy(), rows),
        "log_z": _lists(signal.log_z_NT.numpy(), rows),
    }
    table = corpus_rows.combine_chunks()
    for name, column in columns.items():
        table = table.append_column(name, column)
    table = table.replace_schema_metadata({"format": FORMAT})
    pq.write_table(table, path, compression="zstd", row_group_size=rows)


def _lists(values: np.ndarray, rows: int) -> pa.ListArray:
    """A flat array as `rows` lists of equal length, without a Python object per value."""
    flat = values.reshape(-1)
    offsets = np.linspace(0, len(flat), rows + 1, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))


def read(path: Path, manifest: dict[str, Any]) -> Rows:
    """Decodes one shard; `IntegrityError` where it does not have the shape the manifest says."""
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise IntegrityError(
            f"{path} is not a readable Parquet shard: {error}. Remove the cache's directory."
        ) from None
    if (table.schema.metadata or {}).get(b"format") != FORMAT.encode():
        raise IntegrityError(
            f"{path} is not a shard of format {FORMAT}: it was written by another program or version"
        )
    rows, length = len(table), manifest["seq_len"]
    shapes = {
        "input_ids": (rows, length),
        "topk_ids": (rows, length - 1, manifest["k"]),
        "topk_logprobs": (rows, length - 1, manifest["k"]),
        "log_z": (rows, length - 1, len(manifest["temperatures"])),
    }
    columns = {name: _dense(table[name], shape, path) for name, shape in shapes.items()}
    return Rows(
        table["sample_id"].to_pylist(),
        columns["input_ids"].long(),
        columns["topk_ids"],
        columns["topk_logprobs"],
        columns["log_z"],
    )


def _dense(column: pa.ChunkedArray, shape: tuple[int, ...], path: Path) -> torch.Tensor:
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    if flat.size != int(np.prod(shape)):
        raise IntegrityError(
            f"{path}: {flat.size} values where the manifest's shape {shape} needs {np.prod(shape)}"
        )
    return torch.from_numpy(flat.copy()).reshape(shape)


def read_manifest(directory: Path) -> dict[str, Any]:
    return json.loads((directory / MANIFEST).read_text())


def log_z_column(manifest: dict[str, Any], temperature: float) -> int | None:
    """Column of `log_z` that belongs to `temperature`; None at 1, where log Z is 0."""
    if temperature == 1.0:
        return None
    if temperature not in manifest["temperatures"]:
        raise ModelError(
            f"the cache holds log-normalisers for temperatures {manifest['temperatures']}, not {temperature}: "
            "add it to teacher.temperatures and capture again"
        )
    return manifest["temperatures"].index(temperature)


def check(
    manifest: dict[str, Any], *, tokenizer_hash: str, vocab_size: int, teacher: str, corpus: str
) -> None:
    """Refuses a cache that another tokenizer, vocabulary, teacher or corpus made."""
    expected = {
        "format": FORMAT,
        "tokenizer_hash": tokenizer_hash,
        "vocab_size": vocab_size,
        "teacher": teacher,
        "corpus": corpus,
    }
    for key, value in expected.items():
        if manifest.get(key) != value:
            raise ModelError(
                f"the teacher cache does not belong to this student: its {key} is {manifest.get(key)!r}, "
                f"the student's is {value!r}. Capture the cache again from a teacher that shares it."
            )
