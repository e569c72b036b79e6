"""Language models whose MLP matrices may be products of two thin ones: SparseKD's low-rank students.

The architecture is a stock one of transformers, for example that of model type `llama`. The student's type is then
`sparsekd_llama`; its classes are `LowRankLlamaConfig`, `LowRankLlamaModel` and `LowRankLlamaForCausalLM`. This module
makes them on first use, from any stock class whose MLP has a gate, an up and a down projection.

A matrix W [m, n] that `config.sparsekd_ranks` lists with rank r is stored in one of two forms. All matrices of a model
have the same form (`config.sparsekd_storage`). A matrix that is not listed stays dense.

- factors: y = B (A x), with `A.weight` [r, n] and `B.weight` [m, r]; r (m + n) parameters instead of m n;
- gauge (pivoted; PIFA): y = U (x_P + C x_rest), where `order` [n] lists the inputs, x_P the first r of them and x_rest
  the others, with `U.weight` [m, r] and `C.weight` [r, n − r]; r (m + n − r) parameters.

With `config.sparsekd_bias` each of them adds an output bias, `bias` [m]. Some stock models fuse gate and up in one
`gate_up_proj`, so both share A: two matrix products, not four. A layer of another model does the same where
`sparsekd_ranks` lists a `gate_up_proj` of [2 m, n], gate first, in place of its `gate_proj` and `up_proj`.

This file is complete in itself (torch and transformers only): it travels with exported weights as
`modeling_sparsekd.py`, and `AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)` runs it.
Loading is strict: weights that are missing, left over or of another shape are errors, and so is a number of parameters
other than `config.sparsekd_parameters`. Otherwise a student could silently come back random or unpruned.
"""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers import MODEL_MAPPING, Phi3Config, PreTrainedModel, Qwen3Config

PREFIX = "LowRank"  # a class name is this prefix and the name of the stock class
STORAGES = ("factors", "gauge")
TP_SIZES = 8  # a matrix is split over GPUs only if it could be over this many


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, tied ones once, whole ones where DeepSpeed's ZeRO-3 holds only a part here."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


def product(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The matrix W [m, n] in float64 that a layer's tensors stand for, by their names in its state; without bias."""
    tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    if "weight" in tensors:
        return tensors["weight"].double()
    if "A.weight" in tensors:
        return tensors["B.weight"].double() @ tensors["A.weight"].double()
    U, C = tensors["U.weight"].double(), tensors["C.weight"].double()
    W = U.new_empty(len(U), len(tensors["order"]))
    W[:, tensors["order"]] = torch.cat([U, U @ C], 1)
    return W


class LowRankLinear(nn.Module):
    """y = B (A x), or y = B (A x) + bias: a linear layer of rank r as two factors."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = False) -> None:
        super().__init__()
        self.A = nn.Linear(in_features, rank, bias=False)
        self.B = nn.Linear(rank, out_features, bias=False)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.B(self.A(x))
        return y if self.bias is None else y + self.bias


class GaugeLinear(nn.Module):
    """y = U (x_P + C x_rest), or that plus bias: a linear layer of rank r, whose rank is that of r of its columns.

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
        y: torch.Tensor = self.U(x[..., : self.rank] + self.C(x[..., self.rank :]))
        return y if self.bias is None else y + self.bias


class FusedMLP(nn.Module):
    """An MLP with low-rank matrices that stores gate and up as one matrix, gate first."""

    def __init__(self, gate_up_proj: nn.Module, down_proj: nn.Module, act_fn: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self.act_fn = gate_up_proj, down_proj, act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        y: torch.Tensor = self.down_proj(self.act_fn(gate) * up)
        return y


class SeparateMLP(nn.Module):
    """An MLP with low-rank matrices that stores gate and up as two matrices."""

    def __init__(
        self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module, act_fn: nn.Module
    ) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        self.act_fn = act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The loop keeps vLLM from rewriting this line. vLLM looks at the first instance of a class and decides for all
        # of them whether gate and up become one dense matrix. But one layer may hold factors where another is dense.
        gate, up = [project(x) for project in (self.gate_proj, self.up_proj)]
        y: torch.Tensor = self.down_proj(self.act_fn(gate) * up)
        return y


def _make_low_rank(base: nn.Module, config: Any) -> None:
    """Replace the MLP of every layer that `sparsekd_ranks` names; names are those in the causal model."""
    remaining = dict(config.sparsekd_ranks)
    layers: Any = base.layers
    for i, layer in enumerate(layers):
        prefix = f"model.layers.{i}.mlp."
        ranks = {name: remaining.pop(name) for name in list(remaining) if name.startswith(prefix)}
        if ranks:
            layer.mlp = _low_rank_mlp(layer.mlp, prefix, ranks, config)
    if remaining:
        raise ValueError(
            f"sparsekd_ranks names {next(iter(remaining))!r}, which is no MLP matrix of this model"
        )


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
            raise ValueError(f"sparsekd_ranks names {name!r}, which is no MLP matrix of this model")
        layers[name] = _low_rank_layer(name, layers[name], rank, config)
    kind = FusedMLP if joint in layers else SeparateMLP
    (act_fn,) = (child for child in children.values() if not isinstance(child, nn.Linear))
    return kind(**{name.removeprefix(prefix): layer for name, layer in layers.items()}, act_fn=act_fn)


def _low_rank_layer(name: str, dense: nn.Linear, rank: int, config: Any) -> nn.Module:
    m, n = dense.out_features, dense.in_features
    gauge = config.sparsekd_storage == "gauge"
    if not 0 < rank < min(m, n) or (not gauge and rank * (m + n) >= m * n):
        raise ValueError(
            f"sparsekd_ranks gives {name!r} ({m} by {n}) rank {rank}: no smaller than the dense matrix"
        )
    return (GaugeLinear if gauge else LowRankLinear)(n, m, rank, bias=config.sparsekd_bias)


def tensor_parallel_plan(config: Any, stock: Mapping[str, str]) -> dict[str, str]:
    """How each matrix is split over GPUs: transformers' `base_model_tp_plan`, which vLLM reads too.

    stock: the plan of the stock model, whose attention is kept. A matrix that widens (gate, up) is split by outputs, in
    B; the r numbers before it are everywhere. One that narrows (down) is split by inputs, in A, so that r numbers are
    summed over the GPUs, not m. The activation between them stays split where gate and up are separate and without
    bias, and no `down_proj` selects its inputs by index. Elsewhere it is gathered, as in stock Phi-3.

    Transformers applies a rule to a name in every layer; vLLM applies it to all names that begin with it. So a dense
    matrix whose name is that of a low-rank one in another layer has no rule, and is whole on every GPU.
    """
    ranks: dict[str, list[int]] = {}  # by the matrix's name inside a layer
    for name, rank in config.sparsekd_ranks.items():
        ranks.setdefault(name.rpartition(".")[2], []).append(rank)
    gauge, separate = config.sparsekd_storage == "gauge", "layers.*.mlp.gate_proj" in stock
    mixed = any(len(leaf_ranks) < config.num_hidden_layers for leaf_ranks in ranks.values())
    joint = len(ranks.get("gate_up_proj", ())) if separate else 0
    gathered = not separate or mixed or joint > 0 or config.sparsekd_bias or (gauge and "down_proj" in ranks)
    styles = (Phi3Config if gathered else Qwen3Config).base_model_tp_plan or {}
    wide = styles["layers.*.mlp.gate_up_proj" if gathered else "layers.*.mlp.gate_proj"]
    narrow = styles["layers.*.mlp.down_proj"]
    dense = {"down_proj": narrow} if "down_proj" not in ranks else {}
    if joint < config.num_hidden_layers:
        wides = ("gate_proj", "up_proj") if separate else ("gate_up_proj",)
        dense |= {leaf: wide for leaf in wides if leaf not in ranks}
    low_rank: dict[str, str] = {}
    for leaf, leaf_ranks in ranks.items():
        even = all((config.intermediate_size - rank) % TP_SIZES == 0 for rank in leaf_ranks)
        first, last = ("replicate", wide) if leaf != "down_proj" else (narrow, "replicate")
        if gauge:
            low_rank |= {f"{leaf}.C": first if even else "replicate", f"{leaf}.U": last}
        else:
            low_rank |= {f"{leaf}.A": first, f"{leaf}.B": last}
    attention = {key: style for key, style in stock.items() if ".mlp." not in key}
    return attention | {f"layers.*.mlp.{name}": style for name, style in (dense | low_rank).items()}


class LowRankConfig:
    """The fields that a low-rank student adds to the stock config: the first base class, before the stock class."""

    def __init__(
        self,
        sparsekd_ranks: Mapping[str, int] | None = None,
        sparsekd_storage: str = "factors",
        sparsekd_bias: bool = False,
        sparsekd_parameters: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if sparsekd_storage not in STORAGES:
            raise ValueError(f"sparsekd_storage is {sparsekd_storage!r}; allowed: {', '.join(STORAGES)}")
        self.sparsekd_ranks = dict(sparsekd_ranks or {})
        self.sparsekd_storage, self.sparsekd_bias = sparsekd_storage, sparsekd_bias
        self.sparsekd_parameters = sparsekd_parameters  # in total, tied ones once
        if stock_plan := getattr(type(self), "base_model_tp_plan", None):
            self.base_model_tp_plan = tensor_parallel_plan(self, stock_plan)


class LowRankModel:
    """What a low-rank student adds to the stock base model: the first base class, before the stock class."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        _make_low_rank(self, config)  # type: ignore[arg-type]


class LowRankForCausalLM:
    """What a low-rank student adds to the stock causal model: the first base class, before the stock class.

    It checks its number of parameters when it is made and when it is loaded.
    """

    config: Any
    low_rank_base: type[PreTrainedModel]

    def __init__(self, config: Any) -> None:
        with torch.device("meta"):  # the stock constructor makes the dense model first, here without memory
            super().__init__(config)  # type: ignore[call-arg]
        self.model = self.low_rank_base(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[attr-defined]
        # Counted apart, because transformers ties the head only once the weights are loaded.
        head = 0 if config.tie_word_embeddings else count_parameters(self.lm_head)
        self._check_parameters(count_parameters(self.model) + head)

    def _check_parameters(self, count: int) -> None:
        if count != self.config.sparsekd_parameters:
            raise ValueError(
                f"{type(self).__name__} has {count} parameters, but config.sparsekd_parameters is "
                f"{self.config.sparsekd_parameters}: weights, config and code do not belong together"
            )

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but keys that are missing, unexpected or misshapen raise ValueError."""
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        model, info = loaded
        wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
        if wrong:
            raise ValueError(f"the weights do not fit {cls.__name__}: {wrong}")
        model._check_parameters(count_parameters(model))
        return (model, info) if output_loading_info else model


def _config_class(stock: Any) -> Any:
    class Config(LowRankConfig, stock):  # type: ignore[misc]
        model_type = f"sparsekd_{stock.model_type}"

        # without it transformers 5 generates an __init__ from the stock fields
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)

    return Config


def _model_class(stock: Any) -> Any:
    class Model(LowRankModel, stock):  # type: ignore[misc]
        config_class = _class_for(stock.config_class)

    return Model


def _causal_class(stock: Any) -> Any:
    class ForCausalLM(LowRankForCausalLM, stock):  # type: ignore[misc]
        config_class = _class_for(stock.config_class)
        low_rank_base = _class_for(MODEL_MAPPING[stock.config_class])  # type: ignore[arg-type]

    return ForCausalLM


def _class_for(stock: type) -> Any:
    return globals().get(f"{PREFIX}{stock.__name__}") or __getattr__(f"{PREFIX}{stock.__name__}")


def __getattr__(name: str) -> Any:
    """`LowRankLlamaForCausalLM` and the like, made of the stock class on first use and kept."""
    stock = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    makers = {"Config": _config_class, "ForCausalLM": _causal_class, "Model": _model_class}
    make = next((make for ending, make in makers.items() if name.endswith(ending)), None)
    if stock is None or make is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = make(stock)
    made.__name__ = made.__qualname__ = name
    return globals().setdefault(name, made)
