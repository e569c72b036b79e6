"""Speed: operations and bytes against an independent count, limits, and a comparison that runs."""

from pathlib import Path
from typing import Any

import pruning
import pytest
import torch
from models import FAMILIES, FORMS, Form, dense_model, student_of
from pruning import DENSE, SETTINGS, finish
from torch.utils.flop_counter import FlopCounterMode

from sparsekd_ray.evaluate import speed
from sparsekd_ray.model import loading
from sparsekd_ray.store import Store

torch.set_num_threads(1)

CONTEXT = 24


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return pruning.prepare(tmp_path_factory.mktemp("speed"))


def counted(model: Any, context: int) -> float:
    """Operations of a token, as torch counts the matrix products of a forward pass through all layers."""
    model.set_attn_implementation("eager")  # as products that are counted, each head a batch of its own
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.base_model(torch.arange(context)[None], use_cache=False)
    found = {name: by_kind for name, by_kind in counter.get_flop_counts().items() if ".layers." in name}
    layers = [by_kind for name, by_kind in found.items() if name.rpartition(".")[2].isdigit()]
    attention = sum(
        by_kind[torch.ops.aten.bmm] for name, by_kind in found.items() if name.endswith("self_attn")
    )
    # products of all pairs of tokens, of which a causal mask needs half
    return (sum(sum(by_kind.values()) for by_kind in layers) - attention / 2) / context


def unmultiplied(model: Any) -> int:
    """Parameters below the head that are in no matrix product: norms and biases."""
    return sum(p.numel() for p in model.base_model.parameters() if p.dim() == 1)


def test_operations_are_those_of_the_dense_models() -> None:
    for family in FAMILIES:
        model = dense_model(family, tied=family == "phi3", head_dim=16)
        expected = counted(model, CONTEXT) + 2 * unmultiplied(model)
        assert speed.flops_per_token(model, CONTEXT) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_operations_are_those_of_every_low_rank_form(form: Form) -> None:
    model = student_of(form, head_dim=8)[0]
    expected = counted(model, CONTEXT) + 2 * unmultiplied(model)
    assert speed.flops_per_token(model, CONTEXT) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_bytes_are_those_of_the_weights_that_a_token_reads(family: str, tied: bool) -> None:
    model = dense_model(family, tied)
    read = {id(p): p.numel() for p in model.parameters()}
    if not tied:  # of the input embedding one row is read, of a tied one all, as head
        del read[id(model.get_input_embeddings().weight)]
    assert speed.bytes_per_token(model, 2) == 2 * sum(read.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_no_model_is_faster_than_itself(family: str) -> None:
    model = dense_model(family, tied=True)
    assert speed.limits(model, model, CONTEXT) == {"prefill_limit": 1, "decode_limit": 1}


def test_limits_of_real_students(store: Store) -> None:
    dense = loading.load(store.fetch(DENSE["phi3"]))
    limits = {}
    for name in ("whitened", "gauge", "neurons", "depth-block", "wanda"):
        asked = pruning.task(store, DENSE["phi3"], name, SETTINGS[name], 1 / 3)
        finish(asked)
        student = loading.load(Path(store.fetch(asked.out)))
        limits[name] = speed.limits(dense, student, CONTEXT)
    assert limits.pop("wanda") == {"prefill_limit": 1, "decode_limit": 1}, "zeros are multiplied too"
    for name, found in limits.items():
        assert all(1 < limit < 1.5 for limit in found.values()), name


def test_a_comparison_gives_speeds_and_their_limits() -> None:
    dense, student = dense_model("phi3", True, intermediate_size=512), dense_model("phi3", True)
    found = speed.compare(dense, student, prompt=CONTEXT, new_tokens=4, repeats=3)
    assert set(found) == {
        f"{regime}_{figure}"
        for regime in ("prefill", "decode")
        for figure in ("tokens_per_s", "speedup", "limit")
    }
    assert all(value > 0 for value in found.values())
    assert found["prefill_limit"] > 1 < found["decode_limit"]


def test_decoding_generates_after_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill sees the prompt at once, decoding one token each time behind all before it."""
    model, seen = dense_model("qwen3", True), []
    forward = model.base_model.forward

    def noted(*args: Any, input_ids: torch.Tensor, past_key_values: Any = None, **more: Any) -> Any:
        seen.append((input_ids.shape[1], past_key_values.get_seq_length() if past_key_values else 0))
        return forward(*args, input_ids=input_ids, past_key_values=past_key_values, **more)

    monkeypatch.setattr(model.base_model, "forward", noted)
    assert set(speed.timed(model, 10, 3)) == {"prefill", "decode"}
    assert seen == [(10, 0), (1, 10), (1, 11), (1, 12)]
