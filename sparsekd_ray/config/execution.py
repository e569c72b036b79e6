"""Where and how a run runs. Nothing here changes the numbers or a fingerprint."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sparsekd_ray.config.base import Positive, Settings, TrackerName


class Card(Settings):
    """A kind of GPU."""

    name: str
    """Name of the GPU, for the plan."""
    memory_gb: float = Field(gt=0)
    """Memory of one GPU, in GB."""
    count: Positive = 1
    """Number of these GPUs."""


class Execution(Settings):
    """Where and how the run runs. Nothing here changes the numbers or a fingerprint."""

    store: str = "store"
    """Where results are kept: a directory that every node sees, or s3://bucket/prefix."""
    scratch: str | None = None
    """Local directory for downloads from an S3 store and for work in progress on it."""
    workers: Positive = 2
    """Data-parallel training workers."""
    actors: Positive = 2
    """Largest number of teacher actors of a capture. Each holds one copy of the teacher."""
    gpus: bool = False
    """Ask Ray for one GPU per worker and per teacher actor."""
    threads: Positive = 2
    """CPU threads (and Ray CPUs) of every stage that is one process."""
    zero_stage: Literal[1, 2] = 2
    """DeepSpeed ZeRO. 1: optimiser states are divided between workers. 2: gradients are too."""
    offload: bool = False
    """Keep optimiser states in host memory, for cards of 16 GB."""
    recompute: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, a third more work."""
    micro_batch: Positive = 8
    """Largest number of sequences per worker and forward pass. It does not change the result."""
    max_failures: int = Field(3, ge=0)
    """Restarts of a training worker group before the run gives up."""
    tracker: TrackerName | None = None
    """Tracker that receives the live figures besides `metrics.jsonl`. Its package must be installed on the driver's
    machine."""
    cards: tuple[Card, ...] = ()
    """The GPUs that you mean to use, for the estimates of a plan."""
