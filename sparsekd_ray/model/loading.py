"""Hugging Face directories: what is supported, what it counts, and loading that proves itself (`saving.py` writes).

A model is a directory with config.json, safetensors, tokenizer files and generation_config.json. Its size and
its MLP matrices follow from config.json alone, so a plan is checked before any weight is read; torch and
transformers are therefore imported only in the functions that need them. Loading runs no code from the
directory and accepts no missing, left-over or misshapen tensor.

MLP matrices are written [m, n] = [outputs, inputs] and named as in the model, `model.layers.0.mlp.down_proj`. Where a
low-rank Qwen3 holds gate and up of a layer as one matrix, that is its `gate_up_proj`, gate first.
"Config" below means a parsed config.json, a directory that holds one, a transformers config, or a model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekd_ray.errors import ModelError
from sparsekd_ray.model import spec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

MODELLING_CODE = "modeling_sparsekd"  # the module's name beside exported weights


def count_parameters(model: PreTrainedModel) -> int:
    """Number of parameters in memory, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def mlp_matrix(model: PreTrainedModel, name: str) -> torch.Tensor:
    """One MLP matrix W_mn in float64, multiplied out where it is low-rank.

    `gate_up_proj` is gate above up where these are two matrices, and `gate_proj` and `up_proj` are the halves where
    they are one. Raises ModelError if the model has no such matrix.
    """
    from sparsekd_ray.model import low_rank

    return _of_mlp(model, name, lambda module: low_rank.product(module.state_dict()))


def mlp_bias(model: PreTrainedModel, name: str) -> torch.Tensor | None:
    """The output bias [m] of one MLP matrix in float64, names as in `mlp_matrix`; None in a model without biases."""
    import torch

    if not spec.mlp_form(model)[1]:
        return None

    def bias(module: Any) -> torch.Tensor:  # dense matrices have none
        return torch.zeros(module.out_features) if module.bias is None else module.bias.detach()

    return _of_mlp(model, name, lambda module: bias(module).double())


def _of_mlp(model: PreTrainedModel, name: str, read: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    """What `read` finds of a matrix in the module or modules that hold it."""
    import torch

    parent, _, leaf = name.rpartition(".")
    pair = ("gate_proj", "up_proj")
    modules = dict(model.named_modules())
    held = dict(modules[parent].named_children()) if parent in modules and parent.endswith(".mlp") else {}
    if leaf in held and leaf.endswith("_proj"):
        return read(held[leaf])
    if leaf == "gate_up_proj" and set(pair) <= set(held):
        return torch.cat([read(held[part]) for part in pair])
    if leaf in pair and "gate_up_proj" in held:
        return read(held["gate_up_proj"]).chunk(2)[pair.index(leaf)]
    raise ModelError(
        f"the model has no MLP matrix {name!r}; it has {', '.join(spec.shapes_from_config(model))}"
    )


@cache
def _classes() -> dict[str, tuple[Any, Any]]:
    """Config and model class by model_type; makes the sparse ones known to transformers' Auto classes."""
    import transformers

    from sparsekd_ray.model import low_rank

    transformers.utils.logging.disable_progress_bar()  # a bar per model is noise in a job's log
    classes: dict[str, tuple[Any, Any]] = {}
    for family, stem in spec.CLASS_STEMS.items():
        stock = (getattr(transformers, f"{stem}Config"), getattr(transformers, f"{stem}ForCausalLM"))
        own = [getattr(low_rank, f"Sparse{stem}{kind}") for kind in ("Config", "Model", "ForCausalLM")]
        transformers.AutoConfig.register(spec.LOW_RANK_PREFIX + family, own[0])
        transformers.AutoModel.register(own[0], own[1])
        transformers.AutoModelForCausalLM.register(own[0], own[2])
        classes |= {family: stock, spec.LOW_RANK_PREFIX + family: (own[0], own[2])}
    return classes


def load(
    path: Path | str, dtype: torch.dtype | str = "float32", device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """A stock or sparse model from a local directory, in eval mode; dtype "auto" keeps the stored one.

    Raises ModelError if the model is not supported, if a tensor is missing, left over, misshapen or
    unreadable, or if the number of parameters is not the one that the config implies.
    """
    values = spec.config_dict(Path(path))
    spec.check_supported(values)
    _, model_class = _classes()[values["model_type"]]
    model = _checked(
        model_class, str(path), path, values, dtype=dtype, use_safetensors=True, local_files_only=True
    )
    if not spec.is_low_rank(values):
        vars(model.config).pop("auto_map", None)  # the repository's own code, neither run nor shipped by us
    return model.to(device)


def _checked(model_class: Any, what: str, source: Any, values: Mapping[str, Any], **how: Any) -> Any:
    """`from_pretrained` that takes no tensors but those of the config, all of them."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    report = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # told to us, not only logged
    try:
        model, info = model_class.from_pretrained(source, **how, **report)
    except (OSError, ValueError, SafetensorError, StrictDataclassError) as error:
        raise ModelError(f"{what} does not load: {error}") from error
    if wrong := {kind: sorted(map(str, found)) for kind, found in info.items() if found}:
        raise ModelError(f"{what} does not hold the weights of its config: {wrong}")
    if (found := count_parameters(model)) != (expected := spec.total_parameters(values)):
        raise ModelError(f"{what} has {found} parameters, but its config implies {expected}")
    return model


def rebuild(
    like: PreTrainedModel,
    ranks: Mapping[str, int] | None,
    state: dict[str, Any],
    *,
    gauge: bool | None = None,
    bias: bool | None = None,
) -> PreTrainedModel:
    """A model of the same family with other MLP tensors: sparse with these ranks, or stock if None.

    gauge, bias: form of the low-rank matrices (see `low_rank`); that of `like` unless told. Raises ModelError if
    `state` lacks a tensor of such a model, holds another one, or a rank saves nothing.
    """
    family, (like_gauge, like_bias) = spec.check_supported(like), spec.mlp_form(like)
    values = {key: value for key, value in spec.config_dict(like).items() if key not in spec.OWN_FIELDS}
    values["model_type"] = family
    if ranks is not None:
        values |= {
            "model_type": spec.LOW_RANK_PREFIX + family,
            "mlp_ranks": dict(ranks),
            "mlp_storage": "gauge" if (like_gauge if gauge is None else gauge) else "factors",
            "mlp_bias": like_bias if bias is None else bias,
            "auto_map": _auto_map(family),
        }
        values["num_parameters_expected"] = spec.total_parameters(values)
    if values.get("tie_word_embeddings"):
        state = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    config_class, model_class = _classes()[values["model_type"]]
    what = "the rebuilt model"
    config = config_class(**{key: value for key, value in values.items() if key != "model_type"})
    model = _checked(model_class, what, None, values, config=config, state_dict=state, dtype=like.dtype)
    model.generation_config = copy.deepcopy(like.generation_config)
    return model.to(like.device)


def _auto_map(family: str) -> dict[str, str]:
    """Where transformers' Auto classes find the shipped code; vLLM takes the base model from it."""
    kinds = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
    stem = f"{MODELLING_CODE}.Sparse{spec.CLASS_STEMS[family]}"
    return {auto: stem + kind for auto, kind in kinds.items()}


def merge(model: PreTrainedModel) -> PreTrainedModel:
    """The stock dense model with the same function: low-rank matrices multiplied out in float64, then cast.

    Raises ModelError if they have biases, which stock models cannot hold.
    """
    if spec.mlp_form(model)[1]:
        raise ModelError(
            "the student's MLP matrices have biases (mlp_bias), and stock Phi-3 and Qwen3 MLPs have none: use the "
            "low-rank model, or prune with prune.bias off"
        )
    ranks, state = spec.mlp_ranks(model), dict(model.state_dict())
    below = tuple(f"{name}." for name in ranks)
    state = {name: tensor for name, tensor in state.items() if not name.startswith(below)}
    stock = {**spec.config_dict(model), "model_type": spec.check_supported(model), "mlp_ranks": {}}
    for name in spec.shapes_from_config(stock):
        if f"{name}.weight" not in state:
            state[f"{name}.weight"] = mlp_matrix(model, name).to(model.dtype)
    return rebuild(model, None, state)
