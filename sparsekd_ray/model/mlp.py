"""The gated MLP of any family as one type, and stock models made from other MLPs or fewer layers.

Phi-3 stores gate and up in one `gate_up_proj`, gate first; most families store them apart. Pruning by neurons, layers
or masks takes `MLP`s out of a model and puts others in, and does not depend on these names. The result is a new model
of the stock class. It shares no memory with the model that it was made from. That model is not changed.

Shapes: D hidden size, I neurons (intermediate size); y = down_DI (act(gate_ID x) · up_ID x).
"""

import copy
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from sparsekd_ray.errors import ModelError
from sparsekd_ray.model import loading, spec

TOKEN_LISTS = ("token_id", "token_ids", "architectures")  # ends of names of lists that are not per layer
LAYER = re.compile(r"\blayers\.(\d+)\.")


class MLP(NamedTuple):
    """Row i of gate and up and column i of down are neuron i."""

    gate_ID: torch.Tensor
    up_ID: torch.Tensor
    down_DI: torch.Tensor


def layer_count(model: PreTrainedModel) -> int:
    """Number of layers."""
    return int(model.config.num_hidden_layers)


def mlp_weights(model: PreTrainedModel, layer: int) -> dict[str, nn.Parameter]:
    """The MLP matrices of one layer as the model stores them, by module name, gate and up before down.

    Raises ModelError if one of them is stored as factors, or as anything but a linear layer without bias.
    """
    prefix = f"model.layers.{layer}.mlp."
    names = [name for name in spec.shapes_from_config(model) if name.startswith(prefix)]
    modules = {name: model.get_submodule(name) for name in names}
    for name, module in modules.items():
        if not isinstance(module, nn.Linear) or module.bias is not None:
            raise ModelError(
                f"{name} is a {type(module).__name__}, not a dense matrix: neurons, layers and masks are pruned in "
                "stock models; merge a low-rank student first"
            )
    return {name: module.weight for name, module in modules.items()}  # type: ignore[misc]


def view(stored: Iterable[torch.Tensor]) -> MLP:
    """An MLP of the values of `mlp_weights`, or of gradients or masks of the same shapes; nothing is copied."""
    *gate_up, down_DI = stored
    gate_ID, up_ID = gate_up if len(gate_up) == 2 else gate_up[0].chunk(2)
    return MLP(gate_ID, up_ID, down_DI)


def mlp_of(model: PreTrainedModel, layer: int) -> MLP:
    """The MLP of one layer, as detached views of the model's weights.

    Raises ModelError if the layer is low-rank, or holds a value that is not finite.
    """
    weights = mlp_weights(model, layer)
    for name, weight in weights.items():
        require_finite(f"{name}.weight", weight)
    return view(weight.detach() for weight in weights.values())


def require_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise ModelError, naming the tensor, if it holds NaN or infinity."""
    if not torch.isfinite(tensor).all():
        raise ModelError(
            f"{name} holds NaN or infinity: the model or its statistics are damaged, or the training diverged; "
            "load or calibrate it again"
        )


def with_width(model: PreTrainedModel, mlps: Sequence[MLP]) -> PreTrainedModel:
    """A stock model of the same family with these MLPs, one for each layer, all of one width.

    Raises ModelError for a low-rank model, ValueError if number or shapes of the MLPs do not fit.
    """
    width, state = _common_width(model, mlps), _copied_state(model)
    for layer, mlp in enumerate(mlps):
        names = [f"{name}.weight" for name in mlp_weights(model, layer)]
        fused = len(names) == 2
        tensors = (torch.cat(mlp[:2]), mlp.down_DI) if fused else mlp
        placed = [tensor.detach().to(model.device, model.dtype, copy=True) for tensor in tensors]
        state |= {name: tensor.contiguous() for name, tensor in zip(names, placed, strict=True)}
    return _rebuilt(model, state, intermediate_size=width)


def without_layers(model: PreTrainedModel, dropped: Collection[int]) -> PreTrainedModel:
    """A stock model without these layers (numbered from 0); the others keep their order and are numbered anew.

    Raises ModelError for a low-rank model, ValueError if a number is out of range or no layer would be left.
    """
    layers = layer_count(model)
    kept_layers = [layer for layer in range(layers) if layer not in set(dropped)]
    if not kept_layers or not set(dropped) <= set(range(layers)):
        raise ValueError(f"cannot drop {sorted(dropped)} of layers 0 to {layers - 1}: one at least must stay")
    place = {old: new for new, old in enumerate(kept_layers)}
    state = {
        LAYER.sub(lambda match: f"layers.{place[int(match[1])]}.", name): tensor
        for name, tensor in _copied_state(model, kept_layers).items()
    }
    return _rebuilt(
        model, state, num_hidden_layers=len(kept_layers), **for_layers(spec.config_dict(model), kept_layers)
    )


def for_layers(config: Mapping[str, object], kept: Sequence[int]) -> dict[str, object]:
    """The config's values per layer, cut to the layers that are kept: every list with one entry per layer."""
    layers = config["num_hidden_layers"]
    lists = {
        key: value
        for key, value in config.items()
        if isinstance(value, list | tuple) and len(value) == layers and not key.endswith(TOKEN_LISTS)
    }
    changes: dict[str, object] = {key: [value[layer] for layer in kept] for key, value in lists.items()}
    # Qwen: layers from this number on use the sliding window, if there is one
    if isinstance(first_sliding := config.get("max_window_layers"), int):
        changes["max_window_layers"] = sum(layer < first_sliding for layer in kept)
    return changes


def _common_width(model: PreTrainedModel, mlps: Sequence[MLP]) -> int:
    hidden, layers = int(model.config.hidden_size), layer_count(model)
    shapes = {tuple(tuple(matrix.shape) for matrix in mlp) for mlp in mlps}
    width = len(mlps[0].gate_ID) if mlps else 0
    if len(mlps) != layers or shapes != {((width, hidden), (width, hidden), (hidden, width))}:
        raise ValueError(
            f"{len(mlps)} MLPs of shapes {sorted(shapes)} for {layers} layers of hidden size {hidden}: allowed is one "
            "for each layer, all of the same width"
        )
    return width


def _copied_state(model: PreTrainedModel, kept: Collection[int] | None = None) -> dict[str, torch.Tensor]:
    """Copies of all tensors outside the MLPs; with `kept`, of all tensors outside the other layers."""
    if spec.is_low_rank(model):
        raise ModelError("a low-rank model has no stock form with other layers: merge it first")

    def wanted(name: str) -> bool:
        match = LAYER.search(name)
        return ".mlp." not in name if kept is None else match is None or int(match[1]) in kept

    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if wanted(name)}


def _rebuilt(model: PreTrainedModel, state: dict[str, torch.Tensor], **changes: object) -> PreTrainedModel:
    like = copy.copy(model)  # the same module with another config
    like.config = type(model.config).from_dict({**spec.config_dict(model), **changes})
    return loading.rebuild(like, None, state)
