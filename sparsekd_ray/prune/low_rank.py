"""Low-rank pruning of a whole model: a spectrum of every matrix, ranks under one budget, then the factors.

Spectra and factors are computed matrix by matrix, in subtasks that may run anywhere. A `Metric` says how the error of
a matrix counts. With statistics, every output (row) is weighted by its Fisher scalar. Then Σ_{i>r} σ_i² is the
predicted loss of rank r in nat per token: half the sum over outputs of Fisher scalar times mean squared error, which
is the second-order term of the loss where outputs are taken as independent. So the budget keeps what the model is
sensitive to, in each matrix and between matrices.

Gate and up of a layer are two matrices of the same input. Where a model stores them apart, they become one low-rank
matrix with a shared basis if that predicts the smaller loss at the same number of parameters. This is decided before
the exact allocation, at the budget's share of parameters, so it is a heuristic.

Shapes: m rows (outputs), n columns (inputs), r rank, k = min(m, n).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch

from sparsekd_ray.model import loading, low_rank, spec
from sparsekd_ray.model.cost import aligned_ranks, parameters
from sparsekd_ray.prune import allocate, gauge, svd
from sparsekd_ray.prune.task import Student, Task, Tensors, named_errors, tensors_below
from sparsekd_ray.runtime.logging import log_progress
from sparsekd_ray.runtime.tasks import TaskMap

logger = logging.getLogger(__name__)

Shapes = dict[str, tuple[int, int]]


class Problem(NamedTuple):
    """One matrix as an approximation problem. `gram_nn` is None in plain SVD, `weight_m` without statistics."""

    W_mn: torch.Tensor
    gram_nn: torch.Tensor | None
    weight_m: torch.Tensor | None
    mean_n: torch.Tensor | None


class Metric(NamedTuple):
    """How the error of a matrix counts. `joins`: gate and up of a layer may become one matrix."""

    problem: Callable[[Task, str], Problem]
    joins: bool


class Plan(NamedTuple):
    """Shape and rank of every matrix. `loss`: predicted, in nat per token; None where there are no statistics."""

    shapes: Shapes
    ranks: dict[str, int | None]
    loss: dict[str, float] | None


def plan(task: Task, task_map: TaskMap, metric: Metric) -> Plan:
    """Ranks of all matrices under the budget. ConfigError, before the first spectrum, if it is out of reach."""
    shapes = spec.shapes_from_config(task.folder())
    _choose(
        task,
        "uniform",
        {name: np.ones(_present(task, name, shape)) for name, shape in shapes.items()},
        shapes,
    )
    pairs = _pairs(task, shapes) if metric.joins else {}
    names = [*shapes, *pairs]
    shapes |= {name: (2 * shapes[gate][0], shapes[gate][1]) for name, (gate, _) in pairs.items()}
    spectra: dict[str, np.ndarray] = {}
    for index, sigma_k in task_map(spectrum, [(task, name, metric) for name in names]):
        spectra[names[index]] = sigma_k
        log_progress(logger, f"spectrum {len(spectra)}/{len(names)} {names[index]}")
    for joint, pair in pairs.items():
        for name in pair if _joint_wins(task, shapes, spectra, joint, pair) else (joint,):
            del shapes[name], spectra[name]
    spectra, shapes = {name: spectra[name] for name in shapes}, _ordered(shapes)
    ranks = _choose(task, task.settings.allocation, spectra, shapes)
    loss = None if task.statistics is None else allocate.losses(spectra, shapes, ranks)
    return Plan(shapes, ranks, loss)


def _choose(
    task: Task, rule: allocate.Rule, spectra: Mapping[str, np.ndarray], shapes: Shapes
) -> dict[str, int | None]:
    """Ranks by a rule. ConfigError, whatever the spectra are, where the budget is out of reach."""
    return allocate.choose(
        rule,
        spectra,
        shapes,
        task.sparsity,
        task.settings.align,
        task.dense_mlp_params,
        protected=allocate.protected_names(shapes),
        gauge=task.settings.storage == "gauge",
        bias=task.settings.bias,
    )


def _present(task: Task, name: str, shape: tuple[int, int]) -> int:
    """The rank that a matrix has now."""
    return spec.mlp_ranks(task.folder()).get(name, min(shape))


def student(task: Task, task_map: TaskMap, metric: Metric) -> Student:
    """The low-rank model, its ranks and its predicted loss."""
    planned, model = plan(task, task_map, metric), task.load()
    present, gauged = spec.mlp_ranks(model), task.settings.storage == "gauge"
    same_form = spec.mlp_storage(model) == (gauged, task.settings.bias)
    wanted = {name: rank or present.get(name) for name, rank in planned.ranks.items()}
    ranks = {name: rank for name, rank in wanted.items() if rank is not None}
    changed = {name: rank for name, rank in ranks.items() if rank != present.get(name) or not same_form}
    state, names = dict(model.state_dict()), list(changed)
    subtasks = [(task, name, rank, metric) for name, rank in changed.items()]
    for done, (index, _) in enumerate(task_map(factors, subtasks), 1):
        log_progress(logger, f"factors {done}/{len(names)} {names[index]} rank {changed[names[index]]}")
    for name, rank in changed.items():
        tensors = task.published(name, {"rank": rank})
        assert tensors is not None, f"{name} has just been made"
        _replace(state, name, tensors)
    cut = loading.rebuild(model, ranks, state, gauge=gauged, bias=task.settings.bias)
    return Student(
        cut, {"ranks": planned.ranks, "predicted_loss": planned.loss and sum(planned.loss.values())}
    )


def sparsity_at(task: Task, tau: float, task_map: TaskMap, metric: Metric) -> float:
    """The share of the dense model's MLP parameters that one energy threshold removes.

    Every matrix keeps the smallest rank that has `tau` of its energy. It stays as it is where that saves nothing.
    This is SparseKD's rule, which has no budget.
    """
    shapes, left = spec.shapes_from_config(task.folder()), 0
    form = (task.settings.storage == "gauge", task.settings.bias)
    for index, sigma_k in task_map(spectrum, [(task, name, metric) for name in shapes]):
        name = list(shapes)[index]
        rank = svd.energy_rank(torch.from_numpy(sigma_k), tau)
        left += min(parameters(*shapes[name], rank, *form), parameters(*shapes[name], None))
        log_progress(logger, f"{name}: rank {rank} holds {tau:.1%} of its energy")
    return 1 - left / task.dense_mlp_params


def spectrum(task: Task, name: str, metric: Metric) -> np.ndarray:
    """A subtask: publishes and returns the singular values of a matrix in its metric, no more than it may keep."""
    if (published := task.published(f"{name}.spectrum", {})) is not None:
        return published["sigma"].numpy()
    W_mn, gram_nn, weight_m, _ = metric.problem(task, name)
    with named_errors(name):
        sigma_k = svd.singular_values(W_mn, gram_nn, weight_m)
    sigma_k = sigma_k[: spec.mlp_ranks(task.folder()).get(name)].cpu()
    task.publish(f"{name}.spectrum", {"sigma": sigma_k}, {})
    return sigma_k.numpy()


def factors(task: Task, name: str, rank: int, metric: Metric) -> None:
    """A subtask: publishes the tensors that take a matrix's place."""
    metadata = {"rank": rank}
    if task.published(name, metadata) is not None:
        return
    W_mn, gram_nn, weight_m, mean_n = metric.problem(task, name)
    with named_errors(name):
        B_mr, A_rn = svd.truncated_factors(W_mn, rank, gram_nn, weight_m)
    tensors: Tensors = {"A.weight": A_rn, "B.weight": B_mr}
    if task.settings.storage == "gauge":
        order_n, U_mr, C_rs = gauge.gauge(B_mr, A_rn)
        tensors = {"U.weight": U_mr, "C.weight": C_rs, "order": order_n}
    stored = _stored(task, name)
    if mean_n is not None:
        bias_m = stored[0].get("bias", torch.zeros(len(W_mn)))  # an earlier round may have left one
        tensors["bias"] = svd.mean_bias(W_mn, B_mr, A_rn, mean_n) + bias_m.to(W_mn.device)
    dtype = next(t.dtype for t in stored[0].values() if t.is_floating_point())
    typed = {key: t.to(dtype) if t.is_floating_point() else t for key, t in tensors.items()}
    task.publish(name, typed, metadata)


def plain(task: Task, name: str) -> Problem:
    """The error of the weights. With statistics it is scaled to nat: inputs are taken as independent and alike."""
    W_mn = matrix(task, name).to(task.device)
    if task.statistics is None:
        return Problem(W_mn, None, None, None)
    gram_nn, _, fisher_m, tokens = _measured(task, name)
    energy = gram_nn.diagonal().mean() / tokens
    return Problem(W_mn, None, (fisher_m.mean() * energy / 2).sqrt().expand(len(W_mn)), None)


def whitened(task: Task, name: str) -> Problem:
    """The error of the outputs on the calibration text, each output weighted by what the loss makes of it."""
    W_mn = matrix(task, name).to(task.device)
    gram_nn, sum_n, fisher_m, tokens = _measured(task, name)
    weight_m = (fisher_m / (2 * tokens)).sqrt()
    if task.settings.bias:
        return Problem(W_mn, svd.centred(gram_nn, sum_n, tokens), weight_m, sum_n / tokens)
    return Problem(W_mn, gram_nn, weight_m, None)


PLAIN = Metric(plain, joins=False)  # the paper decomposes single matrices
WHITENED = Metric(whitened, joins=True)


def _measured(task: Task, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Gram matrix [n, n] and sum [n] of a matrix's inputs, Fisher scalars [m] of its outputs, number of tokens."""
    layer, leaf = _layer_and_leaf(name)
    measured = task.layer_statistics(layer)
    side = "inner" if leaf == "down_proj" else "input"
    gram_nn, sum_n = (measured[f"{side}.{part}"].double().to(task.device) for part in ("gram", "sum"))
    leaves = (leaf,) if f"fisher.{leaf}" in measured else ("gate_proj", "up_proj")
    fisher_m = torch.cat([measured[f"fisher.{part}"] for part in leaves]).double().to(task.device)
    return gram_nn, sum_n, fisher_m, int(measured["tokens"])


def matrix(task: Task, name: str) -> torch.Tensor:
    """One MLP matrix [m, n] in float64, without loading the model. A joint name gives gate and up, stacked."""
    return torch.cat([low_rank.product(tensors) for tensors in _stored(task, name)])


def _stored(task: Task, name: str) -> list[Tensors]:
    """The stored tensors of a matrix: those of gate and of up where the model does not have the joint name."""
    folder, leaf = task.folder(), _layer_and_leaf(name)[1]
    stored = [tensors_below(folder, name)]
    if leaf == "gate_up_proj" and not stored[0]:
        stored = [tensors_below(folder, name.replace(leaf, part)) for part in ("gate_proj", "up_proj")]
    return stored


def _layer_and_leaf(name: str) -> tuple[int, str]:
    match = re.search(r"\blayers\.(\d+)\.", name)
    assert match, f"{name} is the matrix of a layer"
    return int(match[1]), name.rpartition(".")[2]


def _pairs(task: Task, shapes: Shapes) -> dict[str, tuple[str, str]]:
    """Joint name → gate and up, of every layer where these are two dense matrices. Factors are never joined."""
    gates = [name for name in shapes if name.endswith("gate_proj")]
    pairs = {n.replace("gate_proj", "gate_up_proj"): (n, n.replace("gate_proj", "up_proj")) for n in gates}
    low_rank_names = spec.mlp_ranks(task.folder()).keys()
    return {joint: pair for joint, pair in pairs.items() if not low_rank_names & set(pair)}


def _joint_wins(
    task: Task, shapes: Shapes, spectra: Mapping[str, np.ndarray], joint: str, pair: tuple[str, str]
) -> bool:
    """Whether one basis for both loses less than one each, at the budget's share of their parameters."""
    losses = {name: _tail(spectra[name], shapes[name], task) for name in (joint, *pair)}
    return losses[joint] < losses[pair[0]] + losses[pair[1]]


def _tail(sigma_k: np.ndarray, shape: tuple[int, int], task: Task) -> float:
    """Predicted loss of a matrix that keeps the budget's share of its parameters."""
    m, n = shape
    form = (task.settings.storage == "gauge", task.settings.bias)
    allowed = aligned_ranks(m, n, task.settings.align, *form)
    wanted = (1 - task.sparsity) * m * n
    rank = max((r for r in allowed if parameters(m, n, r, *form) <= wanted), default=0)
    return float((sigma_k[rank:] ** 2).sum())


def _ordered(shapes: Shapes) -> Shapes:
    """Sorted by layer; matrices of a layer keep the model's order."""
    leaves = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")

    def place(name: str) -> tuple[int, int]:
        layer, leaf = _layer_and_leaf(name)
        return layer, leaves.index(leaf)

    return {name: shapes[name] for name in sorted(shapes, key=place)}


def _replace(state: Tensors, name: str, tensors: Tensors) -> None:
    """Replaces a matrix's old tensors by its new ones. A joint matrix replaces gate and up."""
    parent, _, leaf = name.rpartition(".")
    leaves = ("gate_up_proj", "gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
    for key in [key for key in state if key.startswith(tuple(f"{parent}.{part}." for part in leaves))]:
        del state[key]
    state |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
