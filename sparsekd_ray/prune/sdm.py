"""SDMPrune: which MLP neurons a model would miss least, from its gradients (Zhu and Shen 2025).

For one calibration sample, with g the gradient of its loss, neuron i contributes to hidden dimension j
    | W_d[j,i] g_d[j,i] + W_u[i,j] g_u[i,j] + W_g[i,j] g_g[i,j] |,
the first-order change of the loss if these three weights were removed (the sum is signed: their joint effect). The
importance of neuron i is the mean over j of the sum over samples. Attention is untouched, and all
layers keep the same number of neurons.

The loss should contain the KL to the unpruned model, which knows more than one-hot labels. But at temperature 1 the KL
of a model to itself is zero, and so is its gradient. The method therefore has two phases. A small cut is made by
cross-entropy alone. The slightly cut model is then scored with (1 − α) · CE + α · KL and cut to size. The teacher comes
from the cache, at its own temperature (the paper: below 1, where the distance is not quite zero). The student's is 1.

Shapes: L tokens of a sample, D hidden size, I neurons, K neurons kept.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from sparsekd_ray.distill.loss import kd_loss
from sparsekd_ray.errors import ModelError
from sparsekd_ray.model import head
from sparsekd_ray.model.mlp import MLP, layer_count, mlp_of, mlp_weights, require_finite, view
from sparsekd_ray.prune.neurons import keep
from sparsekd_ray.teacher.signal import Target

Samples = Sequence[torch.Tensor] | torch.Tensor
"""Token ids [L] of each sample; or [B, L]."""
Loss = Callable[[torch.Tensor, int], torch.Tensor]
"""Final hidden states of a sample [1, L, D] and the sample's number → scalar to differentiate."""


def select(
    model: PreTrainedModel,
    samples: Samples,
    width: int,
    *,
    targets: Sequence[Target],
    alpha: float,
    first: float = 0.025,
    align: int = 1,
) -> list[torch.Tensor]:
    """The `width` neurons to keep in each layer, rising (SDMPrune's two phases).

    The model is changed: phase 1 narrows it in place, so that no second copy is in memory.

    samples: token ids [L] each; targets: for each sample the teacher's L − 1 positions, at the teacher's
    temperature; alpha: weight of the KL in phase 2; first: share of the neurons that phase 1 cuts, brought to a
    multiple of `align` (matrix products of other widths are slow). If the whole cut is no larger than
    that, phase 1 makes it. Raises ModelError, naming the layer, if weights or gradients are not finite.
    """
    present = int(model.config.intermediate_size)
    if len(samples) != len(targets) or len(samples) == 0 or not 0 < width <= present:
        raise ValueError(
            f"{len(samples)} samples, {len(targets)} targets, width {width} of {present}: give one target for each "
            f"sample and a width from 1 to {present}"
        )
    first_width = max(width, _first_width(present, first, align))
    scores = importance(model, samples, _loss(model, samples, targets, 0.0))
    kept = [keep(score_I, first_width) for score_I in scores]
    if first_width == width:
        return kept
    _narrow(model, kept)
    scores = importance(model, samples, _loss(model, samples, targets, alpha))
    return [kept_K[keep(score_K, width)] for kept_K, score_K in zip(kept, scores, strict=True)]


def importance(model: PreTrainedModel, samples: Samples, loss: Loss) -> list[torch.Tensor]:
    """SDMPrune's importance of every neuron, [I] in float64 for each layer, by the formula at the top of this file.

    One forward and backward pass per sample, because of the absolute value; each layer's gradients are used and
    freed before those of the layer below it exist. The model is left as it was.
    """
    scores = [
        torch.zeros(model.config.intermediate_size, dtype=torch.float64) for _ in range(layer_count(model))
    ]
    with _gradients_taken(model, scores), torch.enable_grad():
        for index, ids_L in enumerate(samples):
            ids_1L = ids_L[None].to(model.device)
            loss(head.hidden_states(model, ids_1L), index).backward()
    for layer, score_I in enumerate(scores):
        require_finite(f"the importance of model.layers.{layer}.mlp (its gradients)", score_I)
    return scores


@contextmanager
def _gradients_taken(model: PreTrainedModel, scores: list[torch.Tensor]) -> Iterator[None]:
    """Inside, only MLP weights get gradients. Those of a layer are added to its score and freed."""
    layers = [list(mlp_weights(model, layer).values()) for layer in range(len(scores))]
    for layer in range(len(scores)):
        mlp_of(model, layer)  # refuses values that are not finite
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    training = model.training
    hooks = []
    try:
        model.eval().requires_grad_(False)
        for weights, score_I in zip(layers, scores, strict=True):
            for weight in weights:
                weight.requires_grad_(True).grad = None
                hooks.append(weight.register_post_accumulate_grad_hook(_adder(weights, score_I)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, required, gradient in before:
            parameter.requires_grad_(required).grad = gradient
        model.train(training)


def _adder(weights: list[nn.Parameter], score_I: torch.Tensor) -> Callable[[torch.Tensor], None]:
    def add(_: torch.Tensor) -> None:
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        if len(gradients) == len(weights):  # the last gradient of this layer
            score_I.add_(contribution(view(weights), view(gradients)).cpu())
            for weight in weights:
                weight.grad = None

    return add


@torch.no_grad()
def contribution(mlp: MLP, gradient: MLP) -> torch.Tensor:
    """|W_d g_d + W_u g_u + W_g g_g| of one sample, mean over the hidden dimensions, [I] in float64."""
    sum_ID = mlp.gate_ID.float() * gradient.gate_ID.float()
    sum_ID.addcmul_(mlp.up_ID.float(), gradient.up_ID.float())
    sum_ID.addcmul_(mlp.down_DI.T.float(), gradient.down_DI.T.float())
    return sum_ID.abs_().sum(1, dtype=torch.float64) / sum_ID.shape[1]


def _loss(model: PreTrainedModel, samples: Samples, targets: Sequence[Target], alpha: float) -> Loss:
    """(1 − α) · CE + α · KL, each the mean over the sample's predictions."""
    head_VD = head.weight(model)

    def loss(hidden_1LD: torch.Tensor, index: int) -> torch.Tensor:
        labels_N, device = samples[index][1:].to(head_VD.device), head_VD.device
        target = Target(*(column.to(device) for column in targets[index]))
        if len(target.tail_N) != len(labels_N):
            raise ModelError(
                f"sample {index} has {len(labels_N)} predictions, its target {len(target.tail_N)} positions: take "
                "targets from a cache of these very samples"
            )
        weights = {"kl_weight": alpha / len(labels_N), "ce_weight": (1 - alpha) / len(labels_N)}
        # the target is tempered already; 1 is the student's temperature
        return kd_loss(hidden_1LD[0, :-1], head_VD, labels_N, target, temperature=1.0, **weights)[0]

    return loss


def _first_width(present: int, first: float, align: int) -> int:
    """Neurons that phase 1 leaves: the multiple of `align` nearest to its share, but below the present width."""
    nearest = int((1 - first) * present / align + 0.5) * align
    return min(nearest, (present - 1) // align * align)


@torch.no_grad()
def _narrow(model: PreTrainedModel, kept: Sequence[torch.Tensor]) -> None:
    """Leaves these neurons in each layer, in place."""
    for layer, kept_K in enumerate(kept):
        weights = mlp_weights(model, layer)
        *inputs, output = weights
        for name in inputs:  # gate and up, or both in one matrix
            parts = weights[name].chunk(3 - len(inputs))
            _replace(model, name, torch.cat([part_ID[kept_K.to(part_ID.device)] for part_ID in parts]))
        down_DI = weights[output]
        _replace(model, output, down_DI[:, kept_K.to(down_DI.device)])
    model.config.intermediate_size = len(kept[0])


def _replace(model: PreTrainedModel, name: str, weight_mn: torch.Tensor) -> None:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear), f"{name} is an MLP matrix"
    linear.weight = nn.Parameter(weight_mn.contiguous())
    linear.out_features, linear.in_features = weight_mn.shape
