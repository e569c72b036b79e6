"""Experiment trackers that receive a run's figures. One function per tracker opens it.

TensorBoard's files need no further package. The user installs the package of another tracker on the driver's machine.
Addresses and keys come from the tracker's own environment variables (WANDB_API_KEY, MLFLOW_TRACKING_URI, …).

A tracker is opened before any work starts. From then on it is called from a thread of its own (`following`), so a run
never waits for its tracker and never ends because of it. `Opened.log` and `Opened.close` are called on that thread, so
they use no state that a client keeps per thread.
"""

from __future__ import annotations

import importlib.util
import logging
import queue
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import NamedTuple

from sparsekd_ray.config.base import TrackerName
from sparsekd_ray.errors import ConfigError
from sparsekd_ray.runtime.metrics import Row, Tracker

logger = logging.getLogger(__name__)

PROJECT = "sparsekd-ray"
WAITING_ROWS = 1000  # that a slow tracker may be behind
SECONDS_TO_END = 30.0  # that a tracker may take for its last rows

Log = Callable[[dict[str, float], int], None]
"""Takes figures by name, and the step that they belong to."""


class Opened(NamedTuple):
    log: Log
    close: Callable[[], None]


def trackio(run: str, folder: str) -> Opened:
    import trackio

    opened = trackio.init(project=PROJECT, name=run, resume="allow", embed=False)
    return Opened(lambda figures, step: opened.log(figures, step=step), opened.finish)


def tensorboard(run: str, folder: str) -> Opened:
    from tensorboardX import SummaryWriter  # a dependency of Ray

    writer = SummaryWriter(f"{folder}/tensorboard")

    def log(figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)

    return Opened(log, writer.close)


def mlflow(run: str, folder: str) -> Opened:
    import mlflow

    client, experiment = mlflow.MlflowClient(), mlflow.set_experiment(PROJECT)
    run_id = client.create_run(experiment.experiment_id, run_name=run).info.run_id
    return Opened(
        lambda figures, step: mlflow.log_metrics(figures, step=step, run_id=run_id),
        lambda: client.set_terminated(run_id),
    )


def wandb(run: str, folder: str) -> Opened:
    import wandb

    opened = wandb.init(project=PROJECT, name=run, id=run, resume="allow")

    def log(figures: dict[str, float], step: int) -> None:
        # W&B's own step only rises, but every stage counts from 0: so the step is a figure, and the axis of the others
        stage = next(iter(figures)).split("/")[0]
        opened.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        opened.log({**figures, f"{stage}/step": step})

    return Opened(log, opened.finish)


class TrackerSpec(NamedTuple):
    package: str
    open: Callable[[str, str], Opened]
    """Takes the name of a run and a folder for the tracker's own files."""


TRACKERS: dict[TrackerName, TrackerSpec] = {
    "trackio": TrackerSpec("trackio", trackio),
    "tensorboard": TrackerSpec("tensorboardX", tensorboard),
    "mlflow": TrackerSpec("mlflow", mlflow),
    "wandb": TrackerSpec("wandb", wandb),
}


def require(name: TrackerName | None) -> None:
    """Raises ConfigError unless the tracker's package is installed on this machine, where the driver runs."""
    if name is not None and importlib.util.find_spec(package := TRACKERS[name].package) is None:
        raise ConfigError(
            f"execution.tracker is {name}, and the package {package} is not installed where the driver runs: "
            f"pip install {package}, or leave execution.tracker out (metrics.jsonl is written in any case)"
        )


@contextmanager
def tracking(name: TrackerName | None, run: str, folder: str) -> Iterator[Tracker | None]:
    """The tracker of this name, for one run; None for None. Raises ConfigError if it cannot be opened."""
    if name is None:
        yield None
        return
    require(name)
    try:
        opened = TRACKERS[name].open(run, folder)
    except Exception as error:  # every tracker has exceptions of its own
        raise ConfigError(
            f"execution.tracker {name} cannot be opened: {error}. Check its address and key, or leave it out"
        ) from error
    with following(opened) as tracker:
        yield tracker


@contextmanager
def following(opened: Opened) -> Iterator[Tracker]:
    """Hands rows to a tracker from a thread of its own. Whatever the tracker does, this does not raise or wait long."""
    rows: queue.Queue[Row | None] = queue.Queue(WAITING_ROWS)
    thread = threading.Thread(target=_follow, args=(opened, rows), name="tracker", daemon=True)
    stalled = False

    def put(row: Row) -> None:
        nonlocal stalled
        try:
            rows.put_nowait(row)
        except queue.Full:
            if not stalled:
                logger.warning(
                    f"the tracker is {WAITING_ROWS} rows behind: it misses rows of this run; metrics.jsonl has all"
                )
            stalled = True

    thread.start()
    try:
        yield put
    finally:
        with suppress(queue.Full):
            rows.put(None, timeout=SECONDS_TO_END)
        thread.join(SECONDS_TO_END)
        if thread.is_alive():
            logger.warning(
                f"the tracker did not end within {SECONDS_TO_END:.0f} s: it may miss the last rows; metrics.jsonl "
                "has all"
            )


def _follow(opened: Opened, rows: queue.Queue[Row | None]) -> None:
    """Logs rows until None comes, then closes the tracker. After the first failure rows are only taken out."""
    failed = False
    while (row := rows.get()) is not None:
        if failed:
            continue
        try:
            _log(opened.log, row)
        except Exception as error:  # whatever a tracker's client raises
            failed = True
            logger.warning(f"the tracker failed and gets no more figures of this run: {error}")
    try:
        opened.close()
    except Exception as error:
        logger.warning(f"the tracker could not be closed, its last figures may be missing: {error}")


def _log(log: Log, row: Row) -> None:
    step = row.get("step")
    if figures := dict(_figures(row, _name(str(row["stage"])))):
        log(figures, step if isinstance(step, int) else 0)


def _figures(values: Mapping[str, object], prefix: str) -> Iterator[tuple[str, float]]:
    """(path, number) of every number in a row, such as `round_1/valid_domains/code`."""
    for key, value in values.items():
        path = f"{prefix}/{_name(key)}"
        if isinstance(value, Mapping):
            yield from _figures(value, path)
        elif isinstance(value, int | float) and not isinstance(value, bool) and key != "step":
            yield path, float(value)


def _name(text: str) -> str:
    """The text in characters that every tracker takes."""
    return re.sub(r"[^A-Za-z0-9_]+", "_", text)
