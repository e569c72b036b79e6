"""Phi-3 and Qwen3 language models whose MLP matrices may be products of two thin ones (SparseKD students).

A matrix W [m, n] that `config.mlp_ranks` lists with rank r is held in one of two forms, the same for all of a model
(`config.mlp_storage`); one that is not listed stays dense, and everything else is the stock architecture:

- factors: y = B (A x), with `A.weight` [r, n] and `B.weight` [m, r]; r (m + n) parameters instead of m n;
- gauge (pivoted; PIFA): y = U (x_P + C x_rest), where `order` [n] lists the inputs, x_P the first r of them and x_rest
  the others, with `U.weight` [m, r] and `C.weight` [r, n − r]; r (m + n − r) parameters.

With `config.mlp_bias` each of them adds an output bias, `bias` [m]. Phi-3 fuses gate and up in one `gate_up_proj`, so
both share A: two matrix products, not four. A layer of Qwen3 does the same where `mlp_ranks` lists a `gate_up_proj` of
[2 m, n], gate first, in place of its `gate_proj` and `up_proj`.

This file is complete in itself (torch and transformers only): it travels with exported weights as
`modeling_sparsekd.py`, and `AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)` runs it.
Loading is strict: weights that are missing, left over or of another shape are errors, and so is a number of
parameters other than the recorded one. Otherwise a student could silently come back random or unpruned.
"""

from collections.abc import Mapping
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

STORAGES = ("factors", "gauge")
TP_SIZES = 8  # a matrix is split over GPUs only if it could be over this many


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, tied ones once, whole ones where DeepSpeed's ZeRO-3 holds only a part here."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


def product(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The matrix W [m, n] in float64 that a layer's tensors stand for, by their names in its state; without bias."""
    held = {name: tensor.detach() for name, tensor in tensors.items()}
    if "weight" in held:
        return held["weight"].double()
    if "A.weight" in held:
        return held["B.weight"].double() @ held["A.weight"].double()
    U, C = held["U.weight"].double(), held["C.weight"].double()
    W = U.new_empty(len(U), len(held["order"]))
    W[:, held["order"]] = torch.cat([U, U @ C], 1)
    return W


class LowRankLinear(nn.Module):
    """y = B (A x), or y = B (A x) + bias: a linear layer of rank r as two factors."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = False) -> None:
        super().__init__()
        self.A = nn.Linear(in_features, rank, bias=False)
        self.B = nn.Linear(rank, out_features, bias=False)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.B(self.A(x))
        return y if self.bias is None else y + self.bias


class GaugeLinear(nn.Module):
    """y = U (x_P + C x_rest), or that plus bias: a linear layer of rank r whose rows are told by r of its inputs.

    `order` is a permutation of the inputs, the r pivots first: whole numbers, which no change of type touches.
    """

    order: torch.Tensor

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = False) -> None:
        super().__init__()
        self.rank = rank
        self.U = nn.Linear(rank, out_features, bias=False)
        self.C = nn.Linear(in_features - rank, rank, bias=False)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.register_buffer("order", torch.arange(in_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.index_select(-1, self.order)
        y = self.U(x[..., : self.rank] + self.C(x[..., self.rank :]))
        return y if self.bias is None else y + self.bias


class FusedMLP(nn.Module):
    """Phi-3's MLP, for layers that are not all dense: gate and up are one matrix, gate first."""

    def __init__(self, gate_up_proj: nn.Module, down_proj: nn.Module, act_fn: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self.act_fn = gate_up_proj, down_proj, act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate) * up)


class SeparateMLP(nn.Module):
    """Qwen3's MLP, for layers that are not all dense."""

    def __init__(
        self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module, act_fn: nn.Module
    ) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        self.act_fn = act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # A loop, which vLLM does not rewrite: from the first instance of a class it decides for all of them whether
        # gate and up become one dense matrix, and here one layer may hold factors where another is dense.
        gate, up = [project(x) for project in (self.gate_proj, self.up_proj)]
        return self.down_proj(self.act_fn(gate) * up)


def _make_low_rank(base: nn.Module, config: Any) -> None:
    """Replace the MLP of every layer that `mlp_ranks` names; names are those in the causal model."""
    left = dict(config.mlp_ranks)
    for i, layer in enumerate(base.layers):  # type: ignore[union-attr, arg-type]
        prefix = f"model.layers.{i}.mlp."
        ranks = {name: left.pop(name) for name in list(left) if name.startswith(prefix)}
        if ranks:
            layer.mlp = _low_rank_mlp(layer.mlp, prefix, ranks, config)
    if left:
        raise ValueError(f"mlp_ranks names {next(iter(left))!r}, which is no MLP matrix of this model")


def _low_rank_mlp(mlp: Any, prefix: str, ranks: dict[str, int], config: Any) -> nn.Module:
    """The MLP with a low-rank layer in the place of each named dense one."""
    children: dict[str, Any] = dict(mlp.named_children())
    layers: dict[str, Any] = {
        prefix + name: layer for name, layer in children.items() if isinstance(layer, nn.Linear)
    }
    joint, pair = f"{prefix}gate_up_proj", (f"{prefix}gate_proj", f"{prefix}up_proj")
    if joint in ranks and joint not in layers:
        gate, up = (layers.pop(name) for name in pair)
        layers[joint] = nn.Linear(gate.in_features, gate.out_features + up.out_features, device="meta")
    for name, rank in ranks.items():
        if name not in layers:
            raise ValueError(f"mlp_ranks names {name!r}, which is no MLP matrix of this model")
        layers[name] = _low_rank_layer(name, layers[name], rank, config)
    kind = FusedMLP if joint in layers else SeparateMLP
    act_fn = children["activation_fn" if "activation_fn" in children else "act_fn"]
    return kind(**{name.removeprefix(prefix): layer for name, layer in layers.items()}, act_fn=act_fn)


def _low_rank_layer(name: str, dense: nn.Linear, rank: int, config: Any) -> nn.Module:
    m, n = dense.out_features, dense.in_features
    gauge = config.mlp_storage == "gauge"
    if not 0 < rank < min(m, n) or (not gauge and rank * (m + n) >= m * n):
        raise ValueError(
            f"mlp_ranks gives {name!r} ({m} by {n}) rank {rank}: no smaller than the dense matrix"
        )
    return (GaugeLinear if gauge else LowRankLinear)(n, m, rank, bias=config.mlp_bias)


def tensor_parallel_plan(config: Any, stock: Mapping[str, str]) -> dict[str, str]:
    """How each matrix is split over GPUs: transformers' `base_model_tp_plan`, which vLLM reads too.

    stock: the plan of the stock model, whose attention is kept. A matrix that widens (gate, up) is split by outputs, in
    B; the r numbers before it are everywhere. One that narrows (down) is split by inputs, in A, so that r numbers are
    summed over the GPUs, not m. The activation between them stays split where gate and up are separate and without
    bias, and no `down_proj` picks its inputs out of all; elsewhere it is gathered, as in stock Phi-3.

    A rule holds for a name in every layer (transformers) and for names that begin with it (vLLM). So dense matrices
    whose name is that of a low-rank one in another layer have none, and are whole on every GPU.
    """
    ranks: dict[str, list[int]] = {}  # by the matrix's name inside a layer
    for name, rank in config.mlp_ranks.items():
        ranks.setdefault(name.rpartition(".")[2], []).append(rank)
    gauge, separate = config.mlp_storage == "gauge", "layers.*.mlp.gate_proj" in stock
    mixed = any(len(found) < config.num_hidden_layers for found in ranks.values())
    joint = len(ranks.get("gate_up_proj", ())) if separate else 0
    gathered = not separate or mixed or joint > 0 or config.mlp_bias or (gauge and "down_proj" in ranks)
    styles = (Phi3Config if gathered else Qwen3Config).base_model_tp_plan or {}
    wide = styles["layers.*.mlp.gate_up_proj" if gathered else "layers.*.mlp.gate_proj"]
    narrow = styles["layers.*.mlp.down_proj"]
    dense = {"down_proj": narrow} if "down_proj" not in ranks else {}
    if joint < config.num_hidden_layers:
        wides = ("gate_proj", "up_proj") if separate else ("gate_up_proj",)
        dense |= {leaf: wide for leaf in wides if leaf not in ranks}
    low_rank: dict[str, str] = {}
    for leaf, found in ranks.items():
        even = all((config.intermediate_size - rank) % TP_SIZES == 0 for rank in found)
        first, last = ("replicate", wide) if leaf != "down_proj" else (narrow, "replicate")
        if gauge:
            low_rank |= {f"{leaf}.C": first if even else "replicate", f"{leaf}.U": last}
        else:
            low_rank |= {f"{leaf}.A": first, f"{leaf}.B": last}
    attention = {key: style for key, style in stock.items() if ".mlp." not in key}
    return attention | {f"layers.*.mlp.{name}": style for name, style in (dense | low_rank).items()}


def _describe_mlp(config: Any, ranks: Any, storage: str, bias: bool, expected: int | None) -> None:
    """What both configs add to the stock one."""
    if storage not in STORAGES:
        raise ValueError(f"mlp_storage is {storage!r}; allowed: {', '.join(STORAGES)}")
    config.mlp_ranks = dict(ranks or {})
    config.mlp_storage, config.mlp_bias = storage, bias
    config.num_parameters_expected = expected
    config.base_model_tp_plan = tensor_parallel_plan(config, type(config).base_model_tp_plan)


class SparsePhi3Config(Phi3Config):
    """Phi3Config with the fields told above, and `num_parameters_expected` (tied ones once)."""

    model_type = "sparsekd_phi3"

    def __init__(
        self,
        mlp_ranks: dict[str, int] | None = None,
        mlp_storage: str = "factors",
        mlp_bias: bool = False,
        num_parameters_expected: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        _describe_mlp(self, mlp_ranks, mlp_storage, mlp_bias, num_parameters_expected)


class SparseQwen3Config(Qwen3Config):
    """Qwen3Config with the fields told above, and `num_parameters_expected` (tied ones once)."""

    model_type = "sparsekd_qwen3"

    def __init__(
        self,
        mlp_ranks: dict[str, int] | None = None,
        mlp_storage: str = "factors",
        mlp_bias: bool = False,
        num_parameters_expected: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        _describe_mlp(self, mlp_ranks, mlp_storage, mlp_bias, num_parameters_expected)


class SparsePhi3Model(Phi3Model):
    config_class = SparsePhi3Config

    def __init__(self, config: SparsePhi3Config) -> None:
        super().__init__(config)
        _make_low_rank(self, config)


class SparseQwen3Model(Qwen3Model):
    config_class = SparseQwen3Config

    def __init__(self, config: SparseQwen3Config) -> None:
        super().__init__(config)
        _make_low_rank(self, config)


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
