"""Methods that put zeros in the place of weights. They are controls: no model is smaller or faster for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsekd_ray.prune.methods.spec import MethodSpec

if TYPE_CHECKING:
    from sparsekd_ray.prune.preview import Row
    from sparsekd_ray.prune.task import Student, Task
    from sparsekd_ray.runtime.tasks import TaskMap


def _preview(task: Task, task_map: TaskMap) -> list[Row]:
    from sparsekd_ray.prune import preview

    return preview.masked(task)


def _wanda(task: Task, task_map: TaskMap) -> Student:
    from sparsekd_ray.prune import structured

    return structured.masked(task, task_map, structured.wanda)


def _magnitude(task: Task, task_map: TaskMap) -> Student:
    from sparsekd_ray.prune import structured

    return structured.masked(task, task_map, structured.magnitude)


METHODS = (
    MethodSpec(
        name="wanda",
        form="masked",
        card="Pruned by zeros in the MLP matrices: in every row, where weight times norm of its input is smallest "
        "(Wanda)",
        settings=(),
        student=_wanda,
        preview=_preview,
        inputs=("texts",),
    ),
    MethodSpec(
        name="magnitude",
        form="masked",
        card="Pruned by zeros in the MLP matrices, in place of the smallest weights",
        settings=(),
        student=_magnitude,
        preview=_preview,
    ),
)
