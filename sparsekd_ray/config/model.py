"""Settings of the dense model: from the hub, a directory, or a stand-in trained here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from sparsekd_ray.config.base import Positive, Settings
from sparsekd_ray.config.text import Source


class Standin(Settings):
    """A small model of a real architecture, trained here, so that the cascade runs without a model hub."""

    family: Literal["phi3", "qwen3"] = "phi3"
    hidden: Positive = 128
    intermediate: Positive = 352
    layers: Positive = 4
    heads: Positive = 4
    kv_heads: Positive = 2
    vocab: int = Field(2048, ge=300)
    """Size of the byte-level BPE vocabulary, trained on the same text."""
    steps: Positive = 400
    batch: Positive = 8
    """Sequences per step, of `corpus.seq_len` tokens; `steps × batch` sequences are read once."""
    lr: float = Field(0.02, gt=0)
    """Peak learning rate of Muon (matrices)."""
    lr_adam: float = Field(0.03, gt=0)
    """Peak learning rate of AdamW (embedding and norms)."""
    unseen: tuple[str, ...] = ()
    """Names of corpus sources kept out of this model's training: their text is new to it in the calibration mix."""
    sources: tuple[Source, ...] = ()
    """Text to train on; without any, the corpus's own sources but the unseen ones."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Standin:
        if self.hidden % (2 * self.heads) or self.heads % self.kv_heads:
            raise ValueError(
                f"model.standin: hidden ({self.hidden}) must be an even multiple of heads ({self.heads}), and heads a "
                f"multiple of kv_heads ({self.kv_heads})"
            )
        return self


class Shape(Settings):
    """What the plan needs to know of a model before its weights are at hand; checked against the real one on load."""

    family: Literal["phi3", "qwen3"]
    hidden: Positive
    intermediate: Positive
    layers: Positive
    heads: Positive
    kv_heads: Positive
    vocab: Positive
    head_dim: int | None = None
    tied: bool = True


class Model(Settings):
    """The dense model: a hub id or local directory, or a stand-in trained here. Exactly one of the two."""

    path: str | None = None
    revision: str | None = None
    standin: Standin | None = None
    shape: Shape | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Model:
        if (self.path is None) == (self.standin is None):
            raise ValueError(
                "give either model.path (a hub id or a directory) or model.standin (train one here), not both; to "
                "replace the stand-in of the default settings, write a YAML file with `model: {path: …}`"
            )
        return self
