"""Students of stock architecture: fewer neurons in every layer, fewer layers, or zeros in place of weights.

The work is in subtasks that may run anywhere. A layer's neurons are chosen and refitted on their own. A computation on
the whole model (gradients, Wanda's pruned prefix) is one subtask.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from sparsekd_ray.errors import ModelError
from sparsekd_ray.model import spec
from sparsekd_ray.model.mlp import MLP, layer_count, mlp_weights, view, with_width, without_layers
from sparsekd_ray.prune import calibrate, depth, masks, neurons, sdm
from sparsekd_ray.prune.task import Student, Task, Tensors, tensors_below
from sparsekd_ray.runtime.logging import log_progress
from sparsekd_ray.runtime.tasks import TaskMap
from sparsekd_ray.teacher.forward import tokens
from sparsekd_ray.teacher.signal import Target

logger = logging.getLogger(__name__)

Masking = Callable[[Task, PreTrainedModel, float], PreTrainedModel]
"""(task, model, share of its MLP weights) → the model with zeros in their place, which may be the same object."""
MASKED, IMPORTANT = "masked", "important"  # names of published results


def by_activations(task: Task, task_map: TaskMap) -> Student:
    """Removes from every layer the neurons whose loss the others can best make up for, and refits the others."""
    return narrower(task, task_map, width_of(task))


def by_gradients(task: Task, task_map: TaskMap) -> Student:
    """Removes the neurons of least SDMPrune importance. Refits the others, which the paper does not do."""
    width = width_of(task)
    assert task.calibrate is not None, "sdm has texts among its inputs"
    logger.info(f"measuring gradients on {task.calibrate.samples} sequences, in two phases")
    ((_, kept),) = task_map(important_neurons, [(task, width)])
    return narrower(task, task_map, width, kept)


def narrower(
    task: Task, task_map: TaskMap, width: int, kept: Sequence[Sequence[int]] | None = None
) -> Student:
    """A student with `width` neurons in every layer: those of `kept`, rising, or else those that activations choose."""
    layers = spec.layer_count(task.folder())
    subtasks = [(task, layer, width, None if kept is None else list(kept[layer])) for layer in range(layers)]
    for done, _ in enumerate(task_map(narrow, subtasks), 1):
        log_progress(logger, f"{done}/{layers} layers cut to {width} neurons")
    mlps, loss = [], 0.0
    for _, layer, _, kept_K in subtasks:
        tensors = task.published(_mlp_name(layer), {"width": width, "kept": kept_K})
        assert tensors is not None, f"layer {layer} has just been cut"
        loss += float(tensors.pop("loss"))
        mlps.append(MLP(**tensors))
    return Student(with_width(task.load(), mlps), {"width": width, "predicted_loss": loss})


def narrow(task: Task, layer: int, width: int, kept: list[int] | None) -> None:
    """A subtask: publishes one layer's MLP with `width` neurons, and the loss that this is predicted to cost."""
    metadata = {"width": width, "kept": kept}
    if task.published(_mlp_name(layer), metadata) is not None:
        return
    stored = tensors_below(task.folder(), f"model.layers.{layer}.mlp")
    mlp = MLP(*(part.to(task.device) for part in view(_in_order(stored))))
    measured = task.layer_statistics(layer)
    gram_II, fisher_D = (measured[key].to(task.device) for key in ("inner.gram", "fisher.down_proj"))
    if kept is not None:
        kept_K = torch.tensor(kept, device=task.device)
    elif task.settings.score == "leverage":
        kept_K = neurons.keep(neurons.leverage(gram_II), width)
    else:
        kept_K = neurons.eliminate(mlp.down_DI, gram_II, width)
    cut = neurons.prune_mlp(mlp, gram_II, kept_K)
    tokens_seen = int(measured["tokens"])
    loss = neurons.predicted_loss(mlp.down_DI, cut.down_DI, kept_K, gram_II, fisher_D, tokens_seen)
    task.publish(_mlp_name(layer), cut._asdict() | {"loss": torch.tensor(loss)}, metadata)


def important_neurons(task: Task, width: int) -> list[list[int]]:
    """A subtask: publishes and returns the neurons that SDMPrune keeps in each layer, by gradients of CE and of KL.

    The KL is to the cached teacher.
    """
    metadata = {"width": width}
    if (published := task.published(IMPORTANT, metadata)) is not None:
        return [published[str(layer)].tolist() for layer in range(len(published))]
    targets = _targets(task)
    kept = sdm.select(
        task.load(task.device),
        sequences(task),
        width,
        targets=targets,
        alpha=task.settings.alpha,
        align=task.settings.align,
    )
    task.publish(IMPORTANT, {str(layer): kept_K for layer, kept_K in enumerate(kept)}, metadata)
    return [kept_K.tolist() for kept_K in kept]


def width_of(task: Task) -> int:
    """Neurons of every layer afterwards."""
    names, align = ("hidden_size", "num_hidden_layers", "intermediate_size"), task.settings.align
    hidden, layers, present = spec.sizes(task.folder(), *names)
    return neurons.width(task.dense_mlp_params, task.sparsity, hidden, layers, align, present=present)


def shallower(task: Task, dropped: Sequence[int]) -> Student:
    """The model without these layers."""
    model = task.load()
    logger.info(f"drops layers {', '.join(map(str, dropped))} of {layer_count(model)}")
    return Student(without_layers(model, dropped), {"dropped": list(dropped)})


def layers_to_drop(task: Task) -> list[int]:
    """The layers to remove for the sparsity, to the nearest whole layer, by measured angles or measured influence."""
    measured, layers = task.stack_statistics(), spec.layer_count(task.folder())
    number = depth.count(layers, share_of(task))
    if task.settings.drop == "block":
        return depth.block(measured["angle"], number)
    return depth.influence(measured["influence"], number)


def masked(task: Task, task_map: TaskMap, masking: Masking) -> Student:
    """The same shapes with zeros in them. `masking` must be a top-level function, which can be pickled."""
    logger.info(f"masking every MLP matrix by {task.settings.method}")
    for _ in task_map(publish_masked, [(task, masking)]):
        pass
    model, tensors = task.load(), task.published(MASKED, {})
    assert tensors is not None, "the masks have just been made"
    model.load_state_dict(tensors, strict=False)  # only the MLP matrices are in it
    model.config.sparsekd_mask = task.settings.method
    return Student(model, {})


def publish_masked(task: Task, masking: Masking) -> None:
    """A subtask: publishes every MLP matrix with its zeros."""
    if task.published(MASKED, {}) is not None:
        return
    model = masking(task, task.load(task.device), share_of(task))
    layers = [mlp_weights(model, layer) for layer in range(layer_count(model))]
    tensors = {f"{name}.weight": weight.detach() for layer in layers for name, weight in layer.items()}
    task.publish(MASKED, tensors, {})


def wanda(task: Task, model: PreTrainedModel, share: float) -> PreTrainedModel:
    return masks.wanda(model, sequences(task), share)


def magnitude(task: Task, model: PreTrainedModel, share: float) -> PreTrainedModel:
    return masks.magnitude(model, share)


def share_of(task: Task) -> float:
    """The share of this model's MLP parameters to remove. `task.sparsity` is a share of the dense model's."""
    return 1 - (1 - task.sparsity) * task.dense_mlp_params / spec.mlp_parameters(task.folder())


def sequences(task: Task) -> torch.Tensor:
    """The calibration text, int64 [B, L]."""
    assert task.texts and task.calibrate, f"{task.settings.method} has texts among its inputs"
    return tokens(calibrate.sample(task.store, task.texts, task.calibrate))


def _targets(task: Task) -> list[Target]:
    """The cached teacher's probabilities for each calibration sequence, at sdm's temperature."""
    from sparsekd_ray.distill.reader import SampleReader

    assert task.texts and task.calibrate and task.cache, "sdm has texts and a cache among its inputs"
    reader = SampleReader(task.store, task.cache, task.settings.temperature)
    reader.manifest.normaliser_index(task.settings.temperature)
    if reader.manifest.corpus != task.texts.fingerprint:
        raise ModelError("the teacher cache is of another corpus than the calibration text: capture it again")
    names = calibrate.sample(task.store, task.texts, task.calibrate)["sample_id"].to_pylist()
    return reader.targets(calibrate.sample_indices(reader.samples, task.calibrate).tolist(), names)


def _in_order(stored: Tensors) -> list[torch.Tensor]:
    order = ("gate_up_proj.weight", "gate_proj.weight", "up_proj.weight", "down_proj.weight")
    return [stored[key] for key in order if key in stored]


def _mlp_name(layer: int) -> str:
    return f"mlp-{layer:03d}"
