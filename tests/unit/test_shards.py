"""The shard format: what is written is what is read, in every form, and what does not match is refused."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from manifests import cache_manifest

from sparsekd_ray.errors import IntegrityError, ModelError
from sparsekd_ray.teacher import shards
from sparsekd_ray.teacher.manifest import read_manifest
from sparsekd_ray.teacher.signal import sampled, tempered, topk

ROWS, LENGTH, K, TEMPERATURES, VOCAB, THRESHOLD = 3, 6, 4, (1.5, 2.0), 290, 0.04
MANIFEST = cache_manifest(
    seq_len=LENGTH,
    k=K,
    temperatures=TEMPERATURES,
    vocab_size=VOCAB,
    tokenizer_hash="aa",
    teacher="bb",
    corpus="cc",
)
COMPACT = replace(MANIFEST, codec="compact")
SAMPLED = replace(MANIFEST, signal="sampled", temperatures=(2.0,), threshold=THRESHOLD)
SAMPLED_COMPACT = replace(SAMPLED, codec="compact")
FORMS = pytest.mark.parametrize(
    "manifest",
    [MANIFEST, COMPACT, SAMPLED, SAMPLED_COMPACT],
    ids=["topk-plain", "topk-compact", "sampled-plain", "sampled-compact"],
)


def corpus_rows(rows=ROWS, length=LENGTH, vocabulary=VOCAB):
    rng = np.random.default_rng(0)
    return pa.table(
        {
            "sample_id": [f"prose-train-{i:06d}" for i in range(rows)],
            "domain": ["prose"] * rows,
            "input_ids": pa.array(rng.integers(0, vocabulary, (rows, length)).tolist(), pa.list_(pa.int32())),
        }
    )


def signal_of(logits, manifest):
    if manifest.signal == "topk":
        return topk(logits, manifest.k, manifest.temperatures)
    return sampled(logits, 2.0, manifest.threshold, torch.rand(len(logits)))


def written(folder, manifest):
    torch.manual_seed(0)
    rows, logits = corpus_rows(), 2 * torch.randn(ROWS * (LENGTH - 1), VOCAB)
    signal = signal_of(logits, manifest)
    shards.write(folder / "00000.parquet", rows, signal, manifest)
    return folder / "00000.parquet", rows, signal


@FORMS
def test_rows_and_ids_come_back(tmp_path, manifest):
    path, rows, signal = written(tmp_path, manifest)
    found = shards.read(path, manifest, 2.0)
    assert found.sample_ids == rows["sample_id"].to_pylist() and found.domains == ["prose"] * ROWS
    assert [found.tokens(row).tolist() for row in range(ROWS)] == rows["input_ids"].to_pylist()
    assert torch.equal(found.target.ids_NK, signal.ids_NK)
    assert torch.equal(found.part(1).ids_NK, signal.ids_NK[LENGTH - 1 : 2 * (LENGTH - 1)])


@pytest.mark.parametrize("temperature", [1.0, 1.5, 2.0])
def test_plain_probabilities_are_exact_and_compact_ones_close(tmp_path, temperature):
    path, _, signal = written(tmp_path, MANIFEST)
    stored = {1.5: signal.log_z_NT[:, 0], 2.0: signal.log_z_NT[:, 1], 1.0: torch.zeros(len(signal.ids_NK))}
    logprobs, tail = tempered(signal.logprobs_NK, stored[temperature], temperature)
    exact = shards.read(path, MANIFEST, temperature).target
    assert torch.equal(exact.logprobs_NK, logprobs) and torch.equal(exact.tail_N, tail)
    close = shards.read(written(tmp_path, COMPACT)[0], COMPACT, temperature).target
    torch.testing.assert_close(close.tail_N, tail, atol=2.5e-4, rtol=0)
    torch.testing.assert_close(close.logprobs_NK.exp().sum(-1) + close.tail_N, torch.ones(len(tail)))
    kl = (close.logprobs_NK.exp() * (close.logprobs_NK - logprobs)).sum(-1) + close.tail_N * (
        close.tail_N / tail
    ).log()
    assert 0 <= kl.mean() < 1e-3


def test_samples_come_back_with_their_weights(tmp_path):
    path, _, signal = written(tmp_path, SAMPLED)
    assert torch.equal(shards.read(path, SAMPLED, 2.0).target.logprobs_NK, signal.logprobs_NK)
    compact = shards.read(written(tmp_path, SAMPLED_COMPACT)[0], SAMPLED_COMPACT, 2.0).target
    torch.testing.assert_close(compact.logprobs_NK, signal.logprobs_NK, atol=1 / 64 + 1e-6, rtol=0)
    assert not compact.tail_N.any()


def test_another_program_reads_the_plain_form_with_pyarrow_alone(tmp_path):
    path, rows, signal = written(tmp_path, MANIFEST)
    row = pq.read_table(path).to_pylist()[1]
    assert row["domain"] == "prose" and row["input_ids"] == rows["input_ids"].to_pylist()[1]
    position = 2  # its alternatives stand at position · k in the flat list
    flat = (LENGTH - 1) + position
    assert row["topk_ids"][position * K : (position + 1) * K] == signal.ids_NK[flat].tolist()


@FORMS
def test_the_same_rows_give_the_same_bytes(tmp_path, manifest):
    path, rows, signal = written(tmp_path, manifest)
    shards.write(tmp_path / "again.parquet", rows, signal, manifest)
    assert path.read_bytes() == (tmp_path / "again.parquet").read_bytes()


@FORMS
def test_a_manifest_of_another_shape_is_refused(tmp_path, manifest):
    path, _, _ = written(tmp_path, manifest)
    changes = [{"seq_len": LENGTH + 1}, {"codec": "compact" if manifest.codec == "plain" else "plain"}]
    if manifest.signal == "topk":
        changes += [{"k": K + 1}, {"temperatures": (2.0,)}]
    for change in changes:
        with pytest.raises(IntegrityError, match=r"00000\.parquet"):
            shards.read(path, replace(manifest, **change), 2.0)


def test_a_truncated_or_foreign_file_is_refused(tmp_path):
    path, rows, _ = written(tmp_path, MANIFEST)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(IntegrityError, match=r"00000\.parquet"):
        shards.read(path, MANIFEST, 2.0)
    pq.write_table(rows, tmp_path / "foreign.parquet")
    with pytest.raises(IntegrityError, match="another program"):
        shards.read(tmp_path / "foreign.parquet", MANIFEST, 2.0)


def test_a_cache_of_something_else_is_refused():
    mine = {"tokenizer_hash": "aa", "vocab_size": VOCAB, "teacher": "bb", "corpus": "cc"}
    MANIFEST.require(**mine)
    for key in mine:
        with pytest.raises(ModelError, match=key):
            MANIFEST.require(**(mine | {key: "other"}))


def test_temperatures_come_from_the_manifest(tmp_path):
    MANIFEST.write(tmp_path)
    manifest = read_manifest(tmp_path)
    assert manifest == MANIFEST
    assert manifest.normaliser_index(1.0) is None
    assert manifest.normaliser_index(2.0) == 1
    with pytest.raises(ModelError, match=r"not at 3: .*teacher\.temperatures"):
        manifest.normaliser_index(3.0)
    with pytest.raises(ModelError, match=r"not at 1:"):
        SAMPLED.normaliser_index(1.0)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"signal": "topk", "more": 1}'])
def test_a_file_that_is_no_manifest_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"manifest\.json"):
        read_manifest(tmp_path)
