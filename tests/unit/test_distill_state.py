"""Resuming a distillation: who loads what, what is said, and the rate of the attempt that runs."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lines import recorded
from safetensors.torch import save_file

from sparsekd_ray.distill import figures, state
from sparsekd_ray.distill.state import Progress, Validation
from sparsekd_ray.runtime import collectives


def resumed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, rank: int, saved_world: int
) -> tuple[Progress, dict[str, torch.Tensor]]:
    """What worker `rank` of two takes from a checkpoint of `saved_world` workers at step 4."""
    progress = Progress(saved_world, step=4)
    (folder / state.PROGRESS).write_text(json.dumps(asdict(progress)))
    save_file({"w": torch.ones(2)}, folder / state.BEST)
    checkpoints: Any = SimpleNamespace(
        newest=lambda: "step-000004", fetch=lambda *_: folder, discard_all=lambda: None
    )
    engine: Any = SimpleNamespace(load_checkpoint=lambda *_, **__: None, global_steps=4)
    monkeypatch.setattr(collectives, "rank_and_world", lambda: (rank, 2))
    monkeypatch.setattr(collectives, "broadcast", lambda value: value)
    monkeypatch.setattr(collectives, "barrier", lambda: None)
    return state.resume("student", engine, checkpoints)


def test_only_worker_0_loads_the_best_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resumed(tmp_path, monkeypatch, 0, saved_world=2)[1].keys() == {"w"}
    progress, best = resumed(tmp_path, monkeypatch, 1, saved_world=2)
    assert (progress.step, best) == (4, {})


def test_a_restart_for_another_number_of_workers_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with recorded() as lines:
        progress, best = resumed(tmp_path, monkeypatch, 0, saved_world=3)
    assert lines == ["warning: student: checkpoint of 3 workers, now 2: starting this step again"]
    assert (progress.step, best) == (0, {})


def test_the_rate_counts_the_tokens_of_this_attempt_alone() -> None:
    validation = Validation(step=12, tokens=1200, loss=(0.0, 0.0), valid_ppl=9.0, valid_domains={})
    training: Any = SimpleNamespace(
        job=SimpleNamespace(title="student"), progress=Progress(1, step=12, history=[validation]), steps=20,
        positions=100, learning_rate=lambda _: 0.0, first_step=10, started=time.monotonic() - 4,
    )  # fmt: skip
    assert figures.progress_line(training).endswith(" 50 tokens/s")
