"""What vLLM's Transformers backend and tensor parallelism ask of the shipped code, one test for each requirement.

vLLM is not installed here. Its requirements are those of its documentation ("Writing custom models": base model in
auto_map, attention through ALL_ATTENTION_FUNCTIONS with keyword arguments passed down, `_supports_attention_backend`,
parallel plans on the config), and what its source does with a plan: rules are regular expressions for the beginning
of a name, and gate and up of a class of MLPs are fused, whatever the plan, where its code has the usual form.

The plan is run in one process: activations get a leading axis K of GPUs, each layer its shards and its communication.
"""

import ast
import inspect
import random
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import FAMILIES, FORMS, STEMS, Form, dense_directory, student_of, tiny_config
from torch import nn
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES, _get_parameter_plan
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsekd_ray.model import low_rank, saving, spec

torch.set_num_threads(1)

GPUS = 2
IDS = torch.arange(24).view(2, 12)
VLLM_STYLES = {
    "colwise", "rowwise", "replicate", "colwise_gather_output", "rowwise_split_input", "colwise_rep", "rowwise_rep",
}  # fmt: skip
EVEN = {"intermediate_size": 48}  # stock matrices must divide by the number of GPUs too
PLACES = [(), (0,), (0, 1)]  # layers that stay dense


def students() -> list[Any]:
    cases = [(form, dense) for form in FORMS for dense in PLACES]
    return [pytest.param(form, dense, id=f"{form}-dense{len(dense)}") for form, dense in cases]


def base_of(form: Form, dense_layers: tuple[int, ...], rank: int = 8) -> Any:
    """The base model, as AutoModel gives it to vLLM."""
    return student_of(form, rank=rank, dense_layers=dense_layers, **EVEN)[0].model


def mlp_linears(base: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in base.named_modules() if isinstance(m, nn.Linear) and ".mlp." in n}


# the base model


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_auto_model_loads_the_base_model_from_an_exported_directory(form: Form, tmp_path: Path) -> None:
    student, _ = student_of(form)
    saving.save(student, dense_directory(tmp_path / "dense", form.family, True), tmp_path / "out", "card")
    auto_map = spec.config_dict(tmp_path / "out")["auto_map"]
    stem = f"modeling_sparsekd.LowRank{STEMS[form.family]}"
    assert auto_map["AutoModel"] == f"{stem}Model" and auto_map["AutoConfig"] == f"{stem}Config"
    base, info = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(base) is type(student.model) and not info["missing_keys"] and not info["mismatched_keys"]
    expected = student.model(IDS).last_hidden_state
    assert torch.equal(base(IDS).last_hidden_state, expected)
    with torch.device("meta"):  # vLLM makes it from the config, before there are weights
        made = transformers.AutoModel.from_config(base.config)
    assert {n: p.shape for n, p in made.named_parameters()} == {
        n: p.shape for n, p in base.named_parameters()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_all_customisation_is_in_the_base_model(family: str) -> None:
    student, _ = student_of(Form(family))
    causal = {name for name, module in student.named_children()}
    assert causal == {"model", "lm_head"} and type(student.lm_head) is nn.Linear
    assert type(student).forward is getattr(transformers, f"{STEMS[family]}ForCausalLM").forward


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_says_that_it_supports_other_attention(family: str) -> None:
    base = type(student_of(Form(family))[0].model)
    assert base._supports_attention_backend and base.is_backend_compatible()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_attention_is_the_registered_function_and_gets_every_keyword(
    form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def attention(module: Any, q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> Any:
        seen.append((module.layer_idx, kwargs["attention_instances"]))
        return q.transpose(1, 2).contiguous(), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "fake", attention)
    base = base_of(form, (0,))
    before = base(IDS).last_hidden_state
    base.config._attn_implementation = "fake"
    instances = object()
    positions = torch.arange(IDS.shape[1])[None]
    out = base(IDS, position_ids=positions, use_cache=False, return_dict=False, attention_instances=instances)
    assert seen == [(layer, instances) for layer in range(3)]
    assert out[0].shape == before.shape and not torch.allclose(out[0], before)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_implementations_can_be_switched(family: str) -> None:
    base = base_of(Form(family), ())
    found = {}
    for name in ("eager", "sdpa"):
        base.set_attn_implementation(name)
        found[name] = base(IDS).last_hidden_state
    torch.testing.assert_close(found["eager"], found["sdpa"])


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_tensor_outside_linear_layers_is_one_that_loaders_find(form: Form) -> None:
    """vLLM loads parameters, and buffers that are registered and persistent."""
    base = base_of(form, (0,))
    places = dict(base.named_parameters()) | dict(base.named_buffers())
    assert set(base.state_dict()) <= set(places)
    orders = {name for name in base.state_dict() if name.endswith(".order")}
    assert bool(orders) == form.gauge and orders <= {name for name, _ in base.named_buffers()}


# pipeline parallelism


@pytest.mark.parametrize("family", FAMILIES)
def test_pipeline_plan_names_the_children_of_the_base_model(family: str) -> None:
    base = base_of(Form(family), ())
    assert list(base.config.base_model_pp_plan) == ["embed_tokens", "layers", "norm"]
    assert set(base.config.base_model_pp_plan) <= {name for name, _ in base.named_children()}
    assert [n for n, m in base.named_children() if isinstance(m, nn.ModuleList)] == ["layers"]
    assert len(base.layers) == base.config.num_hidden_layers


# tensor parallelism


def by_transformers(plan: dict[str, str], name: str) -> str:
    """A rule names one place in every layer."""
    return _get_parameter_plan(name, plan, is_weight=False) or "replicate"


def by_vllm(plan: dict[str, str], name: str) -> str:
    """The first rule that the name begins with, read as a regular expression."""
    return next((style for rule, style in plan.items() if re.match(rule, name)), "replicate")


@pytest.mark.parametrize(("form", "dense_layers"), students())
def test_every_rule_names_a_linear_layer_and_a_known_style(form: Form, dense_layers: tuple[int, ...]) -> None:
    base = base_of(form, dense_layers)
    plan = base.config.base_model_tp_plan
    generic = {re.sub(r"\.\d+\.", ".*.", name) for name in mlp_linears(base)}
    rules = {rule for rule in plan if ".mlp." in rule}
    assert rules and rules <= generic
    assert set(plan.values()) - {"replicated_with_grad_allreduce"} <= VLLM_STYLES
    assert set(plan.values()) <= set(ALL_PARALLEL_STYLES)
    stock = getattr(transformers, f"{STEMS[form.family]}Config").base_model_tp_plan
    assert {k: v for k, v in plan.items() if ".mlp." not in k} == {
        k: v for k, v in stock.items() if ".mlp." not in k
    }
    assert {k: v for k, v in base.tp_plan.items() if k in plan} == plan  # what both libraries read
    assert "tp_plan" not in base.config.to_json_string()  # it follows from the rest


def any_student(seed: int) -> Any:
    """A base model with random weights where any matrices are low-rank, in any form."""
    rng = random.Random(seed)
    family, gauge = rng.choice(FAMILIES), rng.random() < 0.5
    share, names = rng.choice([0, 0.5, 1]), []  # of layers where gate and up are one
    for layer in range(3):
        leaves = ["gate_up_proj"] if family == "phi3" or rng.random() < share else ["gate_proj", "up_proj"]
        joint = family != "phi3" and leaves == ["gate_up_proj"]
        chosen = [leaf for leaf in leaves if joint or rng.random() < 0.6]
        chosen += ["down_proj"] if rng.random() < 0.6 else []
        names += [f"model.layers.{layer}.mlp.{leaf}" for leaf in chosen]
    ranks = {name: rng.choice([5, 8, 16]) for name in names}
    config_class, model_class = (getattr(low_rank, f"LowRank{STEMS[family]}{k}") for k in ("Config", "Model"))
    form = {"sparsekd_storage": "gauge" if gauge else "factors", "sparsekd_bias": rng.random() < 0.3}
    torch.manual_seed(seed)
    base = model_class(
        config_class(**tiny_config(family, True, **EVEN).to_dict(), sparsekd_ranks=ranks, **form)
    )
    for name, tensor in base.state_dict().items():
        if name.endswith(".order"):
            tensor.copy_(torch.randperm(len(tensor)))
        elif name.endswith("_proj.bias"):
            tensor.normal_()
    return base


@pytest.mark.parametrize("seed", range(60))
def test_both_libraries_read_the_same_plan_and_hook_linear_layers_only(seed: int) -> None:
    base = any_student(seed)
    plan = base.config.base_model_tp_plan
    generic = {re.sub(r"\.\d+\.", ".*.", name) for name in mlp_linears(base)}
    assert {rule for rule in plan if ".mlp." in rule} <= generic
    for name in mlp_linears(base):
        assert by_transformers(plan, name) == by_vllm(plan, name)
    for name, module in base.named_modules():
        if ".mlp" in name and not isinstance(module, nn.Linear):
            assert by_transformers(plan, name) == "replicate"
    for name, _ in base.named_parameters():
        if name.endswith("_proj.bias"):
            assert _get_parameter_plan(name, plan, is_weight=True) is None


class Split(nn.Module):
    """A linear layer over GPUs in one process: x is [K, …, n], one activation for each."""

    def __init__(self, linear: nn.Linear, style: str) -> None:
        super().__init__()
        self.linear, self.style = linear, style

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        W = self.linear.weight
        if self.style == "replicate":
            return x @ W.T
        if self.style.startswith("colwise"):
            parts = [x[k] @ shard.T for k, shard in enumerate(W.chunk(GPUS, 0))]
            whole = torch.cat(parts, -1) if self.style == "colwise_gather_output" else None
            return torch.stack(parts if whole is None else [whole] * GPUS)
        if self.style == "rowwise_split_input":
            assert x.shape[-1] == W.shape[1]
            x = torch.stack([x[k].chunk(GPUS, -1)[k] for k in range(GPUS)])
        total = sum(x[k] @ shard.T for k, shard in enumerate(W.chunk(GPUS, 1)))
        return torch.stack([total] * GPUS)  # type: ignore[list-item]


def split(module: nn.Module, styles: dict[str, str], name: str = "") -> None:
    for child_name, child in list(module.named_children()):
        place = f"{name}.{child_name}".removeprefix(".")
        if isinstance(child, nn.Linear):
            setattr(module, child_name, Split(child, styles[place]))
        else:
            split(child, styles, place)


def styles_of(base: Any, i: int, reader: Any) -> dict[str, str]:
    """The style of every linear layer in one MLP; vLLM's own where it fuses an MLP whose code it knows."""
    mlp, plan = base.layers[i].mlp, base.config.base_model_tp_plan
    if reader is by_vllm and type(mlp).__name__ in ("Qwen3MLP", "LlamaMLP"):
        return {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
    names = [name for name, module in mlp.named_modules() if isinstance(module, nn.Linear)]
    return {name: reader(plan, f"layers.{i}.mlp.{name}") for name in names}


@pytest.mark.parametrize("reader", [by_transformers, by_vllm])
@pytest.mark.parametrize("seed", range(60))
def test_split_over_gpus_the_mlp_is_the_same_function(seed: int, reader: Any) -> None:
    base, x = any_student(seed), torch.randn(2, 7, 32)
    expected = [layer.mlp(x) for layer in base.layers]
    for i, layer in enumerate(base.layers):
        split(layer.mlp, styles_of(base, i, reader))
        found = layer.mlp(torch.stack([x] * GPUS))
        for k in range(GPUS):
            torch.testing.assert_close(found[k], expected[i], atol=1e-5, rtol=1e-5)


def test_what_is_summed_and_kept_is_small_where_it_can_be() -> None:
    """All layers low-rank Qwen3: activations stay split, and r numbers are summed in place of m."""
    plan = base_of(Form("qwen3"), ()).config.base_model_tp_plan
    assert {rule.removeprefix("layers.*.mlp."): style for rule, style in plan.items() if ".mlp." in rule} == {
        "gate_proj.A": "replicate", "gate_proj.B": "colwise",
        "up_proj.A": "replicate", "up_proj.B": "colwise",
        "down_proj.A": "rowwise", "down_proj.B": "replicate",
    }  # fmt: skip


@pytest.mark.parametrize(("form", "dense_layers"), students())
def test_classes_of_mlps_are_alike_or_not_to_be_fused(form: Form, dense_layers: tuple[int, ...]) -> None:
    """vLLM looks at one MLP of a class and fuses gate and up, or not, in all of that class."""
    base = base_of(form, dense_layers)
    stock = f"{STEMS[form.family]}MLP"
    for i, layer in enumerate(base.layers):
        dense = all(isinstance(m, nn.Linear) for n, m in layer.mlp.named_children() if n.endswith("_proj"))
        assert dense == (i in dense_layers) == (type(layer.mlp).__name__ == stock)


def test_the_code_of_separate_gate_and_up_is_not_of_the_form_that_is_fused() -> None:
    """The rewriting needs one call `self.gate_proj(x)` in the source of `forward`."""
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(low_rank.SeparateMLP.forward))).body
    calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
    assert not {"gate_proj", "up_proj"} & {call.attr for call in calls if isinstance(call, ast.Attribute)}
