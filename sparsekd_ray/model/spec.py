"""What a config states about a model, before any weight is read: whether it is supported, its MLP matrices, its size.

MLP matrices are written [m, n] = [outputs, inputs] and named as in the model, `model.layers.0.mlp.down_proj`. A
low-rank student may store gate and up of a layer as one matrix where its family stores two: its `gate_up_proj`, gate
first. "Config" below means a parsed config.json, a directory that holds one, a transformers
config, or a model.

Shapes of MLP matrices are arithmetic for the families in `families.FAMILIES`, so that a plan imports neither torch nor
transformers. Parameters in total are counted on the stock class's meta model (`families.meta_model`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sparsekd_ray.errors import ModelError
from sparsekd_ray.model import cost, families

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    Config = Mapping[str, object] | str | Path | PreTrainedConfig | PreTrainedModel

LOW_RANK_PREFIX = "sparsekd_"  # of model_type and of the fields that a low-rank student's config adds
RANKS, STORAGE, BIAS, PARAMETERS = (
    f"{LOW_RANK_PREFIX}{field}" for field in ("ranks", "storage", "bias", "parameters")
)

NOT_INHERITED = (  # fields of a config that a model rebuilt from it does not take over
    "model_type", "architectures", "auto_map", "transformers_version", RANKS, STORAGE, BIAS, PARAMETERS,
)  # fmt: skip

CALL_OPTIONS = {  # options of a past call, not of the model: debugging runs and old exports save them
    "output_attentions", "output_hidden_states", "return_dict", "use_return_dict", "torchscript", "pruned_heads",
    "transformers_weights",
}  # fmt: skip

OTHER_MODELS = {  # fields of a config that name kinds of models which this package does not prune
    "quantization_config": "quantised weights", "per_layer_config": "layers of different sizes",
    "vision_config": "a vision model", "audio_config": "an audio model", "is_encoder_decoder": "an encoder",
}  # fmt: skip


class Storage(NamedTuple):
    """How a student stores its low-rank matrices."""

    gauge: bool  # gauge-fixed in place of two factors
    bias: bool  # with output biases


def config_dict(config: Config) -> dict[str, object]:
    """The config as plain values, without options of a call. Raises ModelError if a directory has no config.json."""
    if isinstance(config, Mapping):
        values = dict(config)
    elif isinstance(config, str | Path):
        values = _read_config(Path(config) / "config.json")
    else:
        values = dict(vars(config).get("config", config).to_dict())
    return {key: value for key, value in values.items() if key not in CALL_OPTIONS}


def _read_config(path: Path) -> dict[str, object]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8-sig")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path} is no readable config ({error}): give a Hugging Face directory") from error


def check_supported(config: Config) -> str:
    """The model type of the stock family, whether the model is stock or low-rank.

    Raises ModelError that names every field that is not supported. A model type without an entry in
    `families.FAMILIES` is built on the meta device and examined, which imports torch.
    """
    values = config_dict(config)
    model_type = str(values.get("model_type")).removeprefix(LOW_RANK_PREFIX)
    obstacles = [f"{words} ({key})" for key, words in OTHER_MODELS.items() if values.get(key)]
    obstacles += [f"mixture of experts ({key})" for key in values if "experts" in key and values[key]]
    obstacles += [f"biased MLP ({key})" for key in values if "mlp" in key and "bias" in key and values[key]]
    if "model_type" not in values:
        obstacles.append("no model_type")
    if obstacles:
        raise ModelError(
            f"model not supported: found {', '.join(obstacles)}; supported are dense, unquantised language models "
            f"without MLP biases: {families.supported_names()}, and others whose layers are like theirs"
        )
    if model_type not in families.FAMILIES:
        _examine(values)
    return model_type


def _examine(values: Mapping[str, object]) -> dict[str, tuple[int, int]]:
    from sparsekd_ray.model import probe

    return probe.structure(families.meta_model(stock_values(values)))


def stock_values(config: Config) -> dict[str, object]:
    """The config of the stock model from which a low-rank student was made; a stock model's own."""
    values = config_dict(config)
    model_type = str(values.get("model_type")).removeprefix(LOW_RANK_PREFIX)
    return {k: v for k, v in values.items() if k not in NOT_INHERITED} | {"model_type": model_type}


def is_low_rank(config: Config) -> bool:
    """Whether the model is of one of this package's own low-rank types."""
    return str(config_dict(config).get("model_type")).startswith(LOW_RANK_PREFIX)


def mlp_ranks(config: Config) -> dict[str, int]:
    """The rank of every MLP matrix that is low-rank; empty for a stock model."""
    ranks = config_dict(config).get(RANKS) or {}
    if not isinstance(ranks, Mapping):
        raise ModelError(f"{RANKS} of the config must map matrices to ranks, and is {ranks!r}")
    return {str(name): int(rank) for name, rank in ranks.items()}


def mlp_storage(config: Config) -> Storage:
    """How the low-rank matrices are stored; both False for a stock model."""
    values = config_dict(config)
    return Storage(values.get(STORAGE) == "gauge", bool(values.get(BIAS)))


def shapes_from_config(config: Config) -> dict[str, tuple[int, int]]:
    """Name and shape (m, n) of every MLP matrix in order; the dense shape where a student holds it as low-rank."""
    values = config_dict(config)
    model_type, ranks = check_supported(values), mlp_ranks(values)
    family = families.FAMILIES.get(model_type)
    if family is None:
        return _joined(_examine(values), ranks)
    hidden, inner, layers = sizes(values, "hidden_size", "intermediate_size", "num_hidden_layers")
    separate = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden)}
    gate_up = {"gate_up_proj": (2 * inner, hidden)} if family.fused else separate
    layer_shapes = gate_up | {"down_proj": (hidden, inner)}
    stock = {
        f"model.layers.{i}.mlp.{name}": shape for i in range(layers) for name, shape in layer_shapes.items()
    }
    return _joined(stock, ranks)


def _joined(stock: Mapping[str, tuple[int, int]], ranks: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """The matrices with gate and up as one, in the layers where a student's ranks name both as one."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, (m, n) in stock.items():
        parent, _, leaf = name.rpartition(".")
        joint = f"{parent}.gate_up_proj"
        if leaf in ("gate_proj", "up_proj") and joint in ranks:
            shapes[joint] = (2 * m, n)
        else:
            shapes[name] = (m, n)
    return shapes


def mlp_parameters(config: Config) -> int:
    """Number of MLP parameters of this model, low-rank matrices in the form in which they are stored."""
    values = config_dict(config)
    ranks, storage = mlp_ranks(values), mlp_storage(values)
    shapes = shapes_from_config(values)
    return sum(cost.parameters(m, n, ranks.get(name), *storage) for name, (m, n) in shapes.items())


def total_parameters(config: Config) -> int:
    """Number of parameters of this model, tied embeddings once; counted on the stock class's meta model."""
    values = config_dict(config)
    check_supported(values)
    stock = stock_values(values)
    meta = families.meta_model(stock)
    return sum(p.numel() for p in meta.parameters()) - mlp_parameters(stock) + mlp_parameters(values)


def sizes(config: Config, *keys: str) -> list[int]:
    """Whole numbers of the config, such as `hidden_size`. Raises ModelError that names those it lacks."""
    values = config_dict(config)
    numbers = {key: value for key in keys if isinstance(value := values.get(key), int)}
    if missing := [key for key in keys if key not in numbers]:
        raise ModelError(f"the model config gives no whole number for {', '.join(missing)}")
    return [numbers[key] for key in keys]


def layer_count(config: Config) -> int:
    """Number of layers."""
    return sizes(config, "num_hidden_layers")[0]
