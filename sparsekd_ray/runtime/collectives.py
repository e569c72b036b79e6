"""What the workers of a distillation tell one another; alone, a worker is rank 0 of 1."""

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
    """Sum over the workers."""
    if dist.is_initialized():
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        moved = sums.to(device, copy=True)
        dist.all_reduce(moved)
        return moved.cpu()
    return sums.clone()


def broadcast(value: Any) -> Any:
    """Worker 0's value, on every worker."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]
