"""The measurements that pruning takes of a model on calibration text: second moments, sensitivities and angles.

Each MLP has Gram matrices Σ x xᵀ and sums Σ x over all tokens, of its own input x (which gate and up read) and of the
input h of down_proj. Each output y_i of each of its matrices has an empirical Fisher scalar, the mean over tokens of
(∂NLL/∂y_i)², where NLL is summed over a sequence's own next tokens (Martens, arXiv 1412.1193, §5). The stack of layers
has the angle that the residual stream turns between any two blocks (Gromov et al., arXiv 2403.17887) and the change
that each block makes to it (ShortGPT, arXiv 2403.03853).

One forward and one backward pass per batch give all of it. The batches depend on the text alone, and no two layers
share a sum. So a layer's figures are the same bit for bit, whichever layers are measured beside it.

Shapes: B sequences, L tokens each, N = B·L tokens, n tokens of a chunk, D hidden size, K inputs of a matrix, V
vocabulary, S stations of the residual stream (before each block, and after the last).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from sparsekd_ray.errors import ModelError
from sparsekd_ray.model import head
from sparsekd_ray.model.mlp import layer_count
from sparsekd_ray.runtime.logging import log_progress

logger = logging.getLogger(__name__)

# bounds the activations kept for the backward pass; the last bits of a sum depend on it
TOKENS_PER_BATCH = 1024

Sums = dict[str, Tensor]


def collect(model: PreTrainedModel, ids_BL: Tensor, layers: Sequence[int]) -> dict[int, dict[str, Tensor]]:
    """The statistics of the MLPs of these layers. Leaves the model in eval mode, its weights frozen.

    By layer, in fp32 on the model's device: `input.gram` [D, D] and `input.sum` [D] of the MLP's input, `inner.gram`
    and `inner.sum` of down_proj's, `fisher.<matrix>` [outputs] of each matrix by the name it has in the MLP; and
    `tokens`, the number that went into each. ModelError, with layer and tensor, for values that are not finite.
    """
    model.eval().requires_grad_(False)
    layers = sorted(layers)
    mlps = {index: model.get_submodule(f"model.layers.{index}.mlp") for index in layers}
    measured: dict[int, Sums] = {index: {} for index in layers}
    handles = [mlps[layers[0]].register_forward_pre_hook(_begin_graph)]
    for index in layers:
        handles += _watch(mlps[index], measured[index])
    try:
        with _exact_products():
            for done, batch_BL in batches(ids_BL):
                _forward_backward(model, batch_BL.to(model.device))
                log_progress(logger, f"layers {layers[0]} to {layers[-1]}: {done}/{len(ids_BL)} sequences")
    finally:
        for handle in handles:
            handle.remove()
    _check(measured)
    for sums in measured.values():
        for name in [name for name in sums if name.startswith("fisher.")]:
            sums[name] /= ids_BL.numel()
        sums["tokens"] = torch.tensor(ids_BL.numel())
    return measured


@torch.no_grad()
def stack(model: PreTrainedModel, ids_BL: Tensor) -> dict[str, Tensor]:
    """How the residual stream turns, fp32. ModelError for a stream that is not finite.

    `angle` [layers + 1, layers + 1]: mean over sequences of arccos(cos)/π between the streams entering blocks a and b
    at the last token; the last index is the stream after the last block, before the final norm. `influence` [layers]:
    1 − the mean over all tokens of cos(entering, leaving the block).
    """
    model.eval()
    blocks = [model.get_submodule(f"model.layers.{index}") for index in range(layer_count(model))]
    stations = [*blocks, model.get_submodule("model.norm")]
    stream_SBLD: list[Tensor] = []
    handles = [
        station.register_forward_pre_hook(lambda _, args: stream_SBLD.append(args[0])) for station in stations
    ]
    angle_SS = torch.zeros(len(stations), len(stations), dtype=torch.float64)
    cosine_S = torch.zeros(len(stations) - 1, dtype=torch.float64)
    try:
        for _, batch_BL in batches(ids_BL):
            stream_SBLD.clear()
            model.base_model(input_ids=batch_BL.to(model.device), use_cache=False)
            angle_SS += _angles(stream_SBLD).cpu()
            cosine_S += _cosines(stream_SBLD).cpu()
    finally:
        for handle in handles:
            handle.remove()
    influence_S = 1 - cosine_S / ids_BL.numel()
    for index, value in enumerate(influence_S.tolist()):
        if not math.isfinite(value):
            raise ModelError(_not_finite(f"the residual stream around layer {index}"))
    return {"angle": (angle_SS / len(ids_BL)).float(), "influence": influence_S.float()}


def batches(ids_BL: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(sequences so far, the next few sequences). The cuts depend on the length of a sequence and on nothing else."""
    size, done = max(1, TOKENS_PER_BATCH // ids_BL.shape[1]), 0
    for batch_BL in ids_BL.split(size):
        done += len(batch_BL)
        yield done, batch_BL


@torch.no_grad()
def nll_gradient(hidden_BLD: Tensor, head_VD: Tensor, ids_BL: Tensor) -> Tensor:
    """∂NLL/∂hidden [B, L, D] of the negative log-likelihood summed over every token but each sequence's first.

    ∂NLL/∂logits is softmax(logits) − onehot(next token); both exist for `head.ROWS_PER_CHUNK` positions at a time.
    """
    hidden_ND, labels_N = hidden_BLD[:, :-1].flatten(0, 1), ids_BL[:, 1:].flatten()
    parts = []
    for logits_nV, labels_n in zip(
        head.chunks(hidden_ND, head_VD), labels_N.split(head.ROWS_PER_CHUNK), strict=True
    ):
        grad_nV = logits_nV.softmax(-1)
        grad_nV.scatter_add_(1, labels_n[:, None], -torch.ones_like(grad_nV[:, :1]))
        parts.append(grad_nV.to(head_VD.dtype) @ head_VD)
    grad_BLD = torch.zeros_like(hidden_BLD)  # the last token of a sequence predicts nothing
    grad_BLD[:, :-1] = torch.cat(parts).view_as(grad_BLD[:, :-1])
    return grad_BLD


def _forward_backward(model: PreTrainedModel, ids_BL: Tensor) -> None:
    hidden_BLD = head.hidden_states(model, ids_BL)
    hidden_BLD.backward(nll_gradient(hidden_BLD, head.weight(model), ids_BL))


def _begin_graph(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Makes the first measured MLP's input the only leaf, so that nothing before it is kept or differentiated."""
    return (args[0].detach().requires_grad_(), *args[1:])


def _watch(mlp: nn.Module, sums: Sums) -> list[RemovableHandle]:
    """Hooks that add what passes through one MLP to `sums`. Its matrices may be dense, low-rank or joint."""
    down_proj = mlp.get_submodule("down_proj")
    handles = [
        mlp.register_forward_pre_hook(lambda _, args: _add_moments(sums, "input", args[0])),
        down_proj.register_forward_pre_hook(lambda _, args: _add_moments(sums, "inner", args[0])),
    ]
    for name, matrix in mlp.named_children():
        if name.endswith("_proj"):
            handles.append(matrix.register_forward_hook(_fisher_hook(sums, f"fisher.{name}")))
    return handles


@torch.no_grad()
def _add_moments(sums: Sums, name: str, x_BLK: Tensor) -> None:
    x_NK = x_BLK.flatten(0, 1).float()
    width = x_NK.shape[1]
    gram_KK = sums.setdefault(f"{name}.gram", x_NK.new_zeros(width, width))
    gram_KK.addmm_(x_NK.T, x_NK)
    sums.setdefault(f"{name}.sum", x_NK.new_zeros(width)).add_(x_NK.sum(0))


def _fisher_hook(sums: Sums, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """A forward hook that has the gradient of the module's output squared and added on its way back."""

    def add(grad: Tensor) -> None:
        squares_K = grad.flatten(0, 1).float().square().sum(0)
        sums.setdefault(name, torch.zeros_like(squares_K)).add_(squares_K)

    def watch(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(add)

    return watch


@contextmanager
def _exact_products() -> Iterator[None]:
    """fp32 products in fp32: no TF32, whatever the process has allowed elsewhere."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _check(measured: dict[int, Sums]) -> None:
    """ModelError for the first sum that is not finite in the order of computation: activations, then gradients."""
    moments = [(layer, name) for layer, sums in measured.items() for name in sums if "fisher." not in name]
    fisher = [
        (layer, name) for layer, sums in reversed(measured.items()) for name in sums if "fisher." in name
    ]
    for layer, name in moments + fisher:
        if not torch.isfinite(measured[layer][name].sum()):
            raise ModelError(_not_finite(f"layer {layer}: {name}"))


def _not_finite(quantity: str) -> str:
    return (
        f"{quantity} is NaN or infinite over the calibration text: the model's weights are damaged or its precision "
        "does not hold its activations; no statistics were written"
    )


def _angles(stream_SBLD: list[Tensor]) -> Tensor:
    """[S, S] float64: the angles between every two stations at the last token, over π, summed over sequences."""
    last_BSD = F.normalize(torch.stack([h_BLD[:, -1] for h_BLD in stream_SBLD], 1).double(), dim=-1)
    turned_SS = ((last_BSD @ last_BSD.mT).clamp(-1, 1).arccos() / math.pi).sum(0)
    return turned_SS.fill_diagonal_(0)  # rounding leaves 1e-8 there


def _cosines(stream_SBLD: list[Tensor]) -> Tensor:
    """[S − 1] float64: the cosine between consecutive stations, summed over all tokens."""
    cosines = [F.cosine_similarity(a.float(), b.float(), dim=-1) for a, b in pairwise(stream_SBLD)]
    return torch.stack([cosine_BL.sum(dtype=torch.float64) for cosine_BL in cosines])
