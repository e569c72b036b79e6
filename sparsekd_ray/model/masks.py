"""Masked models in training: weights that are zero stay zero, and a check proves it when the model is saved."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from sparsekd_ray.model.mlp import layer_count, mlp_weights


def freeze_zeros(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Stop the gradients of the MLP weights that are zero, so that AdamW leaves them exactly zero.

    Without a gradient there is no momentum, and the decay of zero is zero. The hooks sit on the parameters
    themselves and act before any optimiser, partitioned or not, sees a gradient. Call this function once, before
    training. Returns where the zeros are, module name → [m, n] (True for zero), for `changed_zeros`; an empty dict if
    the model's config has no `sparsekd_mask`.
    """
    if not getattr(model.config, "sparsekd_mask", None):
        return {}
    layers = range(layer_count(model))
    weights = {name: w for layer in layers for name, w in mlp_weights(model, layer).items()}
    zeros = {name: weight.detach() == 0 for name, weight in weights.items()}
    for name, weight in weights.items():
        if weight.requires_grad:
            weight.register_hook(_zeroing(zeros, name))
    return zeros


def _zeroing(zeros: dict[str, torch.Tensor], name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    def zeroed(gradient_mn: torch.Tensor) -> torch.Tensor:
        zeros[name] = zeros[name].to(gradient_mn.device)  # an engine may have moved the model since
        return gradient_mn.masked_fill(zeros[name], 0)

    return zeroed


def changed_zeros(model: PreTrainedModel, zeros: dict[str, torch.Tensor]) -> dict[str, int]:
    """How many weights that were zero in `freeze_zeros` are not zero now, by module name; empty if all stayed zero."""
    counts = {}
    for name, zeros_mn in zeros.items():
        weight = model.get_parameter(f"{name}.weight")
        counts[name] = int((weight.detach()[zeros_mn.to(weight.device)] != 0).sum())
    return {name: count for name, count in counts.items() if count}
