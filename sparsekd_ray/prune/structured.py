"""Pruning that leaves a stock model: fewer neurons in every layer, fewer layers, or zeros in place of weights.

Each way is cut into pieces that may run anywhere: a layer's neurons are chosen and refitted on their own; what looks at
the whole model at once (gradients, Wanda's pruned prefix) is one piece.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from sparsekd_ray.errors import ModelError
from sparsekd_ray.model import spec
from sparsekd_ray.model.mlp import MLP, layer_count, mlp_weights, view, with_width, without_layers
from sparsekd_ray.prune import calibrate, depth, masks, neurons, sdm
from sparsekd_ray.prune.task import Task, Tensors, tensors_below
from sparsekd_ray.runtime.tasks import TaskMap
from sparsekd_ray.teacher.forward import tokens
from sparsekd_ray.teacher.signal import Target

logger = logging.getLogger(__name__)

Made = tuple[Any, dict[str, Any]]  # a model, and facts about it
MASKED, IMPORTANT = "masked", "important"


def by_activations(task: Task, each: TaskMap) -> Made:
    """The neurons missed least removed from every layer, the others refitted to do their work."""
    return _narrower(task, width_of(task), None, each)


def by_gradients(task: Task, each: TaskMap) -> Made:
    """Neurons of least SDMPrune importance removed; the others refitted, which the paper does not do."""
    width = width_of(task)
    logger.info(f"gradients of {task.calibrate.samples} sequences, twice")
    ((_, kept),) = each(important, [(task, width)])
    return _narrower(task, width, kept, each)


def shallower(task: Task, each: TaskMap) -> Made:
    """Whole layers removed, by the angles or the influence that were measured."""
    model, dropped = task.load(), layers_to_drop(task)
    logger.info(f"drops layers {', '.join(map(str, dropped))} of {layer_count(model)}")
    return without_layers(model, dropped), {"dropped": dropped}


def layers_to_drop(task: Task) -> list[int]:
    """As many layers as the sparsity comes nearest to."""
    found, layers = task.stack(), spec.config_dict(task.folder())["num_hidden_layers"]
    number = depth.count(layers, share_of(task))
    if task.settings.drop == "block":
        return depth.block(found["angle"], number)
    return depth.influence(found["influence"], number)


def masked(task: Task, each: TaskMap) -> Made:
    """The same shapes with zeros in them."""
    logger.info(f"{task.settings.method} masks of every MLP matrix")
    for _ in each(zeroed, [(task,)]):
        pass
    model, found = task.load(), task.published(MASKED, {})
    assert found is not None, "the masks have just been made"
    model.load_state_dict(found, strict=False)  # only the MLP matrices are in it
    model.config.mlp_mask = task.settings.method
    return model, {}


def zeroed(task: Task) -> None:
    """A piece: publishes every MLP matrix with its zeros."""
    if task.published(MASKED, {}) is not None:
        return
    model, share = task.load(task.device), share_of(task)
    if task.settings.method == "magnitude":
        cut = masks.magnitude(model, share)
    else:
        cut = masks.wanda(model, _sequences(task), share)
    held = [mlp_weights(cut, layer) for layer in range(layer_count(cut))]
    found = {f"{name}.weight": weight.detach() for layer in held for name, weight in layer.items()}
    task.publish(MASKED, found, {})


def narrow(task: Task, layer: int, width: int, kept: list[int] | None) -> None:
    """A piece: publishes one layer's MLP with `width` neurons, those `kept` or else those that activations choose, and
    the loss that this is predicted to cost."""
    about = {"width": width, "kept": kept}
    if task.published(_name(layer), about) is not None:
        return
    held = tensors_below(task.folder(), f"model.layers.{layer}.mlp")
    mlp = MLP(*(part.to(task.device) for part in view(_in_order(held))))
    found = task.layer(layer)
    gram_II, fisher_D = (found[key].to(task.device) for key in ("inner.gram", "fisher.down_proj"))
    if kept is not None:
        kept_K = torch.tensor(kept, device=task.device)
    elif task.settings.score == "leverage":
        kept_K = neurons.keep(neurons.leverage(gram_II), width)
    else:
        kept_K = neurons.eliminate(mlp.down_DI, gram_II, width)
    cut = neurons.prune_mlp(mlp, gram_II, kept_K)
    measured = (mlp.down_DI, cut.down_DI, kept_K, gram_II, fisher_D, int(found["tokens"]))
    loss = torch.tensor(neurons.predicted_loss(*measured))
    task.publish(_name(layer), cut._asdict() | {"loss": loss}, about)


def important(task: Task, width: int) -> list[list[int]]:
    """A piece: the neurons that SDMPrune keeps in each layer, by gradients of CE and of KL to the cached teacher;
    published."""
    about = {"width": width}
    if (found := task.published(IMPORTANT, about)) is not None:
        return [found[str(layer)].tolist() for layer in range(len(found))]
    targets = _targets(task)
    kept = sdm.select(
        task.load(task.device),
        _sequences(task),
        width,
        targets=targets,
        alpha=task.settings.alpha,
        align=task.settings.align,
    )
    task.publish(IMPORTANT, {str(layer): kept_K for layer, kept_K in enumerate(kept)}, about)
    return [kept_K.tolist() for kept_K in kept]


def _narrower(task: Task, width: int, kept: list[list[int]] | None, each: TaskMap) -> Made:
    layers = spec.config_dict(task.folder())["num_hidden_layers"]
    pieces = [(task, layer, width, kept and kept[layer]) for layer in range(layers)]
    for done, _ in enumerate(each(narrow, pieces), 1):
        logger.info(f"{done}/{layers} layers cut to {width} neurons")
    found = [task.published(_name(i), {"width": width, "kept": kept and kept[i]}) for i in range(layers)]
    parts = [part for part in found if part is not None]
    assert len(parts) == layers, "every layer has just been cut"
    loss = sum(float(part.pop("loss")) for part in parts)
    return with_width(task.load(), [MLP(**part) for part in parts]), {"width": width, "predicted_loss": loss}


def width_of(task: Task) -> int:
    """Neurons of every layer afterwards."""
    values = spec.config_dict(task.folder())
    hidden, layers = values["hidden_size"], values["num_hidden_layers"]
    present = values["intermediate_size"]
    return neurons.width(
        task.dense_mlp_params, task.sparsity, hidden, layers, task.settings.align, present=present
    )


def share_of(task: Task) -> float:
    """The share of this model's MLP parameters to go, where sparsity is of the dense model's."""
    return 1 - (1 - task.sparsity) * task.dense_mlp_params / spec.mlp_parameters(task.folder())


def _sequences(task: Task) -> torch.Tensor:
    """The calibration text, int64 [B, L]."""
    assert task.texts is not None, f"{task.settings.method} has texts among its inputs"
    return tokens(calibrate.sample(task.store, task.texts, task.calibrate))


def _targets(task: Task) -> list[Target]:
    """What the cached teacher says of each calibration sequence at sdm's temperature."""
    from sparsekd_ray.distill.reader import SampleReader

    assert task.texts is not None and task.cache is not None, "sdm has texts and a cache among its inputs"
    reader = SampleReader(task.store, task.cache, task.settings.temperature)
    reader.manifest.normaliser_index(task.settings.temperature)
    if reader.manifest.corpus != task.texts.fingerprint:
        raise ModelError("the teacher cache is of another corpus than the calibration text: capture it again")
    names = calibrate.sample(task.store, task.texts, task.calibrate)["sample_id"].to_pylist()
    return reader.targets(calibrate.drawn(reader.samples, task.calibrate).tolist(), names)


def _in_order(held: Tensors) -> list[torch.Tensor]:
    order = ("gate_up_proj.weight", "gate_proj.weight", "up_proj.weight", "down_proj.weight")
    return [held[key] for key in order if key in held]


def _name(layer: int) -> str:
    return f"mlp-{layer:03d}"
