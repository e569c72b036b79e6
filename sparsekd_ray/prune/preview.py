"""What a pruning would do, matrix by matrix, before it is done: the table of `jobs/prune.py run --dry-run`."""

from __future__ import annotations

from typing import Any

from sparsekd_ray.model import spec
from sparsekd_ray.model.cost import parameters
from sparsekd_ray.prune import low_rank, structured
from sparsekd_ray.prune.run import check_form
from sparsekd_ray.prune.task import Task
from sparsekd_ray.runtime.tasks import TaskMap

Row = dict[str, Any]


def table(task: Task, each: TaskMap) -> list[Row]:
    """A row per matrix or layer: its name, what it becomes, its parameters then and now, and the predicted loss in nat
    per token where statistics predict one. Raises what the pruning itself would."""
    check_form(task)
    match task.settings.method:
        case "svd" | "svd-whitened":
            return _low_rank(task, low_rank.plan(task, each))
        case "neurons" | "sdm":
            return _narrower(task)
        case "depth":
            return _shallower(task)
    return _masked(task)


def total(rows: list[Row]) -> Row:
    """The sum of a table, as one more row of it."""
    losses = [row["predicted loss"] for row in rows if row["predicted loss"] is not None]
    counts = {key: sum(row[key] for row in rows) for key in ("parameters", "dense")}
    share = f"−{1 - counts['parameters'] / counts['dense']:.2%}"
    return {"matrix": "all", "becomes": share} | counts | {"predicted loss": sum(losses) if losses else None}


def _low_rank(task: Task, plan: low_rank.Plan) -> list[Row]:
    settings, held = task.settings, spec.mlp_ranks(task.folder())
    rows = []
    for name, (m, n) in plan.shapes.items():
        rank = plan.ranks[name] or held.get(name)
        count = parameters(m, n, rank, settings.storage == "gauge", settings.bias)
        loss = None if plan.loss is None else plan.loss[name]
        rows.append(_row(name, "dense" if rank is None else f"rank {rank}", count, m * n, loss))
    return rows


def _narrower(task: Task) -> list[Row]:
    values, width = spec.config_dict(task.folder()), structured.width_of(task)
    hidden, inner, layers = (values[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    return [
        _row(f"model.layers.{i}.mlp", f"{width} neurons", 3 * hidden * width, 3 * hidden * inner, None)
        for i in range(layers)
    ]


def _shallower(task: Task) -> list[Row]:
    shapes, dropped = spec.shapes_from_config(task.folder()), set(structured.layers_to_drop(task))
    layers = spec.config_dict(task.folder())["num_hidden_layers"]
    each = sum(m * n for m, n in shapes.values()) // layers
    return [
        _row(
            f"model.layers.{i}",
            "dropped" if i in dropped else "kept",
            0 if i in dropped else each,
            each,
            None,
        )
        for i in range(layers)
    ]


def _masked(task: Task) -> list[Row]:
    share = structured.share_of(task)
    shapes = spec.shapes_from_config(task.folder())
    return [
        _row(name, f"{share:.1%} zeros", m * n - round(share * m * n), m * n, None)
        for name, (m, n) in shapes.items()
    ]


def _row(matrix: str, becomes: str, count: int, dense: int, loss: float | None) -> Row:
    return {"matrix": matrix, "becomes": becomes, "parameters": count, "dense": dense, "predicted loss": loss}
