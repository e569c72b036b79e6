"""Tiny models of any family, dense and low-rank, that the tests share."""

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

from sparsekd_ray.model import loading, saving, spec
from sparsekd_ray.prune.gauge import gauge
from sparsekd_ray.prune.svd import truncated_factors

torch.set_num_threads(1)

STEMS = {"phi3": "Phi3", "qwen3": "Qwen3"}  # of the stock classes
FAMILIES = tuple(STEMS)  # gate and up fused, and apart; `test_families.py` tries every family
VOCABULARY = 97


def tiny_config(family: str, tied: bool, **more: Any) -> transformers.PretrainedConfig:
    stock = transformers.CONFIG_MAPPING[family]
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 45, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return stock(
        **{**sizes, **heads, **tokens, "tie_word_embeddings": tied, "initializer_range": 0.2, **more}
    )


def dense_model(family: str, tied: bool, **more: Any) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(tiny_config(family, tied, **more)).eval()


def dense_directory(path: Path, family: str, tied: bool, **more: Any) -> Path:
    """A stock model with random weights and a word-level tokenizer."""
    dense_model(family, tied, **more).save_pretrained(path)
    words = Tokenizer(
        WordLevel({"<unk>": 0, "The": 5, **{f"w{i}": i for i in range(6, VOCABULARY)}}, "<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(path)
    return path


class Form(NamedTuple):
    """Of a low-rank student."""

    family: str
    gauge: bool = False
    bias: bool = False
    joint: bool = False  # gate and up of the last layer as one matrix, where the family has two

    def __str__(self) -> str:
        parts = ("gauge" if self.gauge else "factors", "bias" * self.bias, "joint" * self.joint)
        return "-".join(filter(None, (self.family, *parts)))


FORMS = [
    Form(family, gauge, bias, joint)
    for family in FAMILIES
    for gauge, bias, joint in itertools.product((False, True), repeat=3)
    if family != "phi3" or not joint
]


def student_of(
    form: Form, tied: bool = True, rank: int = 5, dense_layers: tuple[int, ...] = (0,), **more: Any
) -> tuple[Any, Any]:
    """A low-rank model, and the dense model whose MLP matrices are its products (with biases where it has them)."""
    dense = dense_model(form.family, tied, **more)
    names = list(spec.shapes_from_config(dense))
    if form.joint:
        last = f"model.layers.{dense.config.num_hidden_layers - 1}.mlp."
        names = [name for name in names if name not in (f"{last}gate_proj", f"{last}up_proj")]
        names.append(f"{last}gate_up_proj")
    names = [name for name in names if int(name.split(".")[2]) not in dense_layers]
    state = {key: tensor.clone() for key, tensor in dense.state_dict().items()}
    for name in names:
        state |= low_rank_tensors(form, name, loading.mlp_matrix(dense, name).float(), rank)
        for part in parts_of(dense, name):
            del state[f"{part}.weight"]
    student = loading.rebuild(dense, dict.fromkeys(names, rank), state, gauge=form.gauge, bias=form.bias)
    for name in names:
        parts, bias = parts_of(dense, name), mlp_bias(student, name)
        for i, part in enumerate(parts):
            layer = dense.get_submodule(part)
            layer.weight.data = loading.mlp_matrix(student, name).float().chunk(len(parts))[i]
            layer.bias = None if bias is None else torch.nn.Parameter(bias.float().chunk(len(parts))[i])
    return student, dense


def low_rank_tensors(form: Form, name: str, W_mn: torch.Tensor, rank: int) -> dict[str, torch.Tensor]:
    B_mr, A_rn = truncated_factors(W_mn, rank)
    held = {"A.weight": A_rn, "B.weight": B_mr}
    if form.gauge:
        held = dict(zip(("order", "U.weight", "C.weight"), gauge(B_mr, A_rn), strict=True))
    if form.bias:
        held["bias"] = torch.randn(len(W_mn))
    return {f"{name}.{key}": tensor for key, tensor in held.items()}


def mlp_bias(model: transformers.PreTrainedModel, name: str) -> torch.Tensor | None:
    """The output bias [m] of one MLP matrix in float64, names as in `mlp_matrix`; None in a model without biases."""
    if not spec.mlp_storage(model).bias:
        return None

    def bias(module: torch.nn.Module) -> torch.Tensor:  # a dense matrix of such a model has none
        bias_m = getattr(module, "bias", None)
        return torch.zeros(int(getattr(module, "out_features"))) if bias_m is None else bias_m.detach()  # noqa: B009

    return loading._read_projection(model, name, lambda module: bias(module).double())


def parts_of(dense: transformers.PreTrainedModel, name: str) -> list[str]:
    """The stock matrices that a low-rank one stands for."""
    if name in spec.shapes_from_config(dense):
        return [name]
    return [name.replace("gate_up_proj", part) for part in ("gate_proj", "up_proj")]


def sparse_directory(path: Path, family: str, tied: bool, **form: bool) -> Path:
    """A student whose first layer stays dense and whose other matrices have rank 5."""
    source = dense_directory(path.parent / f"{path.name}-dense", family, tied)
    saving.save(student_of(Form(family, **form), tied)[0], source, path, "card")
    return path


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits
