"""Estimates for a plan from a model's shape alone: parameters, bytes of cache, memory per GPU.

This is pure arithmetic, and nothing is loaded. Memory counts DeepSpeed's bytes per parameter (bf16 weights 2,
gradients 2, fp32 master and Adam moments 12), ZeRO's communication buckets, the loss's logits, and activations.
"""

from __future__ import annotations

from typing import NamedTuple

from sparsekd_ray.config import Config, Shape
from sparsekd_ray.model.cost import ROWS_PER_CHUNK
from sparsekd_ray.model.hub import config_of
from sparsekd_ray.model.spec import mlp_parameters

GB = 1e9
BUCKETS = 2 * 2 * 5 * 10**8  # DeepSpeed's default all-gather and reduce buckets, bf16


class Parameters(NamedTuple):
    mlp: int
    attention: int
    embedding: int

    @property
    def total(self) -> int:
        return sum(self)


def parameters(shape: Shape) -> Parameters:
    """Parameters of the matrices. Norms and biases are left out: they are less than a thousandth of all."""
    embedding = shape.vocab * shape.hidden * (1 if shape.tied else 2)
    head = shape.head_dim or shape.hidden // shape.heads
    attention = 2 * shape.hidden * head * (shape.heads + shape.kv_heads)
    return Parameters(mlp_parameters(config_of(shape)), shape.layers * attention, embedding)


def cache_bytes(config: Config) -> int:
    """Bytes of one cache.

    Plain: 4 bytes for every number, before Parquet's compression. Compact: 13 bits for an id and its probability, and
    2 bytes for a tail or an input id, as measured with k = 32 at V = 200,064. Sampled: `teacher.bytes_per_token`.
    """
    teacher, tokens = config.teacher, config.corpus.samples * config.corpus.seq_len
    stored = len(teacher.temperatures)
    if teacher.signal == "sampled":
        return int(tokens * teacher.bytes_per_token)
    if teacher.codec == "compact":
        return int(tokens * (13 / 8 * teacher.k + 2 * (stored + 1) + 2))
    return tokens * (8 * teacher.k + 4 * stored + 4)


def training_gb(config: Config, shape: Shape, sparsity: float = 0.0) -> float:
    """GB per worker while distilling a student of this size with ZeRO (bf16)."""
    counts, workers = parameters(shape), config.execution.workers
    total = counts.total - int(sparsity * counts.mlp)
    trained = total if config.distill.train_embeddings else total - counts.embedding
    gradients = 2 * trained / (workers if config.execution.zero_stage == 2 else 1)
    optimizer = 0 if config.execution.offload else 12 * trained / workers
    # logits and their gradient in fp32, three copies at the loss's peak, and the head's gradient if it is trained
    loss = 3 * 4 * ROWS_PER_CHUNK * shape.vocab + (
        4 * counts.embedding if config.distill.train_embeddings else 0
    )
    return (2 * total + gradients + optimizer + loss + BUCKETS + activation_bytes(config, shape)) / GB


def activation_bytes(config: Config, shape: Shape) -> int:
    """Bytes kept for the backward pass of one micro-batch.

    All activations are kept, or with `recompute` only the input of every block and the activations of one block.
    """
    tokens = config.execution.micro_batch * config.corpus.seq_len
    block = 2 * tokens * (14 * shape.hidden + 4 * shape.intermediate)
    if config.execution.recompute:
        return 2 * tokens * shape.hidden * shape.layers + block
    return block * shape.layers


def capture_gb(shape: Shape) -> float:
    """GB per teacher actor: bf16 weights and a chunk of logits."""
    return (2 * parameters(shape).total + 2 * 4 * ROWS_PER_CHUNK * shape.vocab) / GB
