"""Live figures: a file that grows, what a resumed run makes of it, and trackers that follow."""

import importlib.machinery
import json
import logging
import pickle
import queue
import struct
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest
from lines import recorded

from sparsekd_ray.config import Execution
from sparsekd_ray.errors import ConfigError
from sparsekd_ray.runtime import metrics, trackers
from sparsekd_ray.runtime.logging import forwarding
from sparsekd_ray.store import Store

KEY = "runs/tiny/metrics.jsonl"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def rows(store: Store) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (store.read_text(KEY) or "").splitlines()]


def train(stage: str, steps: range) -> None:
    for step in steps:
        metrics.log(stage, metrics.TRAINING, step=step, kl=1 / (step + 1))


def test_the_file_grows_while_the_run_runs(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "SECONDS_BETWEEN_WRITES", 0.02)
    with metrics.recording(store, KEY):
        for step in range(3):
            train("round 1", range(step, step + 1))
            waited = time.monotonic()
            while len(rows(store)) < step + 1 and time.monotonic() < waited + 10:
                time.sleep(0.01)
            assert [row["step"] for row in rows(store)] == list(range(step + 1))
    assert rows(store)[-1]["kl"] == pytest.approx(1 / 3) and "time" in rows(store)[-1]


def test_what_came_last_is_written_at_the_end(store: Store) -> None:
    with pytest.raises(KeyboardInterrupt), metrics.recording(store, KEY):
        train("round 1", range(4))
        raise KeyboardInterrupt
    assert len(rows(store)) == 4
    train("round 1", range(9))
    assert len(rows(store)) == 4, "nobody records any more"


def test_a_resumed_run_continues_the_file(store: Store) -> None:
    with metrics.recording(store, KEY):
        train("round 1", range(8))
        metrics.log("round 1", "distill", seconds=3.0)
        train("round 2", range(6))
    with metrics.recording(store, KEY):
        train("round 2", range(4, 8))  # from the checkpoint at step 4
    steps = [(row["stage"], row.get("step")) for row in rows(store)]
    expected = [("round 1", step) for step in range(8)] + [("round 1", None)]
    assert steps == expected + [("round 2", step) for step in range(8)]


def test_a_finished_stage_has_one_row(store: Store) -> None:
    seen: list[metrics.Row] = []
    for _ in range(2):
        with metrics.recording(store, KEY, seen.append):
            metrics.log("dense", "evaluate", time="then", metrics={"paper": {"ppl": 3.5}})
    assert len(rows(store)) == 1 and len(seen) == 1, "a tracker gets nothing twice either"
    with metrics.recording(store, KEY):
        metrics.log("dense", "evaluate", time="later", metrics={"paper": {"ppl": 3.4}})
    assert [row["time"] for row in rows(store)] == ["later"]


def test_rows_of_another_process_arrive(store: Store) -> None:
    sent: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    with forwarding(sent), recorded() as lines:
        train("round 1", range(2))
    assert not lines, "figures are no lines of the console"
    with metrics.recording(store, KEY):
        while not sent.empty():
            record = pickle.loads(pickle.dumps(sent.get()))
            logging.getLogger(record.name).handle(record)
    assert [row["step"] for row in rows(store)] == [0, 1]


def test_a_store_that_is_away_does_not_end_the_run(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, calls = Store.write_text, []

    def fails_once(self: Store, key: str, text: str) -> None:
        calls.append(key)
        if len(calls) == 1:
            raise OSError("no route to host")
        honest(self, key, text)

    monkeypatch.setattr(Store, "write_text", fails_once)
    monkeypatch.setattr(metrics, "SECONDS_BETWEEN_WRITES", 0.02)
    with recorded() as lines, metrics.recording(store, KEY):
        train("round 1", range(2))
        waited = time.monotonic()
        while len(calls) < 2 and time.monotonic() < waited + 10:
            time.sleep(0.01)
    assert len(rows(store)) == 2
    assert [line for line in lines if "no route to host" in line and line.startswith("warning")]


def test_about_two_hundred_rows_whatever_the_length() -> None:
    assert [metrics.log_interval(steps) for steps in (1, 128, 399, 400, 10_000)] == [1, 1, 1, 2, 50]


def test_tensorboard_gets_every_figure(store: Store, tmp_path: Path) -> None:
    with (
        trackers.tracking("tensorboard", "tiny", str(tmp_path / "own")) as tracker,
        metrics.recording(store, KEY, tracker),
    ):
        train("round 1 · seed 42", range(3))
        metrics.log("dense", "evaluate", metrics={"paper": {"ppl": 3.5, "sentence": "words"}})
    (path,) = (tmp_path / "own" / "tensorboard").iterdir()
    assert scalars(path) == {
        ("round_1_seed_42/kl", 0): 1.0,
        ("round_1_seed_42/kl", 1): 0.5,
        ("round_1_seed_42/kl", 2): pytest.approx(1 / 3),
        ("dense/metrics/paper/ppl", 0): 3.5,
    }


def scalars(path: Path) -> dict[tuple[str, int], float]:
    """What TensorBoard reads: records of length, its checksum, an event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    data, found, at = path.read_bytes(), {}, 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        event = Event.FromString(data[at + 12 : at + 12 + length])
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        at += length + 16
    return found


class Fake(types.ModuleType):
    """A tracker's package that notes how it is called; what it returns notes in the same list."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **options: Any) -> Any:
            self.calls.append((name, *args, options))
            return self

        return call


@pytest.mark.parametrize("name", ["trackio", "mlflow", "wandb"])
def test_other_trackers_are_called_as_they_document(
    name: Any, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake(name)
    fake.experiment_id, fake.info = "7", types.SimpleNamespace(run_id="r1")
    monkeypatch.setitem(sys.modules, name, fake)
    with trackers.tracking(name, "tiny", store.root) as tracker, metrics.recording(store, KEY, tracker):
        train("dense+kd", range(2))
    expected = {
        "trackio": [
            ("init", {"project": "sparsekd-ray", "name": "tiny", "resume": "allow", "embed": False}),
            ("log", {"dense_kd/kl": 1.0}, {"step": 0}),
            ("log", {"dense_kd/kl": 0.5}, {"step": 1}),
            ("finish", {}),
        ],
        "mlflow": [
            ("MlflowClient", {}),
            ("set_experiment", "sparsekd-ray", {}),
            ("create_run", "7", {"run_name": "tiny"}),
            ("log_metrics", {"dense_kd/kl": 1.0}, {"step": 0, "run_id": "r1"}),
            ("log_metrics", {"dense_kd/kl": 0.5}, {"step": 1, "run_id": "r1"}),
            ("set_terminated", "r1", {}),
        ],
        "wandb": [
            ("init", {"project": "sparsekd-ray", "name": "tiny", "id": "tiny", "resume": "allow"}),
            ("define_metric", "dense_kd/*", {"step_metric": "dense_kd/step"}),
            ("log", {"dense_kd/kl": 1.0, "dense_kd/step": 0}, {}),
            ("define_metric", "dense_kd/*", {"step_metric": "dense_kd/step"}),
            ("log", {"dense_kd/kl": 0.5, "dense_kd/step": 1}, {}),
            ("finish", {}),
        ],
    }
    assert fake.calls == expected[name]


def test_a_tracker_that_is_not_installed_is_an_error_before_work() -> None:
    trackers.require(None)
    trackers.require("tensorboard")
    assert Execution(tracker="wandb").tracker == "wandb"
    with pytest.raises(ConfigError, match=r"execution\.tracker is wandb.*pip install wandb"):
        trackers.require("wandb")
    with pytest.raises(ValueError, match="tracker"):
        Execution(tracker="visdom")


def test_a_tracker_that_cannot_be_opened_is_our_error(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_key(run: str, folder: str) -> trackers.Opened:
        raise RuntimeError("no API key")

    spec = trackers.TrackerSpec("json", no_key)
    monkeypatch.setitem(trackers.TRACKERS, "wandb", spec)
    with (
        pytest.raises(ConfigError, match="wandb cannot be opened: no API key"),
        trackers.tracking("wandb", "tiny", store.root),
    ):
        raise AssertionError("it was to be refused")


def test_a_tracker_that_fails_leaves_the_run_alone(store: Store) -> None:
    calls: list[dict[str, float]] = []

    def broken(figures: dict[str, float], step: int) -> None:
        calls.append(figures)
        raise RuntimeError("connection reset")

    def closed() -> None:
        raise RuntimeError("no route to host")

    opened = trackers.Opened(broken, closed)
    with recorded() as lines, trackers.following(opened) as tracker, metrics.recording(store, KEY, tracker):
        train("round 1", range(3))
    assert len(calls) == 1 and len(rows(store)) == 3
    assert lines == [
        "warning: the tracker failed and gets no more figures of this run: connection reset",
        "warning: the tracker could not be closed, its last figures may be missing: no route to host",
    ]


def test_a_tracker_that_stalls_does_not_hold_the_run_up(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "WAITING_ROWS", 2)
    monkeypatch.setattr(trackers, "SECONDS_TO_END", 0.1)
    answered, started = threading.Event(), time.monotonic()
    opened = trackers.Opened(lambda figures, step: answered.wait() and None, lambda: None)
    with recorded() as lines:
        with trackers.following(opened) as tracker, metrics.recording(store, KEY, tracker):
            train("round 1", range(8))
        answered.set()
    assert time.monotonic() - started < 5
    assert len(rows(store)) == 8
    assert [line.split(":")[1] for line in lines] == [
        " the tracker is 2 rows behind",
        " the tracker did not end within 0 s",
    ]
