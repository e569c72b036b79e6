"""Phi-3 and Qwen3 language models whose MLP matrices may be products of two thin ones (SparseKD students).

A matrix W [m, n] that `config.mlp_ranks` lists with rank r is held as B A, with A [r, n] and B [m, r], and
costs r (m + n) parameters instead of m n; one that is not listed stays dense. Everything else is the stock
architecture. Phi-3 fuses gate and up in one `gate_up_proj`, so both share A: two matrix products, not four.

This file is complete in itself (torch and transformers only): it travels with exported weights as
`modeling_sparsekd.py`, and `AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)` runs it.
Loading is strict: weights that are missing, left over or of another shape are errors, and so is a number of
parameters other than the recorded one. Otherwise a student could silently come back random or unpruned.
"""

from typing import Any

import torch
from torch import nn
from transformers import (
    Phi3Config,
    Phi3ForCausalLM,
    Phi3Model,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)


class LowRankLinear(nn.Module):
    """y = B (A x), a linear layer of rank r without bias. Weights: `A.weight` [r, n], `B.weight` [m, r]."""

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.A = nn.Linear(in_features, rank, bias=False)
        self.B = nn.Linear(rank, out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.B(self.A(x))


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, tied ones once, whole ones where DeepSpeed's ZeRO-3 holds only a part here."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


def _replace_linears(base: nn.Module, ranks: dict[str, int]) -> None:
    """Put a LowRankLinear in the place of each named layer; names are those in the causal model."""
    linears = {f"model.{name}": layer for name, layer in base.named_modules() if isinstance(layer, nn.Linear)}
    for name, rank in ranks.items():
        linear = linears.get(name)
        if linear is None or ".mlp." not in name:
            raise ValueError(f"mlp_ranks names {name!r}, which is no MLP matrix of this model")
        m, n = linear.out_features, linear.in_features
        if not 0 < rank * (m + n) < m * n:
            raise ValueError(
                f"mlp_ranks gives {name!r} ({m} by {n}) rank {rank}: no smaller than the dense matrix"
            )
        parent, _, leaf = name.removeprefix("model.").rpartition(".")
        setattr(base.get_submodule(parent), leaf, LowRankLinear(n, m, rank))


class SparsePhi3Config(Phi3Config):
    """Phi3Config with `mlp_ranks` (module name to rank) and `num_parameters_expected` (tied ones once)."""

    model_type = "sparsekd_phi3"

    def __init__(
        self,
        mlp_ranks: dict[str, int] | None = None,
        num_parameters_expected: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.mlp_ranks = dict(mlp_ranks or {})
        self.num_parameters_expected = num_parameters_expected


class SparseQwen3Config(Qwen3Config):
    """Qwen3Config with `mlp_ranks` (module name to rank) and `num_parameters_expected` (tied ones once)."""

    model_type = "sparsekd_qwen3"

    def __init__(
        self,
        mlp_ranks: dict[str, int] | None = None,
        num_parameters_expected: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.mlp_ranks = dict(mlp_ranks or {})
        self.num_parameters_expected = num_parameters_expected


class SparsePhi3Model(Phi3Model):
    config_class = SparsePhi3Config

    def __init__(self, config: SparsePhi3Config) -> None:
        super().__init__(config)
        _replace_linears(self, config.mlp_ranks)


class SparseQwen3Model(Qwen3Model):
    config_class = SparseQwen3Config

    def __init__(self, config: SparseQwen3Config) -> None:
        super().__init__(config)
        _replace_linears(self, config.mlp_ranks)


class SparseForCausalLM(PreTrainedModel):
    """What both causal models share: a sparse base, and making and loading that check themselves."""

    base_class: type[PreTrainedModel]

    def __init__(self, config: Any) -> None:
        # Not the stock constructor, which would make the dense model first.
        PreTrainedModel.__init__(self, config)
        self.model = self.base_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        # Counted apart, because transformers ties the head only once the weights are loaded.
        head = 0 if config.tie_word_embeddings else count_parameters(self.lm_head)
        self._check_parameters(count_parameters(self.model) + head)

    def _check_parameters(self, found: int) -> None:
        if found != self.config.num_parameters_expected:
            raise ValueError(
                f"{type(self).__name__} has {found} parameters, but config.num_parameters_expected is "
                f"{self.config.num_parameters_expected}: weights, config and code do not belong together"
            )

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but keys that are missing, unexpected or misshapen raise ValueError."""
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        wrong = {kind: sorted(map(str, found)) for kind, found in info.items() if found}
        if wrong:
            raise ValueError(f"the weights do not fit {cls.__name__}: {wrong}")
        model._check_parameters(count_parameters(model))
        return (model, info) if output_loading_info else model


class SparsePhi3ForCausalLM(SparseForCausalLM, Phi3ForCausalLM):
    config_class = SparsePhi3Config
    base_class = SparsePhi3Model


class SparseQwen3ForCausalLM(SparseForCausalLM, Qwen3ForCausalLM):
    config_class = SparseQwen3Config
    base_class = SparseQwen3Model
