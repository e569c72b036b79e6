"""The differences between architectures, and the stock classes of transformers from which the rest is derived.

An entry of `FAMILIES` holds what a plan needs before torch is imported: the family's name, and whether gate and up are
one matrix. Everything else is derived from the stock class of the model type and proved on load (`probe.py`). A model
type without an entry is supported too if its stock class passes the same probes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from sparsekd_ray.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class Family(NamedTuple):
    name: str  # as its publishers write it
    fused: bool = False  # gate and up are one matrix, `gate_up_proj`


FAMILIES = {  # by model_type of config.json
    "phi3": Family("Phi-3", fused=True),
    "qwen3": Family("Qwen3"),
    "qwen2": Family("Qwen2"),
    "llama": Family("Llama"),
    "mistral": Family("Mistral"),
    "smollm3": Family("SmolLM3"),
    "olmo2": Family("OLMo 2"),
    "gemma3_text": Family("Gemma 3"),
}


class StockClasses(NamedTuple):
    config: type[PreTrainedConfig]
    base: type[PreTrainedModel]
    causal: type[PreTrainedModel]


def stock_classes(model_type: str) -> StockClasses:
    """The classes of transformers for this model type. Raises ModelError if it has no causal language model."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    config = CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else None  # noqa: SIM401, no get
    if config is None or config not in MODEL_FOR_CAUSAL_LM_MAPPING or config not in MODEL_MAPPING:
        raise ModelError(
            f"transformers has no causal language model of model_type {model_type!r}; supported are "
            f"{supported_names()}, and dense models whose layers are like theirs"
        )
    base, causal = MODEL_MAPPING[config], MODEL_FOR_CAUSAL_LM_MAPPING[config]
    assert isinstance(base, type) and isinstance(causal, type), (
        f"{config.__name__} has one model of each kind"
    )
    return StockClasses(config, base, causal)


def supported_names() -> str:
    """The families with an entry, for messages."""
    return ", ".join(f"{family.name} ({model_type})" for model_type, family in FAMILIES.items())


def meta_model(values: Mapping[str, object]) -> PreTrainedModel:
    """The stock model of this config.json on the meta device: every name and shape, no memory.

    Raises ModelError if transformers refuses the config.
    """
    return _meta_model(json.dumps(dict(values), sort_keys=True, default=str))


@lru_cache(maxsize=8)
def _meta_model(config_json: str) -> PreTrainedModel:
    import torch

    values = json.loads(config_json)
    classes = stock_classes(values["model_type"])
    try:
        with torch.device("meta"):
            return classes.causal(classes.config.from_dict(values))
    except Exception as error:  # a stock class may raise anything at a config that it does not understand
        raise ModelError(f"{classes.causal.__name__} refuses this config.json: {error}") from error
