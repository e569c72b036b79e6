"""The shard format: what is written is what is read, and what does not match is refused."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sparsekd_ray.errors import IntegrityError, ModelError
from sparsekd_ray.teacher import shards
from sparsekd_ray.teacher.signal import topk

ROWS, LENGTH, K, TEMPERATURES, VOCAB = 3, 6, 4, (1.5, 2.0), 29
MANIFEST = {
    "format": shards.FORMAT, "seq_len": LENGTH, "k": K, "temperatures": list(TEMPERATURES), "vocab_size": VOCAB,
    "tokenizer_hash": "aa", "teacher": "bb", "corpus": "cc",
}  # fmt: skip


@pytest.fixture
def written(tmp_path):
    rng = np.random.default_rng(0)
    rows = pa.table(
        {
            "sample_id": [f"prose-train-{i:06d}" for i in range(ROWS)],
            "domain": ["prose"] * ROWS,
            "input_ids": pa.array(rng.integers(0, VOCAB, (ROWS, LENGTH)).tolist(), pa.list_(pa.int32())),
        }
    )
    signal = topk(torch.randn(ROWS * (LENGTH - 1), VOCAB), K, TEMPERATURES)
    shards.write(tmp_path / "00000.parquet", rows, signal)
    return tmp_path / "00000.parquet", rows, signal


def test_round_trip(written):
    path, rows, signal = written
    found = shards.read(path, MANIFEST)
    assert found.sample_ids == rows["sample_id"].to_pylist()
    assert found.input_ids_BL.tolist() == rows["input_ids"].to_pylist()
    assert torch.equal(found.topk_ids_BLK.reshape(-1, K), signal.ids_NK)
    assert torch.equal(found.logprobs_BLK.reshape(-1, K), signal.logprobs_NK)
    assert torch.equal(found.log_z_BLT.reshape(-1, len(TEMPERATURES)), signal.log_z_NT)


def test_another_program_reads_it_with_pyarrow_alone(written):
    path, rows, signal = written
    row = pq.read_table(path).to_pylist()[1]
    assert row["domain"] == "prose" and row["input_ids"] == rows["input_ids"].to_pylist()[1]
    position = 2  # its alternatives stand at position · k in the flat list
    flat = (LENGTH - 1) + position
    assert row["topk_ids"][position * K : (position + 1) * K] == signal.ids_NK[flat].tolist()


def test_the_same_rows_give_the_same_bytes(written, tmp_path):
    path, rows, signal = written
    shards.write(tmp_path / "again.parquet", rows, signal)
    assert path.read_bytes() == (tmp_path / "again.parquet").read_bytes()


@pytest.mark.parametrize("change", [{"k": K + 1}, {"seq_len": LENGTH + 1}, {"temperatures": [1.5]}])
def test_a_manifest_of_another_shape_is_refused(written, change):
    with pytest.raises(IntegrityError, match=r"00000\.parquet"):
        shards.read(written[0], MANIFEST | change)


def test_a_truncated_or_foreign_file_is_refused(written, tmp_path):
    path, rows, _ = written
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(IntegrityError, match=r"00000\.parquet"):
        shards.read(path, MANIFEST)
    pq.write_table(rows, tmp_path / "foreign.parquet")
    with pytest.raises(IntegrityError, match="another program"):
        shards.read(tmp_path / "foreign.parquet", MANIFEST)


def test_a_cache_of_something_else_is_refused():
    mine = {"tokenizer_hash": "aa", "vocab_size": VOCAB, "teacher": "bb", "corpus": "cc"}
    shards.check(MANIFEST, **mine)
    for key in mine:
        with pytest.raises(ModelError, match=key):
            shards.check(MANIFEST, **(mine | {key: "other"}))


def test_temperatures_come_from_the_manifest(tmp_path):
    (tmp_path / shards.MANIFEST).write_text(json.dumps(MANIFEST))
    manifest = shards.read_manifest(tmp_path)
    assert shards.log_z_column(manifest, 1.0) is None
    assert shards.log_z_column(manifest, 2.0) == 1
    with pytest.raises(ModelError, match=r"3\.0.*teacher\.temperatures"):
        shards.log_z_column(manifest, 3.0)
