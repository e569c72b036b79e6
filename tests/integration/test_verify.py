"""A cache under audit: right ones pass, and what checksums cannot see is found."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import capturing
import pyarrow as pa
import pytest
import torch
from capturing import CACHE, PARENTS, TEACHER, TEXTS

from sparsekd_ray import corpus
from sparsekd_ray.errors import ConfigError, IntegrityError, ModelError
from sparsekd_ray.model import loading
from sparsekd_ray.store import Ref, Store, locate
from sparsekd_ray.teacher import inspect, shards
from sparsekd_ray.teacher import verify as verification
from sparsekd_ray.teacher.forward import Forward
from sparsekd_ray.teacher.manifest import read_manifest

ROOT = Path(__file__).parents[2]
FORMS = {
    "plain": {"signal": "topk", "codec": "plain"},
    "compact": {"signal": "topk", "codec": "compact"},
    "sampled": {"signal": "sampled", "codec": "plain", "threshold": 0.006},
    "sampled compact": {"signal": "sampled", "codec": "compact", "threshold": 0.006},
}


def made(store: Store, name: str, form: str, change=lambda rows, signal: (rows, signal)) -> Ref:
    """A committed cache made in this process, its rows or signal changed on the way; every checksum is right."""
    ref = Ref("cache", name, "ee11")
    manifest = replace(read_manifest(store.fetch(CACHE)), **FORMS[form])
    forward = Forward(loading.load(store.fetch(TEACHER)))
    with store.building(ref) as out:
        for index in range(len(manifest.shard_rows)):
            rows = corpus.read_shard(store.fetch(TEXTS) / "train" / shards.shard_name(index))
            rows, signal = change(rows, forward.signal(rows, manifest))
            shards.write(out / shards.shard_name(index), rows, signal, manifest)
        manifest.write(out)
    store.commit(ref, identity={}, inputs=PARENTS, metrics={}, seconds=0)
    return ref


def verify(store: Store, ref: Ref) -> dict:
    return verification.verify(store, ref, sequences=12, seed=1)


@pytest.mark.parametrize("form", FORMS)
def test_a_right_cache_passes(captured, form):
    measured = verify(captured, made(captured, f"right-{form.replace(' ', '-')}", form))
    assert measured["positions"] == 12 * (capturing.LENGTH - 1)
    assert measured["noise"] < 1e-4 and measured["allowed"] < 0.03


def test_one_made_by_actors_passes_as_well(captured):
    assert verify(captured, CACHE)["rows"] == capturing.SHARDS * capturing.SHARD_ROWS - 3


def swapped(rows, signal):
    """Another sequence's probabilities."""
    return rows, type(signal)(*(column.flip(0) for column in signal))


def sharper(rows, signal):
    """The probabilities of another temperature."""
    return rows, signal._replace(log_z_NT=signal.log_z_NT - 0.2)


def placeholder(rows, signal):
    """Every sequence the same: what the paper's 95 % were."""
    first = rows["input_ids"][0].as_py()
    column = rows.schema.get_field_index("input_ids")
    same = pa.array([first] * len(rows), rows.schema.field(column).type)
    return rows.set_column(column, rows.schema.field(column), same), signal


def renamed(rows, signal):
    names = rows["sample_id"].to_pylist()
    return rows.set_column(0, "sample_id", [[*names[1:], names[0]]]), signal


def shortened(rows, signal):
    return rows.slice(0, len(rows) - 1), type(signal)(
        *(column[: -(capturing.LENGTH - 1)] for column in signal)
    )


@pytest.mark.parametrize("form", ["plain", "compact"])
@pytest.mark.parametrize(
    "change, found",
    [
        (swapped, "not hold the probabilities of its teacher"),
        (sharper, "not hold the probabilities of its teacher|probabilities|sums"),
        (placeholder, r"00000\.parquet: its input ids"),
        (renamed, r"00000\.parquet: its sample ids"),
        (shortened, r"00000\.parquet"),
    ],
)
def test_what_checksums_cannot_see_is_found(captured, form, change, found):
    ref = made(captured, f"{change.__name__}-{form}", form, change)
    with pytest.raises((IntegrityError, ModelError), match=found):
        verify(captured, ref)


def lighter(rows, signal):
    return rows, signal._replace(logprobs_NK=signal.logprobs_NK - 2)


def foreign(rows, signal):
    """Other exact ids, which the teacher hardly thinks of."""
    exact_NK = torch.arange(signal.ids_NK.shape[1]) < signal.exact_N[:, None]
    ids_NK = torch.where(exact_NK, (signal.ids_NK + 211) % capturing.VOCAB, signal.ids_NK)
    return rows, signal._replace(ids_NK=ids_NK)


def bare(rows, signal):
    """No exact ids at all."""
    order_NK = (torch.arange(signal.ids_NK.shape[1]) + signal.exact_N[:, None]) % signal.ids_NK.shape[1]
    return rows, signal._replace(
        ids_NK=signal.ids_NK.gather(1, order_NK), exact_N=torch.zeros_like(signal.exact_N)
    )


@pytest.mark.parametrize("form", ["sampled", "sampled compact"])
@pytest.mark.parametrize("change", [swapped, lighter, foreign, bare])
def test_a_wrong_sample_is_found(captured, form, change):
    ref = made(captured, f"{change.__name__}-{form.replace(' ', '-')}", form, change)
    with pytest.raises(IntegrityError, match=r"not hold the probabilities of its teacher|00000\.parquet"):
        verify(captured, ref)


# for people


def test_show_lists_the_likeliest_and_the_tail(captured):
    sample = "prose-train-000005"
    table = inspect.sequence(captured, CACHE, sample, 2.0, top=3)
    manifest = read_manifest(captured.fetch(CACHE))
    rows = next(r for _, r in inspect.all_rows(captured, CACHE, 2.0) if sample in r.sample_ids)
    part, cells = rows.part(rows.sample_ids.index(sample)), [list(column.cells) for column in table.columns]
    assert table.row_count == manifest.seq_len - 1
    assert cells[4][7].count("w") == 3 and cells[4][7].startswith(f"w{int(part.ids_NK[7, 0])} ")
    assert cells[5][7] == f"{float(part.tail_N[7]):.1%}"
    with pytest.raises(ConfigError, match="no sample 'nothing'; it holds prose-train-"):
        inspect.sequence(captured, CACHE, "nothing", None, top=3)


def test_show_of_a_sample_says_that_it_estimates(captured):
    """An id that was not drawn has an estimate of 0, which is not the same as one that top-k left out."""
    ref = made(captured, "shown", "sampled")
    table = inspect.sequence(captured, ref, "prose-train-000005", None, top=3)
    rows = next(r for _, r in inspect.all_rows(captured, ref) if "prose-train-000005" in r.sample_ids)
    part, ids = rows.part(rows.sample_ids.index("prose-train-000005")), rows.tokens(5)
    header, cells = [column.header for column in table.columns], [list(c.cells) for c in table.columns]
    assert header == ["", "token", "next", "estimate of p(next)", "the 3 largest estimates"]
    for position, cell in enumerate(cells[3]):
        drawn = bool(
            (part.ids_NK[position, : (part.logprobs_NK[position] > -99).sum()] == ids[position + 1]).any()
        )
        assert (cell == "0, not drawn") == (not drawn)
    assert "0, not drawn" in cells[3] and any("%" in cell for cell in cells[3])
    exact = inspect.sequence(captured, CACHE, "prose-train-000005", None, top=3)
    assert "in the tail" in list(exact.columns[3].cells) and "tail" in [c.header for c in exact.columns]


def test_statistics_are_those_of_the_rows(captured):
    figures = inspect.statistics(captured, CACHE)
    targets = [rows.target for _, rows in inspect.all_rows(captured, CACHE, 2.0)]
    mass = torch.cat([target.logprobs_NK.exp().sum(-1) for target in targets])
    assert figures["temperatures"]["2.0"]["prose"]["kept_mass"] == pytest.approx(float(mass.double().mean()))
    size = sum(f.size for n, f in captured.record(CACHE).files.items() if n.endswith(".parquet"))
    assert figures["bytes_per_token"] == pytest.approx(size / (len(mass) / 63 * 64))
    assert sum(figures["columns"].values()) < figures["bytes_per_token"]


def test_the_commands(captured, tmp_path):
    cache = f"{captured.root}/{CACHE.key}"
    drawing = tmp_path / "stats.png"
    for arguments, expected in [
        (["verify", cache, "--sequences", "2"], "RESULT {"),
        (["stats", cache, "--plot", str(drawing)], "bytes per token"),
        (["show", cache, "prose-train-000000", "--top", "2"], "next"),
    ]:
        done = subprocess.run(
            [sys.executable, "jobs/cache.py", *arguments], cwd=ROOT, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "") and expected in done.stdout
    assert drawing.read_bytes().startswith(b"\x89PNG")
    done = subprocess.run(
        [sys.executable, "jobs/cache.py", "verify", "x"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error:") and "artifacts/<kind>" in done.stderr


@pytest.mark.parametrize("where", ["artifacts/cache/top8-cc33", "/a/b/artifacts/cache/top-8.x-cc33/"])
def test_an_artifact_is_located_by_its_path(where):
    store, ref = locate(where)
    assert (
        ref.kind == "cache"
        and ref.fingerprint == "cc33"
        and f"{store.root}/{ref.key}".endswith(where.strip("/"))
    )
