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
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekd_ray.errors import ModelError
from sparsekd_ray.model import cost

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

SPARSE = "sparsekd_"
FAMILIES = {"phi3": "phi3", "qwen3": "qwen3", f"{SPARSE}phi3": "phi3", f"{SPARSE}qwen3": "qwen3"}
CLASS_STEMS = {"phi3": "Phi3", "qwen3": "Qwen3"}
MODELLING_CODE = "modeling_sparsekd"  # the module's name beside exported weights
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
OWN_FIELDS = (  # of a config, which a rebuilt model does not take over
    "model_type", "architectures", "auto_map", "transformers_version", "mlp_ranks", "mlp_storage", "mlp_bias",
    "num_parameters_expected",
)  # fmt: skip


def config_dict(config: Any) -> dict[str, Any]:
    """The config as plain values. Raises ModelError if a directory has no readable config.json."""
    if isinstance(config, Mapping):
        return dict(config)
    if not isinstance(config, str | Path):
        return dict(getattr(config, "config", config).to_dict())
    path = Path(config) / "config.json"
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path} is no readable config ({error}): give a Hugging Face directory") from error


def check_supported(config: Any) -> str:
    """The family, "phi3" or "qwen3", stock or sparse. Raises ModelError naming what stands in the way."""
    values = config_dict(config)
    model_type = values.get("model_type")
    obstacles = [] if model_type in FAMILIES else [f"model_type {model_type!r}"]
    obstacles += [f"mixture of experts ({key})" for key in values if "experts" in key and values[key]]
    known = "mlp_bias" if is_sparse(values) else None  # what the low-rank matrices of a student may have
    biases = [key for key in values if "mlp" in key and "bias" in key and key != known]
    obstacles += [f"biased MLP ({key})" for key in biases if values[key]]
    obstacles += [key for key in ("quantization_config", "per_layer_config") if values.get(key)]
    if obstacles:
        raise ModelError(
            f"model not supported: found {', '.join(obstacles)}; supported are dense, unquantised models "
            f"without MLP biases of the types {', '.join(FAMILIES)} (Phi-3, Phi-4-mini, Qwen3)"
        )
    return FAMILIES[str(model_type)]


def is_sparse(config: Any) -> bool:
    """Whether the model is of one of this package's own low-rank types."""
    return str(config_dict(config).get("model_type")).startswith(SPARSE)


def mlp_ranks(config: Any) -> dict[str, int]:
    """The rank of every MLP matrix that is low-rank; empty for a stock model."""
    return dict(config_dict(config).get("mlp_ranks") or {})


def mlp_form(config: Any) -> tuple[bool, bool]:
    """Whether low-rank matrices are gauge-fixed instead of factors, and whether they have biases."""
    values = config_dict(config)
    return values.get("mlp_storage") == "gauge", bool(values.get("mlp_bias"))


def shapes_from_config(config: Any) -> dict[str, tuple[int, int]]:
    """Name and shape (m, n) of every MLP matrix in order; the dense shape where a student holds it as low-rank."""
    values = config_dict(config)
    family, ranks = check_supported(values), mlp_ranks(values)
    hidden, inner, layers = _sizes(values, "hidden_size", "intermediate_size", "num_hidden_layers")
    fused, down = {"gate_up_proj": (2 * inner, hidden)}, {"down_proj": (hidden, inner)}
    separate = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden)}
    shapes: dict[str, tuple[int, int]] = {}
    for prefix in (f"model.layers.{i}.mlp." for i in range(layers)):
        joint = family == "phi3" or f"{prefix}gate_up_proj" in ranks
        shapes |= {prefix + name: shape for name, shape in ((fused if joint else separate) | down).items()}
    return shapes


def mlp_parameters(config: Any) -> int:
    """Number of MLP parameters of this model, low-rank matrices in the form they are held in."""
    values = config_dict(config)
    ranks, (gauge, bias) = mlp_ranks(values), mlp_form(values)
    shapes = shapes_from_config(values)
    return sum(cost.parameters(m, n, ranks.get(name), gauge, bias) for name, (m, n) in shapes.items())


def total_parameters(config: Any) -> int:
    """Number of parameters of this model, tied embeddings once."""
    values = config_dict(config)
    qwen = check_supported(values) == "qwen3"
    hidden, layers, vocab = _sizes(values, "hidden_size", "num_hidden_layers", "vocab_size")
    (heads,) = _sizes(values, "num_attention_heads")
    head = values.get("head_dim") or (128 if qwen else hidden // heads)
    query, key = heads * head, (values.get("num_key_value_heads") or heads) * head
    attention = hidden * (query + 2 * key) + query * hidden
    attention += 2 * head if qwen else 0  # the norms of queries and keys
    attention += query + 2 * key + hidden if qwen and values.get("attention_bias") else 0
    embeddings = vocab * hidden * (1 if values.get("tie_word_embeddings") else 2)
    return embeddings + mlp_parameters(values) + layers * (attention + 2 * hidden) + hidden


def _sizes(values: Mapping[str, Any], *keys: str) -> list[int]:
    if missing := [key for key in keys if not isinstance(values.get(key), int)]:
        raise ModelError(f"the model config gives no whole number for {', '.join(missing)}")
    return [values[key] for key in keys]


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

    if not mlp_form(model)[1]:
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
    raise ModelError(f"the model has no MLP matrix {name!r}; it has {', '.join(shapes_from_config(model))}")


def tensors_on_disk(path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a directory's safetensors, by their headers; tied ones once."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(Path(path).glob("model*.safetensors")):
        with file.open("rb") as stream:
            length = min(int.from_bytes(stream.read(8), "little"), file.stat().st_size)
            try:
                header = json.loads(stream.read(length))
            except ValueError as error:
                raise ModelError(f"{file} is cut short or not safetensors: make it again") from error
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return shapes


def resolve_dense(path_or_hub_id: str, revision: str | None = None) -> Path:
    """A local directory as it is, or a local snapshot of what we need of the hub repository."""
    if (path := Path(path_or_hub_id).expanduser()).is_dir():
        return path
    from huggingface_hub import snapshot_download

    patterns = ["config.json", "generation_config.json", "model*.safetensors*", *TOKENIZER_FILES]
    try:
        return Path(snapshot_download(path_or_hub_id, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path_or_hub_id!r} is no local directory, and the hub did not give it (revision "
            f"{revision or 'main'}): {error}; check spelling, network and access rights, or give a directory"
        ) from error


@cache
def _classes() -> dict[str, tuple[Any, Any]]:
    """Config and model class by model_type; makes the sparse ones known to transformers' Auto classes."""
    import transformers

    from sparsekd_ray.model import low_rank

    transformers.utils.logging.disable_progress_bar()  # a bar per model is noise in a job's log
    classes: dict[str, tuple[Any, Any]] = {}
    for family, stem in CLASS_STEMS.items():
        stock = (getattr(transformers, f"{stem}Config"), getattr(transformers, f"{stem}ForCausalLM"))
        own = [getattr(low_rank, f"Sparse{stem}{kind}") for kind in ("Config", "Model", "ForCausalLM")]
        transformers.AutoConfig.register(SPARSE + family, own[0])
        transformers.AutoModel.register(own[0], own[1])
        transformers.AutoModelForCausalLM.register(own[0], own[2])
        classes |= {family: stock, SPARSE + family: (own[0], own[2])}
    return classes


def load(
    path: Path | str, dtype: torch.dtype | str = "float32", device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """A stock or sparse model from a local directory, in eval mode; dtype "auto" keeps the stored one.

    Raises ModelError if the model is not supported, if a tensor is missing, left over, misshapen or
    unreadable, or if the number of parameters is not the one that the config implies.
    """
    values = config_dict(Path(path))
    check_supported(values)
    _, model_class = _classes()[values["model_type"]]
    model = _checked(
        model_class, str(path), path, values, dtype=dtype, use_safetensors=True, local_files_only=True
    )
    if not is_sparse(values):
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
    if (found := count_parameters(model)) != (expected := total_parameters(values)):
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
    family, (like_gauge, like_bias) = check_supported(like), mlp_form(like)
    values = {key: value for key, value in config_dict(like).items() if key not in OWN_FIELDS}
    values["model_type"] = family
    if ranks is not None:
        values |= {
            "model_type": SPARSE + family,
            "mlp_ranks": dict(ranks),
            "mlp_storage": "gauge" if (like_gauge if gauge is None else gauge) else "factors",
            "mlp_bias": like_bias if bias is None else bias,
            "auto_map": _auto_map(family),
        }
        values["num_parameters_expected"] = total_parameters(values)
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
    stem = f"{MODELLING_CODE}.Sparse{CLASS_STEMS[family]}"
    return {auto: stem + kind for auto, kind in kinds.items()}


def merge(model: PreTrainedModel) -> PreTrainedModel:
    """The stock dense model with the same function: low-rank matrices multiplied out in float64, then cast.

    Raises ModelError if they have biases, which stock models cannot hold.
    """
    if mlp_form(model)[1]:
        raise ModelError(
            "the student's MLP matrices have biases (mlp_bias), and stock Phi-3 and Qwen3 MLPs have none: use the "
            "low-rank model, or prune with prune.bias off"
        )
    ranks, state = mlp_ranks(model), dict(model.state_dict())
    below = tuple(f"{name}." for name in ranks)
    state = {name: tensor for name, tensor in state.items() if not name.startswith(below)}
    stock = {**config_dict(model), "model_type": check_supported(model), "mlp_ranks": {}}
    for name in shapes_from_config(stock):
        if f"{name}.weight" not in state:
            state[f"{name}.weight"] = mlp_matrix(model, name).to(model.dtype)
    return rebuild(model, None, state)
