"""Where and how a run runs. Nothing here changes the numbers, nor any fingerprint."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sparsekd_ray.config.base import Positive, Settings


class Card(Settings):
    name: str
    memory_gb: float = Field(gt=0)
    count: Positive = 1


class Execution(Settings):
    """Where and how it runs. Nothing here changes the numbers, nor any fingerprint."""

    store: str = "store"
    """Local directory or s3://bucket/prefix, shared by every node."""
    scratch: str | None = None
    """Local directory for downloads from an S3 store and for work in progress."""
    workers: Positive = 2
    """Data-parallel training workers."""
    actors: Positive = 2
    """Teacher actors of a capture, at most."""
    gpus: bool = False
    """Ask Ray for one GPU per worker and per teacher actor."""
    threads: Positive = 2
    """CPU threads (and Ray CPUs) of every stage that is one process."""
    zero_stage: Literal[1, 2] = 2
    """DeepSpeed ZeRO: partition optimiser states (1), and gradients too (2)."""
    offload: bool = False
    """Keep optimiser states in host memory (for cards of 16 GB)."""
    recompute: bool = False
    """Recompute activations in the backward pass instead of keeping them: less memory, a third more work."""
    micro_batch: Positive = 8
    """Sequences per worker and forward pass, at most."""
    max_failures: int = Field(3, ge=0)
    """Restarts of a training worker group before the run gives up."""
    cards: tuple[Card, ...] = ()
    """The GPUs meant for the run, for the plan's estimates."""
