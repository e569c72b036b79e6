"""Capture on real Ray: every row once, the same bytes whoever computes them and whatever is killed.

`SPARSEKD_KILLS=50 pytest tests/test_capture.py -k killed` kills captures; the suite kills a whole cascade instead.
`SPARSEKD_NODES=1 pytest tests/test_capture.py -k nodes` captures on a cluster of two nodes.
"""

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import capturing
import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
import two_nodes
from capturing import CACHE, LENGTH, SAMPLED, SHARD_ROWS, SHARDS, TEACHER, TEXTS, VOCAB, unequal_rows
from lines import recorded
from manifests import cache_manifest
from safetensors.torch import load_file, save_file

from sparsekd_ray import corpus
from sparsekd_ray.cascade.driver import unwrapped
from sparsekd_ray.corpus.shards import domain_table
from sparsekd_ray.distill.reader import SampleReader
from sparsekd_ray.errors import ConfigError, CorpusError, IntegrityError, ModelError, SparseKDError
from sparsekd_ray.model import loading
from sparsekd_ray.store import Ref, Store
from sparsekd_ray.teacher import capture, forward, inspect, shards, verify
from sparsekd_ray.teacher.capture import TeacherActor
from sparsekd_ray.teacher.forward import Forward, joined_signals
from sparsekd_ray.teacher.manifest import CacheManifest, read_manifest
from sparsekd_ray.teacher.signal import TopK, topk
from sparsekd_ray.teacher.threshold import column_sizes

KILLS = int(os.environ.get("SPARSEKD_KILLS", "0"))
MANIFEST = cache_manifest(codec="compact")


def shard_rows(count: int, length: int = LENGTH) -> pa.Table:
    return domain_table(
        "prose", "train", np.random.default_rng(1).integers(0, VOCAB, (count, length), np.int32)
    )


def test_every_row_is_there_once_and_says_what_the_teacher_says(captured):
    manifest = read_manifest(captured.fetch(CACHE))
    folder, texts = captured.local(CACHE.key), captured.fetch(TEXTS)
    cached = [shards.read(folder / shards.shard_name(i), manifest, 1.0) for i in range(SHARDS)]
    expected = corpus.read_rows(texts, "train")
    assert [name for rows in cached for name in rows.sample_ids] == expected["sample_id"].to_pylist()
    assert sum(manifest.shard_rows) == len(expected) == SHARDS * SHARD_ROWS - 3
    model = loading.load(captured.fetch(TEACHER))
    with torch.no_grad():
        logits = model(torch.from_numpy(cached[3].tokens(2)).long()[None]).logits[0, :-1]
    live = topk(logits, 8, ())
    assert torch.equal(cached[3].part(2).ids_NK, live.ids_NK)


def alone(store: Store, out: Ref, manifest: CacheManifest) -> TeacherActor:
    """An actor in this process, with the threads that Ray would give it."""
    return TeacherActor(store, TEACHER, TEXTS, out, manifest, False)


def test_one_actor_and_two_give_the_same_bytes(captured):
    out, manifest = Ref("cache", "alone", "cc44"), read_manifest(captured.fetch(CACHE))
    assert alone(captured, out, manifest).shard(SHARDS - 1) == SHARD_ROWS - 3
    name = shards.shard_name(SHARDS - 1)
    assert captured.pull(out, name).read_bytes() == captured.local(f"{CACHE.key}/{name}").read_bytes()


def test_a_sample_meets_its_budget_and_does_not_depend_on_who_draws(captured):
    out, again = Ref("cache", "sampled", "cc55"), Ref("cache", "sampled", "cc66")
    capturing.run(captured, settings=SAMPLED, out=out)
    folder = captured.fetch(out)
    sizes = [sum(column_sizes(path).values()) for path in sorted(folder.glob("*.parquet"))]
    assert len(sizes) == SHARDS
    assert sum(sizes) / ((SHARDS * SHARD_ROWS - 3) * LENGTH) == pytest.approx(
        SAMPLED.bytes_per_token, rel=0.03
    )
    alone(captured, again, read_manifest(folder)).shard(7)
    name = shards.shard_name(7)
    assert captured.pull(again, name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("manifest", [MANIFEST, replace(MANIFEST, signal="sampled", threshold=0.01)])
def test_rows_of_unequal_length_are_as_if_each_length_ran_alone(captured, manifest):
    """Bit for bit, whatever rows of other lengths stand between; and as each row alone, but for the last bits, which
    depend on how many sequences a product of matrices takes at once."""
    lengths = [int(x) for x in np.random.default_rng(3).choice([2, 3, 7, 31, 32, 64], 60)]
    rows, teacher = unequal_rows(lengths), Forward(loading.load(captured.fetch(TEACHER)))
    widths, ask = [], teacher.model.base_model.forward
    teacher.model.base_model.forward = lambda input_ids, **more: (
        widths.append(tuple(input_ids.shape)) or ask(input_ids=input_ids, **more)
    )
    found = teacher.signal(rows, manifest)
    assert [width for _, width in widths] == sorted((width for _, width in widths), reverse=True)
    assert sum(count * width for count, width in widths) == sum(lengths), "nothing is padded"
    first = np.cumsum([0, *(length - 1 for length in lengths)])
    for length in set(lengths):
        places = [row for row, own in enumerate(lengths) if own == length]
        positions = np.concatenate([np.arange(first[row], first[row + 1]) for row in places])
        mine = joined_signals([teacher.signal(rows.take(places), manifest)])
        for column, expected in zip(found, mine, strict=True):
            width = expected.shape[-1]
            assert torch.equal(
                column[positions][..., :width] if column.ndim == 2 else column[positions], expected
            )
    if isinstance(found, TopK):
        alone = joined_signals([teacher.signal(rows.slice(row, 1), manifest) for row in range(len(rows))])
        torch.testing.assert_close(found.logprobs_NK, alone.logprobs_NK)


def in_this_process(todo, arguments, execution):
    """As `capture._stream`, without Ray."""
    actor = TeacherActor(*arguments)
    for index in todo:
        actor.shard(index)
        yield index


@pytest.fixture(scope="module")
def unequal(tmp_path_factory):
    """A store with a cache of a corpus whose rows differ in length."""
    lengths = [int(x) for x in np.random.default_rng(4).integers(2, LENGTH + 1, 2 * SHARD_ROWS + 3)]
    folder = str(tmp_path_factory.mktemp("unequal"))
    store = capturing.prepare(Store(folder), unequal_rows(lengths), seq_len=None)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(capture, "_stream", in_this_process)
        capturing.run(store, settings=capturing.PLAIN)
    return store


def test_a_cache_of_unequal_rows_holds_each_row_and_passes_the_audit(unequal):
    manifest, rows = (
        read_manifest(unequal.fetch(CACHE)),
        corpus.read_rows(unequal.fetch(TEXTS), "train"),
    )
    cached = [shards.read(unequal.fetch(CACHE) / shards.shard_name(i), manifest, 1.0) for i in range(3)]
    ids = [shard.tokens(row).tolist() for shard in cached for row in range(len(shard.sample_ids))]
    assert ids == rows["input_ids"].to_pylist()
    assert manifest.seq_len is None and manifest.tokens == sum(map(len, ids))
    teacher = Forward(loading.load(unequal.fetch(TEACHER)))
    assert torch.equal(
        cached[1].part(2).ids_NK, teacher.signal(rows.slice(SHARD_ROWS + 2, 1), manifest).ids_NK
    )
    measured = verify.verify(unequal, CACHE, sequences=9, seed=0)
    assert measured["rows"] == len(rows) and measured["positions"] < 9 * LENGTH
    assert inspect.sequence(unequal, CACHE, "prose-train-000005", 2.0, top=3).row_count == len(ids[5]) - 1
    assert inspect.statistics(unequal, CACHE)["bytes_per_token"] > 0
    with pytest.raises(ConfigError, match="unequal length"):
        SampleReader(unequal, CACHE, 2.0)


@pytest.mark.parametrize("codec", ["plain", "compact"])
def test_a_row_that_lost_its_end_is_found(unequal, codec):
    """With the positions that belong to it: every count inside the file is right."""
    out = Ref("cache", f"short-{codec}", "cc88")
    manifest = replace(read_manifest(unequal.fetch(CACHE)), codec=codec)
    teacher = Forward(loading.load(unequal.fetch(TEACHER)))
    with unequal.building(out) as folder:
        for index, count in enumerate(manifest.shard_rows):
            rows = corpus.read_shard(unequal.fetch(TEXTS) / "train" / shards.shard_name(index))
            ids = rows["input_ids"].to_pylist()
            ids[count - 1] = ids[count - 1][: -1 if index == 1 else None]
            rows = rows.set_column(2, rows.schema.field(2), pa.array(ids, pa.list_(pa.int32())))
            shards.write(folder / shards.shard_name(index), rows, teacher.signal(rows, manifest), manifest)
        manifest.write(folder)
    unequal.commit(out, identity={}, inputs=capturing.PARENTS, metrics={}, seconds=0)
    with pytest.raises(IntegrityError, match=r"00001\.parquet: its lengths"):
        verify.verify(unequal, out, sequences=4, seed=0)


@pytest.mark.skipif(
    "SPARSEKD_NODES" not in os.environ, reason="starts a cluster of its own, 25 s: SPARSEKD_NODES=1"
)
def test_nodes_with_different_cards_share_one_queue(captured, tmp_path):
    """Two Ray nodes on this machine, labelled as two kinds of cards, whose actors compute on its CPU: it shows the
    queue and the bytes, not how unequal GPUs share the work."""
    store, notes = capturing.prepare(Store(str(tmp_path / "store"))), tmp_path / "notes"
    notes.mkdir()
    done = subprocess.run(
        [sys.executable, "tests/support/two_nodes.py", store.root, str(notes)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = [path.read_text() for path in notes.iterdir()]
    assert len(made) == SHARDS and set(made) == set(two_nodes.CARDS)
    assert capturing.content(store) == capturing.content(captured)


@pytest.mark.skipif(KILLS == 0, reason="takes minutes: SPARSEKD_KILLS=50")
@pytest.mark.timeout(120 + 60 * KILLS)
def test_killed_at_any_moment_the_cache_is_the_same(captured, tmp_path):
    """SIGKILL of a teacher actor, or of the driver with all it started, at seeded moments of live captures."""
    moments, kills, attempt = random.Random(0), 0, 0
    while kills < KILLS:
        store = capturing.prepare(Store(str(tmp_path / f"store-{attempt}")))
        kills += killed_until_it_ends(store, moments, KILLS - kills)
        assert capturing.content(store) == capturing.content(captured)
        attempt += 1


def killed_until_it_ends(store: Store, moments: random.Random, at_most: int) -> int:
    kills, finished = 0, dict[str, int]()
    while True:
        driver = subprocess.Popen(
            [sys.executable, "tests/support/capturing.py", store.root, str(moments.choice((1, 2)))],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        wanted = len(finished) + moments.choice(
            (0, 0, 1, 4, 9)
        )  # half of the kills hit actors that are starting
        while driver.poll() is None and kills < at_most:
            actors = [p for p in processes(driver) if "TeacherActor" in name(p)]
            if not actors or len(dates(store)) < min(wanted, SHARDS):
                time.sleep(0.02)
                continue
            time.sleep(moments.uniform(0, 0.3) if wanted else moments.uniform(0, 3))
            if driver.poll() is not None:
                break
            whole = moments.random() < 0.5
            for process in (
                [psutil.Process(driver.pid), *processes(driver)] if whole else [moments.choice(actors)]
            ):
                kill(process)
            kills += 1
            assert finished.items() <= dates(store).items(), "a finished shard was made twice"
            finished = dates(store)
            print(f"kill {kills}: {'driver' if whole else 'an actor'} at {len(finished)} of {SHARDS} shards")
            if whole:
                break
            wanted = len(finished) + moments.choice((1, 2))
        output, _ = driver.communicate(timeout=300)
        if driver.returncode == 0:
            assert finished.items() <= dates(store).items(), "a finished shard was made twice"
            return kills
        assert driver.returncode == -9, output


def dates(store: Store) -> dict[str, int]:
    """When each finished shard was written."""
    done = store.record(CACHE).files if store.record(CACHE) else store.published(CACHE)
    paths = [store.local(f"{CACHE.key}/{name}") for name in done if name.endswith(".parquet")]
    return {path.name: path.stat().st_mtime_ns for path in paths}


def processes(driver: subprocess.Popen) -> list[psutil.Process]:
    try:
        return psutil.Process(driver.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()


@pytest.mark.timeout(300)
def test_a_thousand_changed_bytes_are_each_refused(captured):
    """One byte of one file, anywhere in shards, manifest and record: reading says which file, and nothing is used."""
    folder, moments = Path(captured.root) / CACHE.key, random.Random(0)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    assert {"manifest.json", "record.json", "00000.parquet"} <= {path.name for path in files}
    for _ in range(1000):
        path = moments.choice(files)
        intact = path.read_bytes()
        place = moments.randrange(len(intact))
        if path.name == "record.json" and intact[place : place + 1].isspace():
            place = intact.index(b'"')  # layout is not content
        changed = bytearray(intact)
        changed[place] ^= moments.randrange(1, 256)
        path.write_bytes(changed)
        with pytest.raises(SparseKDError) as refused:
            read_all(captured)
        assert path.name in str(refused.value)
        path.write_bytes(intact)
    read_all(captured)


def read_all(store: Store) -> None:
    folder = store.fetch(CACHE)
    manifest = read_manifest(folder)
    for index in range(len(manifest.shard_rows)):
        shards.read(folder / shards.shard_name(index), manifest, 2.0)


def test_a_machine_downloads_the_teacher_once(captured, s3_server, tmp_path, monkeypatch):
    store = capturing.prepare(Store(f"s3://{s3_server.bucket}/once", str(tmp_path / "first")))
    machine, downloaded = Store(store.root, str(tmp_path / "second")), []
    download = Store.download
    monkeypatch.setattr(Store, "download", lambda self, key: downloaded.append(key) or download(self, key))
    for _ in range(2):
        alone(machine, CACHE, read_manifest(captured.fetch(CACHE))).shard(0)
    assert sorted(key for key in downloaded if TEACHER.key in key) == [
        f"{TEACHER.key}/{name}" for name in sorted(store.record(TEACHER).files)
    ]


# what a capture refuses


def test_probabilities_that_are_no_numbers_name_the_sample(captured):
    model = loading.load(captured.fetch(TEACHER))
    model.model.embed_tokens.weight.data[77] = float("nan")
    rows = np.full((20, LENGTH), 5, np.int32)
    rows[17, 3] = 77
    with pytest.raises(ModelError, match="prose-train-000017"):
        Forward(model).signal(domain_table("prose", "train", rows), MANIFEST)
    sampling = replace(MANIFEST, signal="sampled", threshold=0.1)
    with pytest.raises(ModelError, match="prose-train-000017"):
        Forward(model).signal(domain_table("prose", "train", rows), sampling)


def test_a_card_that_is_too_small_takes_fewer_sequences(captured, monkeypatch):
    model = loading.load(captured.fetch(TEACHER))
    whole = Forward(model)
    expected, ask = whole.signal(shard_rows(20), MANIFEST), model.base_model.forward

    def small(input_ids, **more):
        if len(input_ids) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return ask(input_ids=input_ids, **more)

    monkeypatch.setattr(model.base_model, "forward", small)
    halved = Forward(model)
    with recorded() as lines:
        found = halved.signal(shard_rows(20), MANIFEST)
    assert len(lines) == 3 and lines[-1].startswith(
        "warning: cpu is out of memory: the teacher reads at most 2"
    )
    assert (whole.sequences, halved.sequences) == (forward.SEQUENCES["cpu"], 2)
    assert torch.equal(found.ids_NK, expected.ids_NK)
    torch.testing.assert_close(found.logprobs_NK, expected.logprobs_NK)
    monkeypatch.setattr(model.base_model, "forward", lambda **more: small(range(9)))
    with pytest.raises(ModelError, match="one sequence of this teacher, or 512 positions"):
        halved.signal(shard_rows(1), MANIFEST)


def test_a_row_without_a_prediction_is_refused(captured):
    teacher = Forward(loading.load(captured.fetch(TEACHER)))
    with pytest.raises(CorpusError, match="sample prose-train-000002 has 1 tokens"):
        teacher.signal(unequal_rows([4, 3, 1, 5]), MANIFEST)


@pytest.mark.parametrize(
    "seq_len, told", [(LENGTH, f"000001 has 9 tokens.*all have {LENGTH}"), (None, "000003 has 1")]
)
def test_rows_that_are_not_as_long_as_the_corpus_says_are_refused_before_any_work(tmp_path, seq_len, told):
    lengths = [LENGTH, 9, LENGTH, 1 if seq_len is None else LENGTH]
    store = capturing.prepare(Store(str(tmp_path)), unequal_rows(lengths), seq_len)
    with pytest.raises(CorpusError, match=told):
        capturing.run(store)


def test_a_sample_id_that_occurs_twice_is_refused_before_any_work(tmp_path):
    store = capturing.prepare(Store(str(tmp_path)), pa.concat_tables([shard_rows(9), shard_rows(4)]))
    with pytest.raises(CorpusError, match="prose-train-000000 occurs more than once"):
        capturing.run(store)


def test_an_actors_error_arrives_as_it_was_raised(cluster, tmp_path):
    """Through Ray Data: one clear message, with the sample's name, and no traceback of Ray's around it."""
    store = capturing.prepare(Store(str(tmp_path)))
    weights = tmp_path / TEACHER.key / "model.safetensors"
    broken = load_file(weights)
    broken["model.embed_tokens.weight"][:] = float("nan")
    save_file(broken, weights, {"format": "pt"})
    (tmp_path / TEACHER.key / "record.json").unlink()
    store.commit(TEACHER, identity={}, inputs={}, metrics={}, seconds=0)
    with pytest.raises(ModelError, match=r"prose-train-\d+ .*NaN or infinite"):
        unwrapped(lambda: capturing.run(store))


def test_k_of_a_whole_vocabulary_is_refused(captured):
    settings = capturing.TOPK.model_copy(update={"k": VOCAB})
    with pytest.raises(ConfigError, match=f"k is {VOCAB}, the vocabulary has {VOCAB}"):
        capturing.run(captured, settings=settings, out=Ref("cache", "k", "cc77"))


def test_a_teacher_that_changes_between_shards_is_refused(captured, tmp_path):
    store = capturing.prepare(Store(str(tmp_path)))
    actor = alone(store, CACHE, read_manifest(captured.fetch(CACHE)))
    actor.shard(0)
    config = tmp_path / TEACHER.key / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rope_theta": 5.0}))
    with pytest.raises(IntegrityError, match=r"config\.json"):
        actor.shard(1)


def test_a_shard_that_cannot_be_read_is_named(captured, tmp_path):
    store = capturing.prepare(Store(str(tmp_path)))
    path = tmp_path / TEXTS.key / "train" / "00004.parquet"
    path.write_bytes(path.read_bytes()[:100])
    actor = alone(store, CACHE, read_manifest(captured.fetch(CACHE)))
    with pytest.raises(IntegrityError, match=r"00004\.parquet"):
        actor.shard(4)
