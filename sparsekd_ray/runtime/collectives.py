"""Communication between the workers of a distillation. A process without a worker group is rank 0 of 1."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def total(sums: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all workers."""
    if dist.is_initialized():
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        moved = sums.to(device, copy=True)
        dist.all_reduce(moved)
        return moved.cpu()
    return sums.clone()


def broadcast(value: Any) -> Any:
    """The value of worker 0, on every worker."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0)
    return values[0]
