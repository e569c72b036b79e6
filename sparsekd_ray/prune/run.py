"""The prune stage: a model directory in, a smaller one out, by the method that the settings name.

Sparsity is always the share of the original dense model's MLP parameters that is gone, so a later round of a cascade
states the same quantity as the first. Parameters are counted in the files on disk. Zeros of a masked model do
not count.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

from sparsekd_ray.errors import ModelError
from sparsekd_ray.model import saving, spec, weights
from sparsekd_ray.prune.methods import METHODS, named
from sparsekd_ray.prune.task import Task
from sparsekd_ray.runtime.tasks import TaskMap


def prune(task: Task, task_map: TaskMap) -> dict[str, object]:
    """Fills `task.out`'s working directory with the pruned model. Returns counts on disk, method and seconds.

    Raises ConfigError if the budget cannot be met, ModelError if the model is not supported, holds a value that is
    not finite, or is of a form that the method does not cut.
    """
    start, method = time.perf_counter(), METHODS[task.settings.method]
    check_form(task)
    student, facts = method.student(task, task_map)
    card = f"{method.card}. {task.sparsity:.1%} of the MLP parameters are gone, before any recovery.\n"
    out = task.store.workdir(task.out)
    saving.save(student, task.folder(), out, card)
    return counts(out, task) | facts | {"seconds": time.perf_counter() - start}


def counts(out: Path, task: Task) -> dict[str, object]:
    """Parameters of a finished directory beside what was asked for."""
    sizes = {name: math.prod(shape) for name, shape in weights.tensor_shapes(out).items()}
    # permutations are no parameters
    order = sum(size for name, size in sizes.items() if name.endswith(".order"))
    mlp_params = sum(size for name, size in sizes.items() if ".mlp." in name) - order - _zeros(out)
    return {
        "method": task.settings.method,
        "params": sum(sizes.values()) - order,
        "mlp_params": mlp_params,
        "dense_mlp_params": task.dense_mlp_params,
        "sparsity_requested": task.sparsity,
        "sparsity": 1 - mlp_params / task.dense_mlp_params,
    }


def _zeros(out: Path) -> int:
    """Number of masked MLP entries; 0 for a model without a mask."""
    if not spec.config_dict(out).get("sparsekd_mask"):
        return 0
    names = [name for name in weights.tensor_places(out) if ".mlp." in name]
    return sum(int((weights.read_tensors(out, name)[name] == 0).sum()) for name in names)


def check_form(task: Task) -> None:
    """ModelError if the method does not cut models of this form, or would lose a part of it.

    Only low-rank methods cut low-rank matrices. Only the method that made a mask can extend it. Only a method that adds
    biases keeps them.
    """
    values, method = spec.config_dict(task.folder()), METHODS[task.settings.method]
    spec.check_supported(values)
    if spec.is_low_rank(values) and method.form != "low-rank":
        raise ModelError(
            f"{task.folder()} is low-rank already, and {method.name} cuts stock models only: cut the dense model, or "
            f"go on with {' or '.join(named('low-rank'))}"
        )
    if spec.mlp_storage(values).bias and not task.settings.bias:
        biased = " or ".join(name for name, other in METHODS.items() if "bias" in other.settings)
        raise ModelError(
            f"{task.folder()} has biases in its low-rank matrices, which {method.name} without prune.bias would lose: "
            f"go on with {biased} and prune.bias"
        )
    if (mask := values.get("sparsekd_mask")) and method.name != mask:
        raise ModelError(
            f"{task.folder()} is masked by {mask}, and {method.name} would lose the mask: cut the dense model, or go "
            f"on with {mask}"
        )
