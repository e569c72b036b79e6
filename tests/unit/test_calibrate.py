"""The calibrate stage: equal bytes however the layers are shared out, resumption, and what it refuses."""

import hashlib
import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import capturing
import numpy as np
import pytest
import torch
import transformers
from capturing import TEACHER, TEXTS
from lines import recorded

from sparsekd_ray import corpus
from sparsekd_ray.config import Calibrate
from sparsekd_ray.corpus.shards import domain_table
from sparsekd_ray.errors import ConfigError, CorpusError, IntegrityError, ModelError
from sparsekd_ray.model import loading
from sparsekd_ray.prune import calibrate, statistics
from sparsekd_ray.runtime.tasks import map_local
from sparsekd_ray.store import Ref, Store, dtype

torch.set_num_threads(1)

QWEN = Ref("dense", "qwen", "ee55")
SETTINGS = Calibrate(samples=20, seed=3)
LAYERS = 5
SIZES: dict[str, Any] = {"vocab_size": capturing.VOCAB, "hidden_size": 32, "num_hidden_layers": LAYERS}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The corpus and the two-layer Phi-3 of `capturing`, and a Qwen3 of five layers."""
    store = capturing.prepare(Store(str(tmp_path_factory.mktemp("calibrated"))))
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = transformers.Qwen3Config(**SIZES, **heads, intermediate_size=48, initializer_range=0.2)
    torch.manual_seed(1)
    with store.building(QWEN) as out:
        transformers.Qwen3ForCausalLM(config).save_pretrained(out)
    store.commit(QWEN, identity={}, inputs={}, metrics={}, seconds=0)
    return store


def run(store: Store, out: Ref, model: Ref = QWEN, groups: int = 1, **more: Any) -> list[str]:
    """Runs the stage up to its record; returns what it said."""
    arguments = {"settings": SETTINGS, "task_map": map_local, "gpu": False} | more
    with recorded() as said:
        metrics = calibrate.calibrate(model, TEXTS, out, groups=groups, store=store, **arguments)
    store.commit(out, identity={}, inputs={}, metrics=metrics, seconds=0)
    return said


def content(store: Store, out: Ref) -> dict[str, str]:
    folder = store.fetch(out)
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.iterdir()
        if p.name != "record.json"
    }


@pytest.fixture(scope="module")
def measured(store: Store) -> Ref:
    out = Ref("statistics", "whole", "a0")
    run(store, out)
    return out


def pickled(function: Callable[..., Any], pieces: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
    """In the opposite order, everything through a pickle, as if in other processes."""
    for index in reversed(range(len(pieces))):
        work, arguments = pickle.loads(pickle.dumps((function, pieces[index])))
        yield index, work(*arguments)


@pytest.mark.parametrize("groups", [2, 3, 9])
def test_files_are_the_same_bytes_however_layers_are_shared_out(
    store: Store, measured: Ref, groups: int
) -> None:
    out = Ref("statistics", "shared", f"a{groups}")
    run(store, out, groups=groups, task_map=pickled)
    assert content(store, out) == content(store, measured)


def test_large_layers_are_shared_out_further(
    store: Store, measured: Ref, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "TASK_BYTES", 2 * 4 * (32**2 + 48**2))
    pieces: list[Any] = []

    def spy(function: Callable[..., Any], todo: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        pieces.extend(arguments[-1] for arguments in todo)
        return map_local(function, todo)

    out = Ref("statistics", "large", "aa")
    run(store, out, task_map=spy)
    assert pieces == [[], [0, 1], [2, 3], [4]]
    assert content(store, out) == content(store, measured)


@pytest.mark.parametrize("groups", [1, 2, 5, 8])
def test_parts_are_consecutive_and_nearly_equal(groups: int) -> None:
    layers = [3, 4, 6, 7, 9, 11]
    parts = calibrate.partition(layers, groups, 1)
    assert [index for part in parts for index in part] == layers and len(parts) == min(groups, len(layers))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert calibrate.partition([], groups, 1) == []
    assert calibrate.partition(layers, 1, 5 * 2**30) == [[layer] for layer in layers]


@pytest.mark.parametrize("model", [TEACHER, QWEN])
def test_artifact_holds_the_statistics_of_the_sampled_rows(store: Store, model: Ref) -> None:
    out = Ref("statistics", "content", model.fingerprint)
    said = run(store, out, model, groups=2)
    folder = store.fetch(out)
    manifest = calibrate.read(folder)
    rows = corpus.read_rows(store.fetch(TEXTS), "train")
    chosen = sorted(np.random.default_rng(3).choice(len(rows), 20, replace=False).tolist())
    ids_BL = torch.tensor(rows.take(chosen)["input_ids"].to_pylist())
    loaded = loading.load(store.fetch(model))
    layers = loaded.config.num_hidden_layers
    expected = statistics.collect(loaded, ids_BL, range(layers))
    for index in range(layers):
        found = calibrate.layer(folder, index)
        assert found.keys() == expected[index].keys()
        assert all(torch.equal(value, expected[index][name]) for name, value in found.items())
    for name, value in statistics.stack(loaded, ids_BL).items():
        assert torch.equal(calibrate.stack(folder)[name], value)
    names = "\n".join(rows["sample_id"].take(chosen).to_pylist())
    assert manifest == {
        "model": model.fingerprint,
        "corpus": TEXTS.fingerprint,
        "family": loaded.config.model_type,
        "hidden": loaded.config.hidden_size,
        "inner": loaded.config.intermediate_size,
        "layers": layers,
        "sequences": 20,
        "tokens": 20 * capturing.LENGTH,
        "samples_sha256": hashlib.sha256(names.encode()).hexdigest(),
        "seed": 3,
        "dtype": "float32",
    }
    record = store.record(out)
    assert record is not None
    assert record.metrics == {"tokens": 1280, "sequences": 20, "layers": layers}
    assert said[-1] == f"{layers}/{layers} layers measured"


def test_seed_and_samples_decide_which_rows(store: Store) -> None:
    def drawn(**changes: int) -> list[str]:
        table = calibrate.sample(store, TEXTS, SETTINGS.model_copy(update=changes))
        return table["sample_id"].to_pylist()

    assert drawn() == drawn() == sorted(set(drawn())) != drawn(seed=4)
    everything = corpus.read_rows(store.fetch(TEXTS), "train")["sample_id"].to_pylist()
    assert drawn(samples=len(everything)) == everything


@pytest.mark.parametrize("pieces_done", [0, 1, 2, 3])
def test_a_killed_calibration_measures_only_what_is_missing(
    store: Store, measured: Ref, pieces_done: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Ref("statistics", "killed", f"b{pieces_done}")

    def dying(function: Callable[..., Any], pieces: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        yield from map_local(function, pieces[:pieces_done])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(store, out, groups=3, task_map=dying)
    published = store.published(out)
    asked: list[int] = []
    honest = statistics.collect

    def spy(model: Any, ids_BL: torch.Tensor, layers: Sequence[int]) -> Any:
        asked.extend(layers)
        return honest(model, ids_BL, layers)

    monkeypatch.setattr(statistics, "collect", spy)
    said = run(store, out, groups=2)
    assert asked == [i for i in range(LAYERS) if calibrate.layer_name(i) not in published]
    assert len(asked) == [5, 5, 3, 1][pieces_done]
    assert any("are measured already" in line for line in said) == (pieces_done > 0)
    assert content(store, out) == content(store, measured)


def test_a_calibration_goes_on_in_the_dtype_that_it_was_begun_in(store: Store) -> None:
    out = Ref("statistics", "moved", "bf")

    def dying(function: Callable[..., Any], pieces: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        yield from map_local(function, pieces[:1])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(store, out, groups=3, task_map=dying)
    with pytest.raises(
        ConfigError, match=r"moved-bf was begun in float32 .* Go on with execution\.gpus false"
    ):
        run(store, out, gpu=True)
    run(store, out)
    assert not [name for name in content(store, out) if "dtype" in name]


def test_a_capture_goes_on_in_the_dtype_that_it_was_begun_in(store: Store) -> None:
    out = Ref("cache", "moved", "bf")
    for first in ("float32", "bfloat16"):  # no file was published in the first
        dtype.require_one_dtype(store, out, first)
    with store.publishing(out, "shard-00000.parquet") as path:
        path.write_bytes(b"rows")
    with pytest.raises(ConfigError, match=r"begun in bfloat16 .* Go on with execution\.gpus true"):
        capturing.run(store, out=out)


def test_a_piece_runs_on_one_thread_whatever_the_process_had(
    store: Store, measured: Ref, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, threads, honest = Ref("statistics", "threads", "bb"), [], statistics.collect

    def spy(*arguments: Any) -> Any:
        threads.append(torch.get_num_threads())
        return honest(*arguments)

    monkeypatch.setattr(statistics, "collect", spy)
    torch.set_num_threads(2)
    run(store, out)
    torch.set_num_threads(1)
    assert threads == [1] and content(store, out) == content(store, measured)


def test_a_piece_asked_for_again_publishes_only_the_missing(
    store: Store, measured: Ref, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Ref("statistics", "again", "ba")
    honest, published = Store.publish, []

    def dying(self: Store, ref: Ref, relative: str) -> Any:
        if len(published) == 2:
            raise KeyboardInterrupt
        published.append(relative)
        return honest(self, ref, relative)

    monkeypatch.setattr(Store, "publish", dying)
    with pytest.raises(KeyboardInterrupt):
        calibrate.measure(store, QWEN, TEXTS, out, SETTINGS, False, [0, 1, 2])
    monkeypatch.undo()
    times = {name: (store.workdir(out) / name).stat().st_mtime_ns for name in published}
    for _ in range(2):
        calibrate.measure(store, QWEN, TEXTS, out, SETTINGS, False, [0, 1, 2])
        calibrate.measure(store, QWEN, TEXTS, out, SETTINGS, False, [])
    assert store.published(out) == [*map(calibrate.layer_name, range(3)), "stack.safetensors"]
    assert all((store.workdir(out) / name).stat().st_mtime_ns == time for name, time in times.items())
    whole = content(store, measured)
    for name in store.published(out):
        assert hashlib.sha256((store.workdir(out) / name).read_bytes()).hexdigest() == whole[name]


# what is refused


def test_fewer_rows_than_samples(store: Store) -> None:
    with pytest.raises(CorpusError, match=r"samples is 190, the corpus has 189 training sequences"):
        run(store, Ref("statistics", "rows", "c0"), settings=Calibrate(samples=190))


def test_too_few_tokens_are_refused_and_few_are_warned_of(store: Store) -> None:
    with pytest.raises(ConfigError, match=r"3 × 64 tokens = 192 tokens.* 256 inputs.*samples to 16 or more"):
        run(store, Ref("statistics", "few", "c1"), TEACHER, settings=Calibrate(samples=3))
    said = run(store, Ref("statistics", "some", "c2"), TEACHER, settings=Calibrate(samples=15))
    assert [line for line in said if "warning" in line and "960 tokens" in line and "16 or more" in line]
    said = run(store, Ref("statistics", "enough", "c3"), TEACHER, settings=Calibrate(samples=16))
    assert not any("warning" in line for line in said)


def spoilt(store: Store, ref: Ref, change: Callable[[Any, Path], None]) -> Ref:
    model = loading.load(store.fetch(QWEN))
    with store.building(ref) as out:
        model.save_pretrained(out)
        change(model, out)
    store.commit(ref, identity={}, inputs={}, metrics={}, seconds=0)
    return ref


def test_weights_that_are_not_finite_are_named(store: Store) -> None:
    def spoil(model: Any, out: Path) -> None:
        model.model.layers[3].mlp.up_proj.weight.data[1, 2] = torch.nan
        model.save_pretrained(out)

    model = spoilt(store, Ref("dense", "nan", "d0"), spoil)
    with pytest.raises(ModelError, match=r"layers\.3\.mlp\.up_proj\.weight holds NaN"):
        run(store, Ref("statistics", "nan", "c4"), model)


def test_activations_that_are_not_finite_are_named(store: Store) -> None:
    def spoil(model: Any, out: Path) -> None:
        model.model.layers[2].mlp.down_proj.weight.data.fill_(3e38)
        model.save_pretrained(out)

    out = Ref("statistics", "inf", "c5")
    model = spoilt(store, Ref("dense", "inf", "d1"), spoil)
    with pytest.raises(ModelError, match="the residual stream around layer 2 is NaN or infinite"):
        run(store, out, model)
    with pytest.raises(ModelError, match=r"layer 3: input\.gram is NaN or infinite"):
        calibrate.measure(store, model, TEXTS, out, SETTINGS, False, [1, 2, 3])
    assert store.published(out) == [dtype.FILE]


def test_models_that_are_not_supported(store: Store) -> None:
    def rename(model: Any, out: Path) -> None:
        values = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(values | {"num_experts": 4}))

    model = spoilt(store, Ref("dense", "experts", "d2"), rename)
    with pytest.raises(ModelError, match="mixture of experts"):
        run(store, Ref("statistics", "experts", "c6"), model)


def test_statistics_of_another_model(store: Store, measured: Ref) -> None:
    manifest = calibrate.read(store.fetch(measured))
    calibrate.check(manifest, QWEN.fingerprint)
    with pytest.raises(ModelError, match=r"are of the model ee55, not of aa11.*calibrate this model"):
        calibrate.check(manifest, TEACHER.fingerprint)


def test_pieces_that_vanish_are_missed(store: Store) -> None:
    def losing(function: Callable[..., Any], pieces: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        return map_local(function, pieces[:-1])

    with pytest.raises(IntegrityError, match=r"without 2 files, the first is layer-003\.safetensors"):
        run(store, Ref("statistics", "lost", "c7"), groups=2, task_map=losing)


def test_a_damaged_published_layer_is_not_committed(store: Store) -> None:
    out = Ref("statistics", "damaged", "c8")
    calibrate.measure(store, QWEN, TEXTS, out, SETTINGS, False, [1])
    file = store.workdir(out) / calibrate.layer_name(1)
    file.write_bytes(file.read_bytes()[:-4] + b"\1\2\3\4")
    with pytest.raises(IntegrityError, match=r"layer-001\.safetensors is not what was stored"):
        run(store, out)


def test_sequences_of_unequal_length(tmp_path: Path) -> None:
    store = capturing.prepare(Store(str(tmp_path)))
    folder = store.fetch(TEXTS) / "train"
    rows = np.zeros((2, capturing.LENGTH - 1), dtype=np.int32)
    (folder / "00023.parquet").unlink()
    corpus.shards.write_shards(domain_table("other", "train", rows), tmp_path / "other", 2)
    (tmp_path / "other" / "00000.parquet").rename(folder / "00023.parquet")
    store.delete(f"{TEXTS.key}/record.json")
    store.commit(TEXTS, identity={}, inputs={}, metrics={}, seconds=0)
    with pytest.raises(CorpusError, match="sample other-train-000000 has 63 tokens"):
        run(store, Ref("statistics", "unequal", "c9"), TEACHER, settings=Calibrate(samples=186))
