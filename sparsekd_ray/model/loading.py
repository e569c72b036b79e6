"""Model directories of Hugging Face: loading that proves itself, and models rebuilt from others (`saving.py` writes).

A model is a directory with config.json, safetensors, tokenizer files and generation_config.json. Loading runs no code
from the directory, accepts no missing, left-over or misshapen tensor, and probes that the model computes what pruning
and distillation assume (`probe.py`). torch and transformers are imported only in the functions that need them.

MLP matrices are named and shaped as in `spec.py`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekd_ray.errors import ModelError
from sparsekd_ray.model import families, spec, weights

if TYPE_CHECKING:
    import torch
    from torch import nn
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

    return _read_projection(model, name, lambda module: low_rank.product(module.state_dict()))


def _read_projection(
    model: PreTrainedModel, name: str, read: Callable[[nn.Module], torch.Tensor]
) -> torch.Tensor:
    """The result of `read` for an MLP matrix, joined or split where the model stores gate and up in the other way."""
    import torch

    parent, _, leaf = name.rpartition(".")
    pair = ("gate_proj", "up_proj")
    modules = dict(model.named_modules())
    children = dict(modules[parent].named_children()) if parent in modules and parent.endswith(".mlp") else {}
    if leaf in children and leaf.endswith("_proj"):
        return read(children[leaf])
    if leaf == "gate_up_proj" and set(pair) <= set(children):
        return torch.cat([read(children[part]) for part in pair])
    if leaf in pair and "gate_up_proj" in children:
        return read(children["gate_up_proj"]).chunk(2)[pair.index(leaf)]
    raise ModelError(
        f"the model has no MLP matrix {name!r}; it has {', '.join(spec.shapes_from_config(model))}"
    )


@cache
def classes(model_type: str) -> families.StockClasses:
    """Config, base and causal class of a stock or low-rank model type; the Auto classes learn the low-rank ones."""
    import transformers

    from sparsekd_ray.model import low_rank

    transformers.utils.logging.disable_progress_bar()  # a bar per model is noise in a job's log
    stock = families.stock_classes(model_type.removeprefix(spec.LOW_RANK_PREFIX))
    if not model_type.startswith(spec.LOW_RANK_PREFIX):
        return stock
    own = families.StockClasses(*(getattr(low_rank, f"{low_rank.PREFIX}{kind.__name__}") for kind in stock))
    transformers.AutoConfig.register(model_type, own.config)
    transformers.AutoModel.register(own.config, own.base)
    transformers.AutoModelForCausalLM.register(own.config, own.causal)
    return own


def load(
    path: Path | str, dtype: torch.dtype | str = "float32", device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """A stock or low-rank model from a local directory, in eval mode; dtype "auto" keeps the stored one.

    Raises ModelError if the model is not supported, if a tensor is missing, left over, misshapen or unreadable, if the
    number of parameters is not the one that the config implies, or if a probe fails.
    """
    values = spec.config_dict(path)
    spec.check_supported(values)
    weights.weight_files(Path(path))
    if not spec.is_low_rank(values):
        values.pop("auto_map", None)  # names the repository's own code, which is neither run nor shipped
    model = _checked(str(path), values, path, dtype=dtype, use_safetensors=True, local_files_only=True)
    placed: PreTrainedModel = model.to(device)  # type: ignore[arg-type]
    _probe_once(placed, json.dumps(values, sort_keys=True, default=str))
    return placed


_probed: set[str] = set()


def _probe_once(model: PreTrainedModel, config_json: str) -> None:
    """Runs the probes of `probe.numbers` on the first model of each config in this process."""
    from sparsekd_ray.model import probe

    if config_json not in _probed:
        probe.numbers(model)
        _probed.add(config_json)


def _checked(
    name: str, values: Mapping[str, object], source: Path | str | None, **options: Any
) -> PreTrainedModel:
    """The model of this config with the weights of `source`, or of the option `state_dict`: all of them and no others.

    name: what an error calls the model.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    config_class, _, causal_class = classes(str(values["model_type"]))
    # misfits come back in the loading info; without these options transformers only logs them
    report: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        config = config_class.from_dict({k: v for k, v in values.items() if k != "model_type"})
        loaded: Any = causal_class.from_pretrained(source, config=config, **options, **report)
    except (OSError, ValueError, SafetensorError, StrictDataclassError) as error:
        raise ModelError(f"{name} does not load: {error}") from error
    model: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    if wrong := {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}:
        raise ModelError(f"{name} does not hold the weights of its config: {wrong}")
    if (params := count_parameters(model)) != (expected := spec.total_parameters(values)):
        raise ModelError(f"{name} has {params} parameters, but its config implies {expected}")
    _check_matrices(name, model, values)
    return model


def _check_matrices(name: str, model: PreTrainedModel, values: Mapping[str, object]) -> None:
    """Raises ModelError unless the stock class has the MLP matrices that the config implies."""
    from sparsekd_ray.model import probe

    stock = spec.stock_values(values)
    shapes, expected = probe.structure(families.meta_model(stock)), spec.shapes_from_config(stock)
    if list(shapes.items()) != list(expected.items()):
        raise ModelError(f"{name} has the MLP matrices {shapes}, but its config implies {expected}")


def rebuild(
    like: PreTrainedModel,
    ranks: Mapping[str, int] | None,
    state: dict[str, torch.Tensor],
    *,
    gauge: bool | None = None,
    bias: bool | None = None,
) -> PreTrainedModel:
    """A model of the same family with other MLP tensors: low-rank with these ranks, or stock if None.

    gauge, bias: form of the low-rank matrices (see `low_rank`); that of `like` where None. Raises ModelError if `state`
    lacks a tensor of such a model, holds another one, or a rank saves nothing.
    """
    values, storage = spec.stock_values(like), spec.mlp_storage(like)
    if ranks is not None:
        model_type = f"{spec.LOW_RANK_PREFIX}{values['model_type']}"
        values |= {
            "model_type": model_type,
            spec.RANKS: dict(ranks),
            spec.STORAGE: "gauge" if (storage.gauge if gauge is None else gauge) else "factors",
            spec.BIAS: storage.bias if bias is None else bias,
            "auto_map": auto_map(model_type),
        }
        values[spec.PARAMETERS] = spec.total_parameters(values)
    if values.get("tie_word_embeddings"):
        state = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    model = _checked("the rebuilt model", values, None, state_dict=state, dtype=like.dtype)
    model.generation_config = copy.deepcopy(like.generation_config)
    placed: PreTrainedModel = model.to(like.device)  # type: ignore[arg-type]
    return placed


def auto_map(model_type: str) -> dict[str, str]:
    """The config's `auto_map`: the shipped class for each Auto class. vLLM takes the base model from it."""
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    kinds = classes(model_type)
    return {name: f"{MODELLING_CODE}.{kind.__name__}" for name, kind in zip(names, kinds, strict=True)}


def merge(model: PreTrainedModel) -> PreTrainedModel:
    """The stock dense model with the same function: low-rank matrices multiplied out in float64, then cast.

    Raises ModelError if they have biases, which the stock MLPs lack.
    """
    if spec.mlp_storage(model).bias:
        raise ModelError(
            f"the student's MLP matrices have biases ({spec.BIAS}), and those of the stock model have none: use the "
            "low-rank model, or prune with prune.bias off"
        )
    prefixes = tuple(f"{name}." for name in spec.mlp_ranks(model))
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(prefixes)}
    for name in spec.shapes_from_config(spec.stock_values(model)):
        if f"{name}.weight" not in state:
            state[f"{name}.weight"] = mlp_matrix(model, name).to(model.dtype)
    return rebuild(model, None, state)
