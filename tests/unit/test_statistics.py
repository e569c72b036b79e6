"""Calibration statistics against the definition: every activation kept, every gradient by autograd on whole batches."""

from collections import defaultdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from lines import recorded

from sparsekd_ray.errors import ModelError
from sparsekd_ray.model import head, loading, spec
from sparsekd_ray.prune import statistics

torch.set_num_threads(1)

FAMILIES = ("phi3", "qwen3")
VOCABULARY, LENGTH, SEQUENCES = 97, 13, 7


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "TOKENS_PER_BATCH", 3 * LENGTH + 2)  # batches of 3, 3 and 1
    monkeypatch.setattr(head, "ROWS_PER_CHUNK", 10)


def some_ids(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH), generator=generator)


def some_model(family: str, form: str) -> Any:
    """Random weights; the low-rank form leaves its second matrix dense."""
    stock = {"phi3": transformers.Phi3Config, "qwen3": transformers.Qwen3Config}[family]
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 45, "num_hidden_layers": 3}
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        stock(**sizes, **heads, tie_word_embeddings=form != "untied", initializer_range=0.2)
    ).eval()
    return low_rank(model) if form == "low-rank" else model


def low_rank(model: Any) -> Any:
    ranks = dict.fromkeys(spec.shapes_from_config(model), 5)
    del ranks[list(ranks)[1]]
    state = model.state_dict()
    for name, rank in ranks.items():
        m, n = state.pop(f"{name}.weight").shape
        state |= {
            f"{name}.A.weight": 0.3 * torch.randn(rank, n),
            f"{name}.B.weight": 0.3 * torch.randn(m, rank),
        }
    return loading.rebuild(model, ranks, state).eval()


def naive(model: Any, ids_BL: torch.Tensor) -> tuple[dict[int, dict[str, torch.Tensor]], Any]:
    """The same figures in float64, all activations of all sequences kept, and the residual stream [S, B, L, D]."""
    model = model.double()
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            inputs[name], outputs[name] = args[0] if args else None, output

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in model.named_modules()]
    logits_BLV = model(input_ids=ids_BL, use_cache=False).logits
    for handle in handles:
        handle.remove()
    nll = F.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), ids_BL[:, 1:].flatten(), reduction="sum")
    found: dict[int, dict[str, torch.Tensor]] = defaultdict(dict)
    for index in range(model.config.num_hidden_layers):
        mlp = f"model.layers.{index}.mlp"
        for name, x in (("input", inputs[mlp]), ("inner", inputs[f"{mlp}.down_proj"])):
            found[index][f"{name}.gram"] = sum(torch.outer(t, t) for row in x for t in row)
            found[index][f"{name}.sum"] = sum(t for row in x for t in row)
        for leaf in ("gate_proj", "up_proj", "gate_up_proj", "down_proj"):
            if f"{mlp}.{leaf}" in outputs:
                (grad,) = torch.autograd.grad(nll, outputs[f"{mlp}.{leaf}"], retain_graph=True)
                found[index][f"fisher.{leaf}"] = (grad**2).mean((0, 1))
        found[index]["tokens"] = torch.tensor(ids_BL.numel())
    stream = [inputs[f"model.layers.{i}"] for i in range(model.config.num_hidden_layers)]
    return found, torch.stack([*stream, inputs["model.norm"]]).detach()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["tied", "untied", "low-rank"])
def test_statistics_are_those_of_the_definition(family: str, form: str) -> None:
    ids_BL = some_ids()
    with recorded() as said:
        found = statistics.collect(some_model(family, form), ids_BL, [0, 1, 2])
    wanted, _ = naive(some_model(family, form), ids_BL)
    assert said == [f"layers 0 to 2: {done}/7 sequences" for done in (3, 6, 7)]
    assert list(found) == [0, 1, 2]
    for index, sums in found.items():
        assert sums.keys() == wanted[index].keys()
        for name, value in sums.items():
            assert value.dtype == (torch.int64 if name == "tokens" else torch.float32)
            expected = wanted[index][name].detach()
            scale = expected.double().abs().max().item()
            torch.testing.assert_close(value.double(), expected.double(), rtol=0, atol=2e-5 * scale)


class Joint(torch.nn.Module):
    """Qwen3's MLP with gate and up as one matrix."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_up_proj = torch.nn.Linear(32, 90, bias=False)
        self.gate_up_proj.weight = torch.nn.Parameter(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
        self.down_proj = mlp.down_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


def test_a_joint_matrix_in_place_of_gate_and_up_is_seen_under_its_name() -> None:
    separate, joint = (some_model("qwen3", "tied") for _ in range(2))
    joint.model.layers[1].mlp = Joint(joint.model.layers[1].mlp)
    one, other = (statistics.collect(m, some_ids(), [1])[1] for m in (separate, joint))
    both = torch.cat([one["fisher.gate_proj"], one["fisher.up_proj"]])
    torch.testing.assert_close(other["fisher.gate_up_proj"], both, rtol=1e-4, atol=0)
    torch.testing.assert_close(other["inner.gram"], one["inner.gram"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_is_the_same_bit_for_bit_whatever_is_measured_beside_it(family: str) -> None:
    together = statistics.collect(some_model(family, "tied"), some_ids(), [0, 1, 2])
    for layers in ([0], [1], [2], [2, 1], [0, 2]):
        found = statistics.collect(some_model(family, "tied"), some_ids(), layers)
        assert list(found) == sorted(layers)
        for index in layers:
            assert all(torch.equal(value, together[index][name]) for name, value in found[index].items())


@pytest.mark.parametrize("family", FAMILIES)
def test_angles_and_influence_are_those_of_the_definition(family: str) -> None:
    ids_BL = some_ids(1)
    found = statistics.stack(some_model(family, "tied"), ids_BL)
    _, stream_SBLD = naive(some_model(family, "tied"), ids_BL)
    stations = len(stream_SBLD)
    assert found["angle"].shape == (stations, stations) and found["influence"].shape == (stations - 1,)

    def cosine(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return one @ other / (one.norm() * other.norm())

    for a in range(stations):
        for b in range(stations):
            angles = [cosine(s[a, -1], s[b, -1]).clamp(-1, 1).arccos() for s in stream_SBLD.unbind(1)]
            expected = float(torch.stack(angles).mean()) / torch.pi
            assert float(found["angle"][a, b]) == pytest.approx(expected, abs=1e-6)
    for block in range(stations - 1):
        tokens = zip(stream_SBLD[block].flatten(0, 1), stream_SBLD[block + 1].flatten(0, 1), strict=True)
        mean = torch.stack([cosine(*pair) for pair in tokens]).mean()
        assert float(found["influence"][block]) == pytest.approx(1 - float(mean), abs=1e-6)
    assert not found["angle"].diagonal().any()


def test_the_model_comes_back_without_hooks_and_without_gradients() -> None:
    model, ids_BL = some_model("phi3", "tied"), some_ids()
    before = model(input_ids=ids_BL).logits.detach()
    statistics.collect(model, ids_BL, [1])
    statistics.stack(model, ids_BL)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(model(input_ids=ids_BL).logits, before)


def test_products_are_in_full_precision_and_the_setting_is_restored() -> None:
    seen: list[str] = []
    model = some_model("qwen3", "tied")
    model.register_forward_pre_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
    model.base_model.register_forward_pre_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
    torch.set_float32_matmul_precision("high")
    try:
        statistics.collect(model, some_ids(), [0])
        assert set(seen) == {"highest"} and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_values_that_are_not_finite_are_named_where_they_arise() -> None:
    model = some_model("phi3", "tied")
    model.model.layers[1].mlp.gate_up_proj.weight.data[3, 4] = torch.nan
    with pytest.raises(ModelError, match=r"layer 1: inner\.gram is NaN"):
        statistics.collect(model, some_ids(), [0, 1, 2])
    with pytest.raises(ModelError, match=r"layer 0: fisher\.down_proj is NaN"):
        statistics.collect(model, some_ids(), [0])
    with pytest.raises(ModelError, match=r"residual stream around layer 1 is NaN"):
        statistics.stack(model, some_ids())


def test_gradients_that_are_not_finite_are_named_where_they_arise() -> None:
    model = some_model("qwen3", "tied")

    def spoil(grad: torch.Tensor) -> torch.Tensor:
        return grad * torch.inf

    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda m, a, y: y.register_hook(spoil) and None)
    with pytest.raises(ModelError, match=r"layer 1: fisher\.up_proj is NaN"):
        statistics.collect(model, some_ids(), [0, 1, 2])
