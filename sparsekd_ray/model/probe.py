"""Checks, when a model is loaded, of what pruning and distillation assume about it.

`structure` needs names and shapes alone, so a meta model will do; `numbers` runs the model once on a few tokens. Each
failure raises a ModelError that names the probe and the difference.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsekd_ray.errors import ModelError
from sparsekd_ray.model import families, mlp

logger = logging.getLogger(__name__)

GATE_UP = (("gate_up_proj",), ("gate_proj", "up_proj"))
SCALE = 1024.0  # a power of two, exact in any type; it carries logits to where a cap would show
TOKENS = 8
SMALL = {"num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 128}


def structure(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Name and shape (m, n) of every MLP matrix of a stock model, in order. Raises ModelError for another structure."""
    kind, config = type(model).__name__, model.config
    base = getattr(model, "model", None)
    for name, wanted in (("embed_tokens", nn.Embedding), ("layers", nn.ModuleList), ("norm", nn.Module)):
        if not isinstance(getattr(base, name, None), wanted):
            raise ModelError(_refusal("structure", kind, f"it has no model.{name}"))
    head = getattr(model, "lm_head", None)
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ModelError(_refusal("structure", kind, f"its lm_head is {head}, not a matrix without bias"))
    layers = getattr(base, "layers")  # noqa: B009, a module's attributes have no types
    if len(layers) != (stated := getattr(config, "num_hidden_layers", None)):
        raise ModelError(
            _refusal("structure", kind, f"it has {len(layers)} layers, its config says {stated}")
        )
    shapes: dict[str, tuple[int, int]] = {}
    for index, layer in enumerate(layers):
        for leaf, linear in _projections(getattr(layer, "mlp", None), kind, index).items():
            shapes[f"model.layers.{index}.mlp.{leaf}"] = (linear.out_features, linear.in_features)
    hidden, inner = getattr(config, "hidden_size", 0), getattr(config, "intermediate_size", 0)
    for name, shape in shapes.items():
        leaf = name.rpartition(".")[2]
        expected = {"gate_up_proj": (2 * inner, hidden), "down_proj": (hidden, inner)}.get(
            leaf, (inner, hidden)
        )
        if shape != expected:
            raise ModelError(_refusal("structure", kind, f"{name} is {shape}, its config implies {expected}"))
    return shapes


def _projections(mlp: object, kind: str, index: int) -> dict[str, nn.Linear]:
    """gate and up (apart or as one) and down of a gated MLP."""
    children = dict(mlp.named_children()) if isinstance(mlp, nn.Module) else {}
    linear = {name: child for name, child in children.items() if isinstance(child, nn.Linear)}
    others = {name: child for name, child in children.items() if name not in linear}
    names = next((gate_up for gate_up in GATE_UP if set(linear) == {*gate_up, "down_proj"}), None)
    plain = len(others) == 1 and not [*next(iter(others.values())).parameters()]
    if names is None or not plain:
        parts = ", ".join(f"{name}: {type(child).__name__}" for name, child in children.items()) or "nothing"
        wanted = "gate_proj and up_proj, or gate_up_proj, then down_proj and an activation"
        raise ModelError(
            _refusal("structure", kind, f"layer {index} has an `mlp` of {parts}, where {wanted} are wanted")
        )
    if biased := [name for name, child in linear.items() if child.bias is not None]:
        raise ModelError(
            _refusal("structure", kind, f"{', '.join(biased)} of layer {index} have biases (MLP bias)")
        )
    return {name: linear[name] for name in (*names, "down_proj")}


def small_numbers(values: Mapping[str, object]) -> None:
    """`numbers` of a small random model of a stock config.json, before any weight is there.

    It has the config's hidden size, multipliers and caps, but few layers and entries. The load proves the model itself.
    """
    _small_numbers(json.dumps(dict(values), sort_keys=True, default=str))


@lru_cache(maxsize=8)
def _small_numbers(config_json: str) -> None:
    values = shrunken(json.loads(config_json))
    classes = families.stock_classes(str(values["model_type"]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = classes.causal(classes.config.from_dict(values))
        except Exception as error:  # a stock class may raise anything at sizes that it does not expect
            logger.info(
                f"{classes.causal.__name__} takes no small sizes, so it is probed on load only: {error}"
            )
            return
    numbers(model)


def shrunken(values: Mapping[str, object]) -> dict[str, object]:
    """The same config with at most two layers, 64 neurons and 128 entries of vocabulary."""
    stated = {key: value for key in SMALL if isinstance(value := values.get(key), int)}
    sizes = {key: min(SMALL[key], value) for key, value in stated.items()}
    per_layer = mlp.for_layers(values, range(sizes["num_hidden_layers"]))
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    rest = {key: value for key, value in values.items() if key not in ("dtype", "torch_dtype")}
    return rest | sizes | per_layer | tokens


@torch.no_grad()
def numbers(model: PreTrainedModel) -> None:
    """One forward pass that proves: the first layer's input equals the embedding, the first MLP equals its formula on
    its input, and the logits equal the head times the final hidden state.

    For stock and low-rank models in any type, on any device but meta. Raises ModelError naming the probe that failed.
    """
    kind = type(model).__name__
    seen: dict[str, Tensor] = {}
    base = model.get_submodule("model")
    first, first_mlp, head = (
        model.get_submodule(n) for n in ("model.layers.0", "model.layers.0.mlp", "lm_head")
    )
    ids_1N = torch.linspace(3, model.config.vocab_size - 1, TOKENS, device=model.device).long()[None]

    def record(name: str, pick: Callable[[tuple[Tensor, ...], Tensor], Tensor]) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = pick(args, output)

        return hook

    def scaled(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen["head input"], seen["head"] = args[0], output * SCALE
        return output * SCALE

    def first_input(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen["layer input"] = args[0] if args else kwargs["hidden_states"]

    hooks = [
        model.get_submodule("model.embed_tokens").register_forward_hook(record("embedding", lambda _, y: y)),
        first.register_forward_pre_hook(first_input, with_kwargs=True),
        first_mlp.register_forward_hook(record("mlp input", lambda x, _: x[0])),
        first_mlp.register_forward_hook(record("mlp", lambda _, y: y)),
        base.register_forward_hook(record("hidden", lambda _, y: y[0])),
        head.register_forward_hook(scaled),
    ]
    with _removed(hooks), _evaluating(model):
        logits = model(input_ids=ids_1N, use_cache=False).logits
    _equal(kind, "the first layer's input equals the embedding", seen["layer input"], seen["embedding"])
    _equal(
        kind, "the MLP equals down(act(gate x) · up x)", seen["mlp"], _formula(first_mlp, seen["mlp input"])
    )
    _equal(kind, "the head reads the final hidden state", seen["head input"], seen["hidden"])
    _equal(kind, "the logits equal the head times the final hidden state", logits, seen["head"])


def _formula(mlp: nn.Module, x: Tensor) -> Tensor:
    children = dict(mlp.named_children())
    act = next(child for name, child in children.items() if not name.endswith("_proj"))
    if "gate_up_proj" in children:
        gate, up = children["gate_up_proj"](x).chunk(2, dim=-1)
    else:
        gate, up = children["gate_proj"](x), children["up_proj"](x)
    result: Tensor = children["down_proj"](act(gate) * up)
    return result


def _equal(kind: str, probe: str, actual: Tensor, expected: Tensor) -> None:
    """ModelError if the two differ by more than rounding. NaN counts as equal, since `require_finite` reports it."""
    actual, expected = actual.float(), expected.float().to(actual.device)
    if actual.shape == expected.shape:
        difference = float(
            (actual - expected).abs().nan_to_num().max() / expected.abs().nan_to_num().max().clamp(min=1e-30)
        )
        if difference <= 1e-2:
            return
        raise ModelError(_refusal(probe, kind, f"they differ by {difference:.1%} of the largest value"))
    raise ModelError(_refusal(probe, kind, f"shapes {tuple(actual.shape)} and {tuple(expected.shape)}"))


def _refusal(probe: str, kind: str, difference: str) -> str:
    return (
        f"model not supported: {kind} fails the probe “{probe}”: {difference}. Supported are "
        f"{families.supported_names()}, and dense models whose layers are like theirs"
    )


@contextmanager
def _removed(hooks: list[torch.utils.hooks.RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
