"""Settings of the dense model: from the hub, a directory, or a stand-in trained here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from sparsekd_ray.config.base import Positive, Settings
from sparsekd_ray.config.text import Source


class Standin(Settings):
    """A small model of a real architecture. The run trains it, so no model hub is needed."""

    family: Literal["phi3", "qwen3"] = "phi3"
    """Architecture."""
    hidden: Positive = 128
    """Width of the residual stream."""
    intermediate: Positive = 352
    """Neurons of each MLP."""
    layers: Positive = 4
    """Number of layers."""
    heads: Positive = 4
    """Attention heads per layer."""
    kv_heads: Positive = 2
    """Key and value heads per layer."""
    vocab: int = Field(2048, ge=300)
    """Size of the byte-level BPE vocabulary. It is trained on the same text."""
    steps: Positive = 400
    """Optimiser steps of its training."""
    batch: Positive = 8
    """Sequences of `corpus.seq_len` tokens per step. Each of the `steps × batch` sequences is read once."""
    lr: float = Field(0.02, gt=0)
    """Peak learning rate of Muon (matrices)."""
    lr_adam: float = Field(0.03, gt=0)
    """Peak learning rate of AdamW (embedding and norms)."""
    unseen: tuple[str, ...] = ()
    """Names of corpus sources that this model is not trained on. Their text is new to it in the training mix."""
    sources: tuple[Source, ...] = ()
    """Text to train on. Without any, these are the corpus's sources except `unseen`."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Standin:
        if self.hidden % (2 * self.heads) or self.heads % self.kv_heads:
            raise ValueError(
                f"model.standin: hidden ({self.hidden}) must be an even multiple of heads ({self.heads}), and heads a "
                f"multiple of kv_heads ({self.kv_heads})"
            )
        return self


class Shape(Settings):
    """Shape of a model, for plans that are made before its weights are at hand. Loading checks it against the model."""

    family: str
    """`model_type` of its config.json, such as phi3, qwen3 or llama."""
    hidden: Positive
    """Width of the residual stream."""
    intermediate: Positive
    """Neurons of each MLP."""
    layers: Positive
    """Number of layers."""
    heads: Positive
    """Attention heads per layer."""
    kv_heads: Positive
    """Key and value heads per layer."""
    vocab: Positive
    """Rows of the embedding."""
    head_dim: int | None = None
    """Width of a head, if it is not hidden / heads."""
    tied: bool = True
    """Whether embedding and head share their weights."""


class Model(Settings):
    """The dense model: either `path` or `standin`."""

    path: str | None = None
    """Hub id or local directory of the model."""
    revision: str | None = None
    """Hub revision (commit) of `path`. It is part of the model's identity."""
    standin: Standin | None = None
    """A small model that the run trains itself."""
    shape: Shape | None = None
    """Shape of the model, for the estimates of a plan."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Model:
        if (self.path is None) == (self.standin is None):
            raise ValueError(
                "give either model.path (a hub id or a directory) or model.standin (train one here), not both; to "
                "replace the stand-in of the default settings, write a YAML file with `model: {path: …}`"
            )
        return self
