"""Low-rank pruning of a whole model: a spectrum of every matrix, ranks under one budget, then the factors.

Spectra and factors are pieces, one for each matrix, that may run anywhere. With statistics at hand, every output (row)
is weighted by its Fisher scalar, so that Σ_{i>r} σ_i² is the predicted loss of rank r in nat per token: half the sum
over outputs of Fisher scalar times mean squared error, the second-order term of the loss where outputs are taken as
independent. So what the model is sensitive to is kept, in each matrix and between them.

Gate and up of a Qwen3 layer, two matrices of the same input, become one low-rank matrix with a shared basis where that
predicts the smaller loss at the same number of parameters. That is decided before the exact allocation, at the
budget's share, and so is a heuristic.

Shapes: m rows (outputs), n columns (inputs), r rank, k = min(m, n).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from sparsekd_ray.model import loading, low_rank, spec
from sparsekd_ray.model.cost import aligned_ranks, parameters
from sparsekd_ray.prune import allocate, gauge, svd
from sparsekd_ray.prune.task import Task, Tensors, naming, tensors_below
from sparsekd_ray.runtime.tasks import TaskMap

logger = logging.getLogger(__name__)

Shapes = dict[str, tuple[int, int]]


class Problem(NamedTuple):
    """One matrix as an approximation problem; `gram_nn` and `weight_m` None in plain SVD."""

    W_mn: torch.Tensor
    gram_nn: torch.Tensor | None
    weight_m: torch.Tensor | None
    mean_n: torch.Tensor | None


class Plan(NamedTuple):
    """What every matrix becomes; `loss` in nat per token, None where nothing was measured to predict it by."""

    shapes: Shapes
    ranks: dict[str, int | None]
    loss: dict[str, float] | None


def plan(task: Task, each: TaskMap) -> Plan:
    """Ranks of all matrices under the budget, which is checked before the first spectrum."""
    folder = task.folder()
    shapes = spec.shapes_from_config(folder)
    _choose(
        task,
        "uniform",
        {name: np.ones(_present(task, name, shape)) for name, shape in shapes.items()},
        shapes,
    )
    names = [*shapes, *(pairs := _pairs(task, shapes))]
    shapes |= {name: (2 * shapes[gate][0], shapes[gate][1]) for name, (gate, _) in pairs.items()}
    spectra: dict[str, np.ndarray] = {}
    for index, sigma_k in each(spectrum, [(task, name) for name in names]):
        spectra[names[index]] = sigma_k
        logger.info(f"spectrum {len(spectra)}/{len(names)} {names[index]}")
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
    """Ranks by a rule; ConfigError, whatever the spectra, where the budget is out of reach."""
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


def student(task: Task, each: TaskMap) -> tuple[Any, dict[str, Any]]:
    """The low-rank model, and its ranks and predicted loss."""
    planned, model = plan(task, each), task.load()
    held, gauged = spec.mlp_ranks(model), task.settings.storage == "gauge"
    same_form = spec.mlp_form(model) == (gauged, task.settings.bias)
    wanted = {name: rank or held.get(name) for name, rank in planned.ranks.items()}
    changed = {
        name: rank
        for name, rank in wanted.items()
        if rank is not None and (rank != held.get(name) or not same_form)
    }
    state, names = dict(model.state_dict()), list(changed)
    pieces = [(task, name, rank) for name, rank in changed.items()]
    for done, (index, _) in enumerate(each(factors, pieces), 1):
        logger.info(f"factors {done}/{len(names)} {names[index]} rank {changed[names[index]]}")
    for name, rank in changed.items():
        found = task.published(name, {"rank": rank})
        assert found is not None, f"{name} has just been made"
        _replace(state, name, found)
    ranks = {name: rank for name, rank in wanted.items() if rank is not None}
    cut = loading.rebuild(model, ranks, state, gauge=gauged, bias=task.settings.bias)
    return cut, {"ranks": planned.ranks, "predicted_loss": planned.loss and sum(planned.loss.values())}


def sparsity_at(task: Task, tau: float, each: TaskMap) -> float:
    """The share of the dense model's MLP parameters that goes where every matrix keeps the smallest rank with `tau` of
    its energy, and stays as it is where that saves nothing (SparseKD's rule before there is a budget)."""
    shapes, left = spec.shapes_from_config(task.folder()), 0
    form = (task.settings.storage == "gauge", task.settings.bias)
    for index, sigma_k in each(spectrum, [(task, name) for name in shapes]):
        name = list(shapes)[index]
        rank = svd.energy_rank(torch.from_numpy(sigma_k), tau)
        left += min(parameters(*shapes[name], rank, *form), parameters(*shapes[name], None))
        logger.info(f"{name}: rank {rank} holds {tau:.1%} of its energy")
    return 1 - left / task.dense_mlp_params


def spectrum(task: Task, name: str) -> np.ndarray:
    """A piece: the singular values of a matrix, as many as it may keep at most, scaled as told above; published."""
    if (found := task.published(f"{name}.spectrum", {})) is not None:
        return found["sigma"].numpy()
    W_mn, gram_nn, weight_m, _ = problem(task, name)
    with naming(name):
        sigma_k = svd.singular_values(W_mn, gram_nn, weight_m)
    sigma_k = sigma_k[: spec.mlp_ranks(task.folder()).get(name)].cpu()
    task.publish(f"{name}.spectrum", {"sigma": sigma_k}, {})
    return sigma_k.numpy()


def factors(task: Task, name: str, rank: int) -> None:
    """A piece: the tensors that take a matrix's place, published."""
    about = {"rank": rank}
    if task.published(name, about) is not None:
        return
    W_mn, gram_nn, weight_m, mean_n = problem(task, name)
    with naming(name):
        B_mr, A_rn = svd.truncated_factors(W_mn, rank, gram_nn, weight_m)
    held: Tensors = {"A.weight": A_rn, "B.weight": B_mr}
    if task.settings.storage == "gauge":
        order_n, U_mr, C_rs = gauge.gauge(B_mr, A_rn)
        held = {"U.weight": U_mr, "C.weight": C_rs, "order": order_n}
    if mean_n is not None:
        bias_m = _held(task, name)[0].get("bias", torch.zeros(len(W_mn)))  # of an earlier round
        held["bias"] = svd.mean_bias(W_mn, B_mr, A_rn, mean_n) + bias_m.to(W_mn.device)
    dtype = _stored_type(task, name)
    task.publish(name, {key: t.to(dtype) if t.is_floating_point() else t for key, t in held.items()}, about)


def problem(task: Task, name: str) -> Problem:
    """The matrix, and in which metric its error counts: that of the outputs on the calibration text, or plain."""
    W_mn = matrix(task, name).to(task.device)
    whitened = task.settings.method == "svd-whitened"
    if task.statistics is None:
        return Problem(W_mn, None, None, None)
    layer, leaf = _place(name)
    found = task.layer(layer)
    side, tokens = "inner" if leaf == "down_proj" else "input", int(found["tokens"])
    gram_nn, sum_n = (found[f"{side}.{part}"].double().to(task.device) for part in ("gram", "sum"))
    fisher_m = torch.cat([found[f"fisher.{part}"] for part in _parts(leaf, found)]).double().to(task.device)
    if not whitened:  # plain SVD takes the inputs as independent and alike
        energy = gram_nn.diagonal().mean() / tokens
        return Problem(W_mn, None, (fisher_m.mean() * energy / 2).sqrt().expand(len(W_mn)), None)
    weight_m = (fisher_m / (2 * tokens)).sqrt()
    if task.settings.bias:
        return Problem(W_mn, svd.centred(gram_nn, sum_n, tokens), weight_m, sum_n / tokens)
    return Problem(W_mn, gram_nn, weight_m, None)


def matrix(task: Task, name: str) -> torch.Tensor:
    """One MLP matrix in float64, without loading the model; gate and up stacked under their joint name."""
    return torch.cat([low_rank.product(tensors) for tensors in _held(task, name)])


def _held(task: Task, name: str) -> list[Tensors]:
    """What is stored of a matrix: once, or of gate and up where the joint name is not the model's own."""
    folder, leaf = task.folder(), _place(name)[1]
    held = [tensors_below(folder, name)]
    if leaf == "gate_up_proj" and not held[0]:
        held = [tensors_below(folder, name.replace(leaf, part)) for part in ("gate_proj", "up_proj")]
    return held


def _parts(leaf: str, found: Tensors) -> tuple[str, ...]:
    """The matrices whose outputs were measured, that make up `leaf`."""
    return ("gate_proj", "up_proj") if f"fisher.{leaf}" not in found else (leaf,)


def _place(name: str) -> tuple[int, str]:
    found = re.search(r"\blayers\.(\d+)\.", name)
    assert found, f"{name} is the matrix of a layer"
    return int(found[1]), name.rpartition(".")[2]


def _pairs(task: Task, shapes: Shapes) -> dict[str, tuple[str, str]]:
    """Joint name → gate and up, of every layer where these are two dense matrices that may become one.

    None in plain SVD, which is of single matrices in the paper; and factors are never forced together afterwards.
    """
    if task.settings.method == "svd":
        return {}
    gates = [name for name in shapes if name.endswith("gate_proj")]
    pairs = {n.replace("gate_proj", "gate_up_proj"): (n, n.replace("gate_proj", "up_proj")) for n in gates}
    held = spec.mlp_ranks(task.folder())
    return {joint: pair for joint, pair in pairs.items() if not held.keys() & set(pair)}


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
    """By layer, and in a layer as in the model."""
    order = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
    return dict(
        sorted(shapes.items(), key=lambda item: (_place(item[0])[0], order.index(_place(item[0])[1])))
    )


def _stored_type(task: Task, name: str) -> torch.dtype:
    return next(t.dtype for t in _held(task, name)[0].values() if t.is_floating_point())


def _replace(state: Tensors, name: str, found: Tensors) -> None:
    """Puts a matrix's new tensors into a state in the place of the old ones, of gate and up where it is both."""
    parent = name.rpartition(".")[0]
    leaves = (
        ("gate_up_proj", "gate_proj", "up_proj")
        if name.endswith("gate_up_proj")
        else (name.rpartition(".")[2],)
    )
    for key in [key for key in state if key.startswith(tuple(f"{parent}.{leaf}." for leaf in leaves))]:
        del state[key]
    state |= {f"{name}.{key}": tensor for key, tensor in found.items()}
