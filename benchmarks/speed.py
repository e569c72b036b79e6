"""Prefill and decode of pruned models against the dense one, at real widths with random weights and few layers.

Speed does not depend on the values of weights, so every kind of student is made by shape alone. The vocabulary is
small: the head is no part of what is pruned, and would dilute every ratio in a model of few layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from sparsekd_ray.evaluate import speed
from sparsekd_ray.model import loading, spec
from sparsekd_ray.model.mlp import MLP, layer_count, mlp_of, with_width, without_layers
from sparsekd_ray.prune import allocate, neurons
from sparsekd_ray.prune.depth import count
from sparsekd_ray.runtime.logging import headline

ALIGN, VOCABULARY, PROMPT, NEW_TOKENS = 64, 2048, 256, 24
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3_0_6b": {
        "family": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128,
    },
    "phi4_mini": {
        "family": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24,
        "num_key_value_heads": 8,
    },
}  # fmt: skip


def table(
    shape: str, layers: int, sparsities: tuple[float, ...], repeats: int, device: str
) -> list[dict[str, Any]]:
    """A row per kind of student and sparsity: speeds, how many times faster than dense, and the limits of that.

    In bf16 on a GPU, in fp32 on a CPU, most of which are far slower in bf16.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    dense = model(shape, layers).to(device, dtype)
    kinds: dict[str, Callable[[Any, float], Any]] = {
        "factors": lambda m, s: low_rank(m, s, False),
        "gauge": lambda m, s: low_rank(m, s, True),
        "width": narrower,
        "depth": lambda m, s: without_layers(m, range(count(layers, s))),
        "masks": lambda m, s: m,
    }
    rows = []
    for sparsity in sparsities:
        for kind, make in kinds.items():
            student = make(dense, sparsity)
            size = spec.mlp_parameters(student)
            gone = sparsity if kind == "masks" else 1 - size / spec.mlp_parameters(dense)
            found = speed.compare(dense, student, prompt=PROMPT, new_tokens=NEW_TOKENS, repeats=repeats)
            reached = {f"{regime}_of_limit": found[f"{regime}_speedup"] / found[f"{regime}_limit"] for regime in
                       ("prefill", "decode")}  # fmt: skip
            rows.append({"kind": kind, "sparsity": gone} | found | reached)
            headline(
                f"{kind} −{gone:.1%}: prefill {found['prefill_speedup']:.2f} ×, decode {found['decode_speedup']:.2f} ×"
            )
    return rows


def model(shape: str, layers: int) -> Any:
    """A stock model of a real model's widths, with few layers, a small vocabulary and random weights."""
    import transformers

    values = dict(SHAPES[shape])
    classes = {"phi3": transformers.Phi3Config, "qwen3": transformers.Qwen3Config}
    config: Any = classes[values.pop("family")](
        vocab_size=VOCABULARY,
        num_hidden_layers=layers,
        max_position_embeddings=PROMPT + NEW_TOKENS,
        pad_token_id=0,
        tie_word_embeddings=True,
        **values,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def low_rank(dense: Any, sparsity: float, gauge: bool) -> Any:
    """A student of uniform aligned ranks; random tensors in the places of the matrices."""
    shapes, size = spec.shapes_from_config(dense), spec.mlp_parameters(dense)
    flat = {name: np.ones(min(shape)) for name, shape in shapes.items()}
    ranks = allocate.choose("uniform", flat, shapes, sparsity, ALIGN, size, gauge=gauge)
    cut = {name: rank for name, rank in ranks.items() if rank is not None}
    state = dict(dense.state_dict())
    for name, rank in cut.items():
        m, n = shapes[name]
        del state[f"{name}.weight"]
        parts = {"A.weight": (rank, n), "B.weight": (m, rank)}
        if gauge:
            parts = {"U.weight": (m, rank), "C.weight": (rank, n - rank)}
            state[f"{name}.order"] = torch.randperm(n, generator=torch.Generator().manual_seed(0))
        state |= {f"{name}.{key}": 0.02 * torch.randn(size) for key, size in parts.items()}
    return loading.rebuild(dense, cut, state, gauge=gauge)


def narrower(dense: Any, sparsity: float) -> Any:
    """A student of fewer neurons, the first ones."""
    size, layers = spec.mlp_parameters(dense), layer_count(dense)
    width = neurons.width(size, sparsity, dense.config.hidden_size, layers, ALIGN)
    mlps = [mlp_of(dense, layer) for layer in range(layers)]
    return with_width(dense, [MLP(m.gate_ID[:width], m.up_ID[:width], m.down_DI[:, :width]) for m in mlps])
