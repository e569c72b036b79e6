"""Zeros in place of single weights: Wanda and magnitude pruning (`model/masks.py` keeps them through training).

These are controls. They show what is lost when shapes stay as they are: nothing gets smaller or faster, since a
dense matrix product costs the same with zeros in it. The zeros go into the given model. It is not copied, so a
model that fills most of a GPU still fits. The result is a stock model; `structured.masked` writes `sparsekd_mask` into
its config.

Wanda (Sun et al. 2023) scores a weight by |W_ij| · ‖X_j‖₂, with X_j the j-th input over all calibration tokens, and
drops the lowest of each output row. It goes through the layers in order, and the inputs that it measures at a layer
have passed through the layers that are pruned already. Magnitude pruning drops the smallest |W_ij| of each matrix.

Shapes: W_mn a matrix as the model stores it (m outputs, n inputs), B sequences, L tokens, D hidden size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sparsekd_ray.errors import ConfigError
from sparsekd_ray.model.mlp import layer_count, mlp_of, mlp_weights, require_finite

SEQUENCES_PER_BATCH = 8


def wanda_mask(W_mn: torch.Tensor, norm_n: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Which weights stay (True): all but the lowest |W_ij| · norm_j of each row (Wanda, section 3).

    Exactly round(sparsity · m · n) go, spread over the rows so that no two differ by more than one. Among equal
    scores smaller weights go first, then those further left. norm_n: the norm of each input.
    """
    _check(W_mn, sparsity)
    require_finite("norm_n", norm_n)
    m, n = W_mn.shape
    size_mn = W_mn.detach().abs().float()
    by_size_mn = size_mn.argsort(dim=-1, stable=True)
    score_mn = (size_mn * norm_n.float()).gather(1, by_size_mn)
    order_mn = by_size_mn.gather(1, score_mn.argsort(dim=-1, stable=True))
    # zeros up to and including row i are the total's share of i + 1 rows, rounded down
    upto_m = torch.arange(m + 1, device=W_mn.device) * round(sparsity * m * n) // m
    kept_mn = torch.arange(n, device=W_mn.device) >= upto_m.diff()[:, None]
    return torch.empty_like(kept_mn).scatter_(1, order_mn, kept_mn)


def magnitude_mask(W_mn: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Which weights stay (True): all but the round(sparsity · m · n) smallest; among equal ones the first go first."""
    _check(W_mn, sparsity)
    size_N, count = W_mn.detach().abs().float().flatten(), round(sparsity * W_mn.numel())
    if count == 0:
        return torch.ones_like(W_mn, dtype=torch.bool)
    threshold = size_N.kthvalue(count).values
    kept_N = size_N > threshold
    ties = (size_N == threshold).nonzero()[:, 0]
    kept_N[ties[count - int((size_N < threshold).sum()) :]] = True
    return kept_N.view(W_mn.shape)


def _check(W_mn: torch.Tensor, sparsity: float) -> None:
    require_finite("W_mn", W_mn)
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity {sparsity}: a share from 0 to 1 of the matrix's weights")


@torch.no_grad()
def magnitude(model: PreTrainedModel, sparsity: float) -> PreTrainedModel:
    """The model with the smallest of each MLP matrix's weights set to zero; sparsity is their share.

    Raises as `wanda` does.
    """
    _check_model(model, sparsity)
    for layer in range(layer_count(model)):
        for weight in mlp_weights(model, layer).values():
            weight.masked_fill_(~magnitude_mask(weight, sparsity), 0)
    return model


@torch.no_grad()
def wanda(model: PreTrainedModel, ids_BL: torch.Tensor, sparsity: float) -> PreTrainedModel:
    """The model with the weights of least Wanda score set to zero in each MLP matrix; sparsity is their share.

    Each layer runs twice on what the pruned layers before it give: to measure, and pruned, to feed the next one.
    One set of hidden states [B, L, D] is kept. Raises ConfigError if the model has more zeros than that already,
    ModelError, naming the tensor, if weights or activations are not finite.
    """
    _check_model(model, sparsity)
    parts = [ids_BL[i : i + SEQUENCES_PER_BATCH] for i in range(0, len(ids_BL), SEQUENCES_PER_BATCH)]
    hidden = [model.get_input_embeddings()(part_bL.to(model.device)) for part_bL in parts]
    one_of_each = {len(part_bL): part_bL.to(model.device) for part_bL in parts}
    arguments = {length: _layer_arguments(model, part_bL) for length, part_bL in one_of_each.items()}
    for index in range(layer_count(model)):
        layer, weights = model.get_submodule(f"model.layers.{index}"), mlp_weights(model, index)
        squares = {name: torch.zeros(w.shape[1], dtype=torch.float64) for name, w in weights.items()}
        hooks = [
            model.get_submodule(name).register_forward_pre_hook(_adder(squares, name)) for name in weights
        ]
        for part_bLD in hidden:
            layer(part_bLD, **arguments[len(part_bLD)][index])
        for hook in hooks:
            hook.remove()
        for name, weight in weights.items():
            require_finite(f"the input of {name}", squares[name])
            norm_n = squares[name].sqrt().to(weight.device)
            weight.masked_fill_(~wanda_mask(weight, norm_n, sparsity), 0)
        for i, part_bLD in enumerate(hidden):
            hidden[i] = layer(part_bLD, **arguments[len(part_bLD)][index])
    return model


def _adder(
    squares: dict[str, torch.Tensor], name: str
) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def add(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        squares[name] += inputs[0].flatten(0, -2).float().square().sum(0, dtype=torch.float64).cpu()

    return add


def _layer_arguments(model: PreTrainedModel, ids_bL: torch.Tensor) -> list[dict[str, Any]]:
    """The arguments that the model passes to each of its layers beside the hidden states, for sequences of this shape.

    Masks and rotary tables depend on the layer's type and on the shape alone, so one forward pass gives them.
    """
    passed: list[dict[str, Any]] = []

    def record(module: nn.Module, inputs: tuple[torch.Tensor, ...], arguments: dict[str, Any]) -> None:
        passed.append(arguments)

    layers = [model.get_submodule(f"model.layers.{index}") for index in range(layer_count(model))]
    hooks = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    model.base_model(input_ids=ids_bL, use_cache=False)
    for hook in hooks:
        hook.remove()
    return passed


def _check_model(model: PreTrainedModel, sparsity: float) -> None:
    """ModelError for weights that are not finite, ConfigError for more zeros than are asked for."""
    mlps = [mlp_of(model, layer) for layer in range(layer_count(model))]
    total = sum(matrix.numel() for mlp in mlps for matrix in mlp)
    zeros = sum(int((matrix == 0).sum()) for mlp in mlps for matrix in mlp)
    if not 0 < sparsity < 1 or zeros > sparsity * total + 1:
        raise ConfigError(
            f"sparsity {sparsity:.4g} of {total} MLP weights, of which {zeros} are zero now: ask for a share above "
            f"{zeros / total:.4f} and below 1"
        )
