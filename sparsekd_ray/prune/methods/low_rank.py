"""Methods that leave low-rank factors: plain SVD, and SVD in the metric of inputs and loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparsekd_ray.prune.methods.spec import MethodSpec, Shapes

if TYPE_CHECKING:
    from sparsekd_ray.config import Prune
    from sparsekd_ray.prune.preview import Row
    from sparsekd_ray.prune.task import Student, Task
    from sparsekd_ray.runtime.tasks import TaskMap


def check_ranks(shapes: Shapes, settings: Prune, sparsities: Sequence[float]) -> None:
    """ConfigError if the largest sparsity is out of reach even at the smallest rank of every matrix."""
    from sparsekd_ray.errors import ConfigError
    from sparsekd_ray.prune.allocate import max_sparsity

    limit = max_sparsity(shapes, settings.align, settings.storage == "gauge", settings.bias)
    if (largest := max(sparsities, default=0.0)) > limit:
        raise ConfigError(
            f"asks for sparsity {largest:g}; truncated SVD of this model with ranks in multiples of {settings.align} "
            f"can remove at most {limit:.4f} of the MLP parameters"
        )


def _plain(task: Task, task_map: TaskMap) -> Student:
    from sparsekd_ray.prune import low_rank

    return low_rank.student(task, task_map, low_rank.PLAIN)


def _plain_preview(task: Task, task_map: TaskMap) -> list[Row]:
    from sparsekd_ray.prune import low_rank, preview

    return preview.low_rank(task, low_rank.plan(task, task_map, low_rank.PLAIN))


def _plain_energy(task: Task, tau: float, task_map: TaskMap) -> float:
    from sparsekd_ray.prune import low_rank

    return low_rank.sparsity_at(task, tau, task_map, low_rank.PLAIN)


def _whitened(task: Task, task_map: TaskMap) -> Student:
    from sparsekd_ray.prune import low_rank

    return low_rank.student(task, task_map, low_rank.WHITENED)


def _whitened_preview(task: Task, task_map: TaskMap) -> list[Row]:
    from sparsekd_ray.prune import low_rank, preview

    return preview.low_rank(task, low_rank.plan(task, task_map, low_rank.WHITENED))


def _whitened_energy(task: Task, tau: float, task_map: TaskMap) -> float:
    from sparsekd_ray.prune import low_rank

    return low_rank.sparsity_at(task, tau, task_map, low_rank.WHITENED)


METHODS = (
    MethodSpec(
        name="svd",
        form="low-rank",
        card="Pruned by truncated singular value decomposition of its MLP matrices",
        settings=("allocation", "align", "storage"),
        student=_plain,
        preview=_plain_preview,
        check=check_ranks,
        energy=_plain_energy,
        inputs_where={("allocation", "optimal"): ("statistics",)},
    ),
    MethodSpec(
        name="svd-whitened",
        form="low-rank",
        card="Pruned by singular value decomposition of its MLP matrices in the metric of their inputs and of the "
        "loss on calibration text",
        settings=("allocation", "align", "storage", "bias"),
        student=_whitened,
        preview=_whitened_preview,
        check=check_ranks,
        energy=_whitened_energy,
        inputs=("statistics",),
        variants=("", "+optimal", "+optimal+gauge"),
    ),
)
