"""Speed of a student against a dense model: prefill and decode, measured in turns, with their theoretical limits.

Prefill is bound by arithmetic: its limit is the ratio of floating-point operations per token (only the last token's
logits are computed, as a server does). Decoding one sequence is bound by memory: its limit is the ratio of weight bytes
read per token. Small models reach neither limit, since starting a kernel takes longer than its work. The ratio of
measured speed-up to limit says how far off a measurement is. Masks change neither limit: zeros are multiplied like any
other number.
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
    """Bytes of weights read to decode one token of one sequence: all weights but an untied input embedding."""
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
    """Speeds of the student and its speed-ups over the dense model, as medians over `repeats` turns.

    A turn prefills one sequence of `prompt` tokens, then decodes `new_tokens` more, one at a time.
    """
    figures: dict[str, list[float]] = {}
    for turn in range(repeats + 1):
        dense_seconds = timed(dense, prompt, new_tokens)
        student_seconds = timed(student, prompt, new_tokens)
        if turn:  # the first turn warms up
            for regime, tokens in (("prefill", prompt), ("decode", new_tokens)):
                figures.setdefault(f"{regime}_tokens_per_s", []).append(tokens / student_seconds[regime])
                figures.setdefault(f"{regime}_speedup", []).append(
                    dense_seconds[regime] / student_seconds[regime]
                )
    medians = {name: statistics.median(values) for name, values in figures.items()}
    return medians | limits(dense, student, prompt)


@torch.inference_mode()
def timed(model: PreTrainedModel, prompt: int, new_tokens: int) -> dict[str, float]:
    """Seconds of one prefill and of the decoding after it."""
    ids = torch.arange(prompt, device=model.device)[None] % model.config.vocab_size
    started = _now(model)
    output = model(ids, use_cache=True, logits_to_keep=1)
    filled = _now(model)
    for _ in range(new_tokens):
        following = output.logits[:, -1:].argmax(-1)
        output = model(following, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
    return {"prefill": filled - started, "decode": _now(model) - filled}


def _now(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _heads(values: dict[str, object]) -> int:
    """Total width of all query heads."""
    attention = families.meta_model(spec.stock_values(values)).get_submodule(
        "model.layers.0.self_attn.o_proj"
    )
    return int(attention.in_features)  # type: ignore[arg-type]
