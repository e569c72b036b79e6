"""A distillation: its inputs and settings (`Job`), and its state while it runs on a worker (`Training`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from sparsekd_ray.config import Distill
from sparsekd_ray.distill import schedule
from sparsekd_ray.distill.engine import Engine
from sparsekd_ray.distill.reader import SampleReader
from sparsekd_ray.distill.state import Progress
from sparsekd_ray.store import Ref

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Job:
    """One distillation of `student` into `out`, on the `cache` of `teacher`, validated on `corpus`."""

    title: str
    student: Ref
    cache: Ref
    teacher: Ref
    corpus: Ref
    out: Ref
    settings: Distill
    seed: int
    identity: Mapping[str, object]
    inputs: Mapping[str, str]


@dataclass
class Training:
    """A distillation in progress on this worker."""

    job: Job
    reader: SampleReader
    valid: Mapping[str, np.ndarray]
    """Validation tokens of every domain."""
    model: PreTrainedModel
    zeros: Mapping[str, Tensor]
    """Where a masked student's zeros are. They must stay zero."""
    engine: Engine
    steps: int
    """Optimiser steps, unless a validation stops it earlier."""
    sizes: list[list[int]]
    """Number of sequences of each micro-batch, by worker."""
    progress: Progress
    best: dict[str, Tensor]
    """The weights of the best validation so far; on worker 0 alone."""
    first_step: int
    """The step at which this attempt began: 0, or that of the checkpoint."""
    started: float
    """When this attempt began, in seconds of `time.monotonic`."""

    @property
    def positions(self) -> int:
        """Predictions of one optimiser step, over all workers."""
        return self.job.settings.batch * (self.reader.seq_len - 1)

    @property
    def verdict(self) -> str | None:
        settings = self.job.settings
        return schedule.verdict(self.progress.perplexities, settings.patience, settings.min_gain)

    @property
    def over(self) -> bool:
        return self.progress.step == self.steps or self.verdict is not None

    def learning_rate(self, step: int) -> float:
        return schedule.learning_rate(step, self.steps, self.job.settings.lr, self.job.settings.warmup)
