"""The plan of a pruning, matrix by matrix, before it runs: the table of `sparsekd prune preview`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from sparsekd_ray.model import spec
from sparsekd_ray.model.cost import parameters
from sparsekd_ray.prune import structured
from sparsekd_ray.prune.low_rank import Plan
from sparsekd_ray.prune.methods import METHODS
from sparsekd_ray.prune.run import check_form
from sparsekd_ray.prune.task import Task
from sparsekd_ray.runtime.tasks import TaskMap


class Row(NamedTuple):
    """A matrix or a layer. `parameters`: afterwards; `dense`: now; `predicted_loss`: nat per token, None if unknown."""

    matrix: str
    becomes: str
    parameters: int
    dense: int
    predicted_loss: float | None = None


def table(task: Task, task_map: TaskMap) -> list[Row]:
    """A row for each matrix or layer. Raises the errors that the pruning itself would raise."""
    check_form(task)
    return METHODS[task.settings.method].preview(task, task_map)


def total(rows: Sequence[Row]) -> Row:
    """The sum of a table, as one more row of it."""
    losses = [row.predicted_loss for row in rows if row.predicted_loss is not None]
    after, before = sum(row.parameters for row in rows), sum(row.dense for row in rows)
    return Row("all", f"−{1 - after / before:.2%}", after, before, sum(losses) if losses else None)


def low_rank(task: Task, plan: Plan) -> list[Row]:
    """A row for each matrix: its rank, or that it stays dense."""
    settings, present = task.settings, spec.mlp_ranks(task.folder())
    rows = []
    for name, (m, n) in plan.shapes.items():
        rank = plan.ranks[name] or present.get(name)
        count = parameters(m, n, rank, settings.storage == "gauge", settings.bias)
        loss = None if plan.loss is None else plan.loss[name]
        rows.append(Row(name, "dense" if rank is None else f"rank {rank}", count, m * n, loss))
    return rows


def narrower(task: Task, width: int) -> list[Row]:
    """A row for each layer's MLP."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers")
    hidden, inner, layers = spec.sizes(task.folder(), *names)
    return [
        Row(f"model.layers.{i}.mlp", f"{width} neurons", 3 * hidden * width, 3 * hidden * inner)
        for i in range(layers)
    ]


def shallower(task: Task, dropped: Collection[int]) -> list[Row]:
    """A row for each layer: kept or dropped."""
    shapes = spec.shapes_from_config(task.folder())
    layers = spec.layer_count(task.folder())
    size = sum(m * n for m, n in shapes.values()) // layers
    return [
        Row(f"model.layers.{i}", "dropped" if i in dropped else "kept", 0 if i in dropped else size, size)
        for i in range(layers)
    ]


def masked(task: Task) -> list[Row]:
    """A row for each matrix: its share of zeros."""
    share = structured.share_of(task)
    shapes = spec.shapes_from_config(task.folder())
    return [
        Row(name, f"{share:.1%} zeros", m * n - round(share * m * n), m * n)
        for name, (m, n) in shapes.items()
    ]
