"""Model cards: what people read, and what the hub and other tools read of them."""

from typing import Any, cast

import pytest
from huggingface_hub import ModelCard

from sparsekd_ray.model.card import CardFacts, model_card
from sparsekd_ray.model.origin import Origin
from sparsekd_ray.prune.methods import METHODS, named

FIGURES: Any = {
    "dtype": "float32",
    **{
        protocol: {
            "ppl": 12.345,
            "tokens": 9000,
            "window": 64,
            "stride": 32,
            "domains": {"prose": {"ppl": 6.5, "tokens": 9000}},
            "sentence": f"how {protocol} is measured",
        }
        for protocol in ("paper", "gptq")
    },
}
UNKNOWN = Origin()


def facts(**more: Any) -> CardFacts:
    return cast(CardFacts, {"sparsity": 0.35, "parameters": 12345, **more})


def test_card_states_what_the_model_is() -> None:
    measured = facts(perplexity=FIGURES, dense_perplexity=FIGURES)
    card = ModelCard(model_card(measured, "low-rank", Origin("someone/base", "mit")))
    assert card.data.base_model == "someone/base" and card.data.license == "mit"
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert {"sparsekd-ray", "low-rank"} <= set(card.data.tags)
    assert "# Low-rank student of someone/base\n" in card.text
    assert "35.0%" in card.text and "12,345" in card.text and "trust_remote_code=True" in card.text
    assert "Licence: mit, that of the dense model, someone/base." in card.text
    assert "| `paper` | prose | 9,000 | 6.50 | 6.50 |" in card.text
    assert "- `gptq`: how gptq is measured." in card.text


def test_results_are_for_machines_too() -> None:
    words = FIGURES | {"words": FIGURES["paper"]}
    data = ModelCard(model_card(facts(perplexity=words), "merged", UNKNOWN)).data
    assert data.model_name == "Merged student"
    results = {(r.dataset_type, r.metric_name): r for r in data.eval_results}
    assert len(results) == len(data.eval_results) == 6
    assert results["held-out", "gptq protocol"].metric_value == 12.345
    prose = results["prose", "paper protocol"]
    assert (prose.metric_type, prose.metric_value, prose.dataset_split) == ("perplexity", 6.5, "test")
    assert prose.metric_args == {"window": 64, "stride": 32} and prose.task_type == "text-generation"
    assert results["prose", "words protocol"].metric_type == "word_perplexity"


def test_what_is_not_known_is_not_stated() -> None:
    text = model_card(facts(), "merged", UNKNOWN)
    assert all(
        word not in text for word in ("base_model", "Perplexity", "trust_remote_code", "model-index", "null")
    )
    assert "license: unknown\n" in text and "because the card of the dense model states none" in text


def test_a_licence_of_its_own_keeps_name_and_link() -> None:
    card = ModelCard(model_card(facts(), "stock", Origin(None, "other", "small-print", "LICENSE")))
    assert (card.data.license, card.data.license_name, card.data.license_link) == (
        "other",
        "small-print",
        "LICENSE",
    )
    assert "Licence: small-print, that of the dense model." in card.text


@pytest.mark.parametrize(
    ("method", "form", "words"),
    [
        ("svd", "low-rank", ["# Low-rank student", "truncated singular value", "35.0% of the dense model's MLP"]),
        ("svd-whitened", "merged", ["# Merged student", "metric of their inputs", "dense model's size and speed"]),
        ("neurons", "stock", ["# Narrower student", "stand in for", "35.0% of the dense", "needs no code"]),
        ("sdm", "stock", ["# Narrower student", "SDMPrune", "are gone"]),
        ("depth", "stock", ["# Shallower student", "whole layers", "are gone"]),
        ("wanda", "stock", ["# Masked student", "(Wanda)", "are zeros", "no stock runtime is faster for it"]),
        ("magnitude", "stock", ["# Masked student", "smallest weights", "no stock runtime is faster for it"]),
        (None, "stock", ["# Stock student", "Pruned by sparsekd-ray, then"]),
    ],
)  # fmt: skip
def test_card_says_which_method_made_the_student(method: Any, form: Any, words: list[str]) -> None:
    words_of_method = {"made": METHODS[method].card, "student_form": METHODS[method].form} if method else {}
    card = model_card(facts(**words_of_method | ({"method": method} if method else {})), form, UNKNOWN)
    assert all(word in card for word in words)
    assert ("trust_remote_code" in card) == (form == "low-rank")
    assert ("faster" in card) == (method in named("masked"))
    assert method is None or f"- {method}\n" in card


def test_card_says_why_there_is_no_merged_form() -> None:
    biased = facts(method="svd-whitened", biased=True)
    assert "There is no merged form, because its MLP matrices have biases" in model_card(
        biased, "low-rank", UNKNOWN
    )
