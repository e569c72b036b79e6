"""Speed of a model against another: prefill and decode, measured in turns, with the limits of arithmetic and memory.

Prefill is bound by arithmetic: its limit is the ratio of floating-point operations per token (only the last token's
logits are computed, as a server does). Decoding one sequence is bound by memory: its limit is the ratio of weight bytes
read per token. Small models reach neither, since starting each kernel takes longer than its work; the ratio of
measured to limit says how far off a measurement is. Masks change neither limit: zeros are multiplied like any number.
"""

from __future__ import annotations

import math
import statistics
import time
from typing import TYPE_CHECKING

import torch

from sparsekd_ray.model import families, spec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def flops_per_token(config: spec.Config, context: int) -> float:
    """Floating-point operations of a token in a prefill of `context` tokens, without the head."""
    values = spec.config_dict(config)
    vocabulary, hidden, layers = spec.sizes(values, "vocab_size", "hidden_size", "num_hidden_layers")
    table = vocabulary * hidden
    weights = spec.total_parameters(values) - table * (1 if values.get("tie_word_embeddings") else 2)
    return (
        2 * weights + 4 * layers * _heads(values) * context / 2
    )  # a token attends to half the context on average


def bytes_per_token(config: spec.Config, itemsize: int) -> float:
    """Bytes of weights that are read to decode one token of one sequence: all but an untied input embedding."""
    values = spec.config_dict(config)
    table = math.prod(spec.sizes(values, "vocab_size", "hidden_size"))
    return itemsize * (spec.total_parameters(values) - (0 if values.get("tie_word_embeddings") else table))


def limits(dense: spec.Config, student: spec.Config, context: int) -> dict[str, float]:
    """The largest possible speed-up of the student over `dense`, by operations and by bytes."""
    return {
        "prefill_limit": flops_per_token(dense, context) / flops_per_token(student, context),
        "decode_limit": bytes_per_token(dense, 2) / bytes_per_token(student, 2),
    }


def compare(
    dense: PreTrainedModel, student: PreTrainedModel, *, prompt: int, new_tokens: int, repeats: int
) -> dict[str, float]:
    """Speeds of two models in memory and how many times faster the student is, medians over `repeats` turns.

    `prompt`: tokens of one sequence in a prefill, and before the decoding of `new_tokens` more, one at a time.
    """
    figures: dict[str, list[float]] = {}
    for turn in range(repeats + 1):
        one, other = timed(dense, prompt, new_tokens), timed(student, prompt, new_tokens)
        if turn:  # the first warms up
            for regime, tokens in (("prefill", prompt), ("decode", new_tokens)):
                figures.setdefault(f"{regime}_tokens_per_s", []).append(tokens / other[regime])
                figures.setdefault(f"{regime}_speedup", []).append(one[regime] / other[regime])
    medians = {name: statistics.median(values) for name, values in figures.items()}
    return medians | limits(dense, student, prompt)


@torch.inference_mode()
def timed(model: PreTrainedModel, prompt: int, new_tokens: int) -> dict[str, float]:
    """Seconds of one prefill, and of decoding after it."""
    ids = torch.arange(prompt, device=model.device)[None] % model.config.vocab_size
    started = _now(model)
    found = model(ids, use_cache=True, logits_to_keep=1)
    filled = _now(model)
    for _ in range(new_tokens):
        following = found.logits[:, -1:].argmax(-1)
        found = model(following, past_key_values=found.past_key_values, use_cache=True, logits_to_keep=1)
    return {"prefill": filled - started, "decode": _now(model) - filled}


def _now(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _heads(values: dict[str, object]) -> int:
    """Numbers in all query heads together."""
    attention = families.meta_model(spec.stock_values(values)).get_submodule(
        "model.layers.0.self_attn.o_proj"
    )
    return int(attention.in_features)  # type: ignore[arg-type]
