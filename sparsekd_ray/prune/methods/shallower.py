"""Methods that leave fewer layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparsekd_ray.prune.methods.spec import MethodSpec, Shapes

if TYPE_CHECKING:
    from sparsekd_ray.config import Prune
    from sparsekd_ray.prune.preview import Row
    from sparsekd_ray.prune.task import Student, Task
    from sparsekd_ray.runtime.tasks import TaskMap


def check_layers(shapes: Shapes, settings: Prune, sparsities: Sequence[float]) -> None:
    """ConfigError if a sparsity asks for no layer, or for all of them."""
    from sparsekd_ray.prune import depth

    layers = left = sum(name.endswith("down_proj") for name in shapes)
    for sparsity in sparsities:
        left -= depth.count(left, 1 - (1 - sparsity) * layers / left)


def _depth(task: Task, task_map: TaskMap) -> Student:
    from sparsekd_ray.prune import structured

    return structured.shallower(task, structured.layers_to_drop(task))


def _depth_preview(task: Task, task_map: TaskMap) -> list[Row]:
    from sparsekd_ray.prune import preview, structured

    return preview.shallower(task, structured.layers_to_drop(task))


METHODS = (
    MethodSpec(
        name="depth",
        form="shallower",
        card="Pruned by removing whole layers, those that change the hidden state least on calibration text",
        settings=("drop",),
        student=_depth,
        preview=_depth_preview,
        check=check_layers,
        inputs=("statistics",),
    ),
)
