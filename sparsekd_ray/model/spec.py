"""What a config says of a model before any weight is read: whether it is supported, its MLP matrices, its size.

torch and transformers are not imported here, so a plan is checked in milliseconds.

MLP matrices are written [m, n] = [outputs, inputs] and named as in the model, `model.layers.0.mlp.down_proj`. Where a
low-rank Qwen3 holds gate and up of a layer as one matrix, that is its `gate_up_proj`, gate first.
"Config" below means a parsed config.json, a directory that holds one, a transformers config, or a model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsekd_ray.errors import ModelError
from sparsekd_ray.model import cost

LOW_RANK_PREFIX = "sparsekd_"


FAMILIES = {
    "phi3": "phi3",
    "qwen3": "qwen3",
    f"{LOW_RANK_PREFIX}phi3": "phi3",
    f"{LOW_RANK_PREFIX}qwen3": "qwen3",
}


CLASS_STEMS = {"phi3": "Phi3", "qwen3": "Qwen3"}


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
    known = "mlp_bias" if is_low_rank(values) else None  # what the low-rank matrices of a student may have
    biases = [key for key in values if "mlp" in key and "bias" in key and key != known]
    obstacles += [f"biased MLP ({key})" for key in biases if values[key]]
    obstacles += [key for key in ("quantization_config", "per_layer_config") if values.get(key)]
    if obstacles:
        raise ModelError(
            f"model not supported: found {', '.join(obstacles)}; supported are dense, unquantised models "
            f"without MLP biases of the types {', '.join(FAMILIES)} (Phi-3, Phi-4-mini, Qwen3)"
        )
    return FAMILIES[str(model_type)]


def is_low_rank(config: Any) -> bool:
    """Whether the model is of one of this package's own low-rank types."""
    return str(config_dict(config).get("model_type")).startswith(LOW_RANK_PREFIX)


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
