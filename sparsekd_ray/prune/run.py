"""The prune stage: a model directory in, a smaller one out, by the method that the settings name.

Sparsity is always the share of the original dense model's MLP parameters that is gone, so a later round of a cascade
states the same quantity as the first. The counts returned are those of the files on disk; of masks, of what is not
zero in them.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from safetensors import safe_open

from sparsekd_ray.errors import ModelError
from sparsekd_ray.model import saving, spec
from sparsekd_ray.prune import low_rank, structured
from sparsekd_ray.prune.task import Task
from sparsekd_ray.runtime.tasks import TaskMap

CARDS = {
    "svd": "Low-rank student by truncated SVD",
    "svd-whitened": "Low-rank student by SVD in the metric of its activations",
    "neurons": "Narrower student: the neurons missed least removed, the rest refitted",
    "sdm": "Narrower student: neurons of least SDMPrune importance removed, the rest refitted",
    "depth": "Shallower student: layers removed",
    "wanda": "Masked student: weights zeroed by Wanda's score",
    "magnitude": "Masked student: smallest weights zeroed",
}


def prune(task: Task, each: TaskMap) -> dict[str, Any]:
    """Fills `task.out`'s working directory with the pruned model; returns counts on disk, method and seconds.

    Raises ConfigError if the budget cannot be met, ModelError if the model is not supported, holds a value that is
    not finite, or is of a form that the method does not cut.
    """
    start, method = time.perf_counter(), task.settings.method
    check_form(task)
    make = {
        "svd": low_rank.student,
        "svd-whitened": low_rank.student,
        "neurons": structured.by_activations,
        "sdm": structured.by_gradients,
        "depth": structured.shallower,
        "wanda": structured.masked,
        "magnitude": structured.masked,
    }[method]
    student, facts = make(task, each)
    card = f"{CARDS[method]}: {task.sparsity:.1%} of MLP parameters, before any recovery.\n"
    out = task.store.workdir(task.out)
    saving.save(student, task.folder(), out, card)
    return counts(out, task) | facts | {"seconds": time.perf_counter() - start}


def counts(out: Path, task: Task) -> dict[str, Any]:
    """Parameters of a finished directory against what was asked for."""
    sizes = {name: math.prod(shape) for name, shape in spec.tensors_on_disk(out).items()}
    order = sum(
        size for name, size in sizes.items() if name.endswith(".order")
    )  # a permutation, no parameters
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
    """Masked entries of the MLP; none in a model without a mask."""
    if not spec.config_dict(out).get("mlp_mask"):
        return 0
    total = 0
    for path in sorted(out.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            keys = [key for key in file.keys() if ".mlp." in key]  # noqa: SIM118, a file is no mapping
            total += sum(int((file.get_tensor(key) == 0).sum()) for key in keys)
    return total


def check_form(task: Task) -> None:
    """ModelError for what would be cut in half: stock methods need stock matrices, masks are not cut again by other
    methods, and biases are kept only by what adds some."""
    values, method = spec.config_dict(task.folder()), task.settings.method
    spec.check_supported(values)
    low_rank = method in ("svd", "svd-whitened")
    if spec.is_low_rank(values) and not low_rank:
        raise ModelError(
            f"{task.folder()} is low-rank already, and {method} cuts stock models only: cut the dense model, or go on "
            "with svd or svd-whitened"
        )
    if spec.mlp_form(values)[1] and not task.settings.bias:
        raise ModelError(
            f"{task.folder()} has biases in its low-rank matrices, which {method} without prune.bias would lose: go on "
            "with svd-whitened and prune.bias"
        )
    if (mask := values.get("mlp_mask")) and method != mask:
        raise ModelError(
            f"{task.folder()} is masked by {mask}, and {method} would lose the mask: cut the dense model, or go on "
            f"with {mask}"
        )
