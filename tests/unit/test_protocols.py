"""Every protocol against a loop over windows from full logits in float64, on tiny random models."""

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from models import dense_model
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from sparsekd_ray.config import Evaluate
from sparsekd_ray.corpus import Document
from sparsekd_ray.errors import ModelError
from sparsekd_ray.evaluate import perplexity
from sparsekd_ray.evaluate.perplexity import window_starts
from sparsekd_ray.evaluate.protocols import HeldOut, count_words, evaluate, rolling_windows

WORDS = [f"w{i}" for i in range(3, 97)]
PAPER_512, GPTQ_2048 = 512, 2048


def word_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """One token a word; with a beginning-of-text token, the tokenizer puts it before a text unless told not to."""
    table = {"<unk>": 0, "<s>": 1, "</s>": 2, **{word: i for i, word in enumerate(WORDS, 3)}}
    tokenizer = Tokenizer(WordLevel(table, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", **special)


def document(words: int, seed: int, lines: int = 1) -> Document:
    rng = np.random.default_rng(seed)
    rows = [" ".join(rng.choice(WORDS, words // lines)) for _ in range(lines)]
    return Document(tuple(rows), " \n ".join(rows))


def texts() -> dict[str, HeldOut]:
    """One domain of several documents of unequal length, one whose text is shorter than a window."""
    rng = np.random.default_rng(0)
    long = [document(300, 1, lines=3), document(64, 2), document(65, 3), document(5, 4), document(128, 5)]
    return {
        "prose": HeldOut(rng.integers(3, 97, 417).astype(np.int32), long),
        "short": HeldOut(rng.integers(3, 97, 9).astype(np.int32), [document(9, 6)]),
    }


@torch.no_grad()
def logprob(model: Any, tokens: list[int], place: int, first: int) -> float:
    """log p of tokens[place] given tokens[first:place], by the model's own logits."""
    logits = model(torch.tensor([tokens[first:place]])).logits[0, -1].double()
    return logits.log_softmax(-1)[tokens[place]].item()


def naive_windows(model: Any, stream: Any, window: int, stride: int) -> list[float]:
    """log p of every prediction of every window, one window at a time."""
    found, start, tokens = [], 0, [int(token) for token in stream]
    while start == 0 or start + window <= len(tokens):
        part = tokens[start : start + window]
        with torch.no_grad():
            logp = model(torch.tensor([part])).logits[0].double().log_softmax(-1)
        found += [logp[i, token].item() for i, token in enumerate(part[1:])]
        start += stride
    return found


def naive_rolling(model: Any, ids: list[int], prefix: int, context: int) -> float:
    """Σ log p of a document as lm-eval's rolling windows have it, one prediction at a time."""
    tokens, total, done = [prefix, *ids], 0.0, 0
    while done < len(ids):
        count = min(context, len(ids) - done)
        end = done + count
        first = max(0, end - context)  # the model sees `context` tokens before the last one that it predicts
        total += sum(logprob(model, tokens, place, first) for place in range(done + 1, end + 1))
        done = end
    return total


@pytest.fixture(scope="module", params=["phi3", "qwen3"])
def model(request: pytest.FixtureRequest) -> Any:
    return dense_model(request.param, tied=True)  # a context of 64


def test_paper(model: Any) -> None:
    given = texts()
    found = evaluate(model, word_tokenizer(), given, ["paper"])["paper"]
    assert (found["window"], found["stride"]) == (64, 32)
    losses = {domain: naive_windows(model, text.rows, 64, 32) for domain, text in given.items()}
    check(found, losses)
    assert "windows of 64 tokens, the model's context, where the protocol has 512" in found["sentence"]
    assert found["sentence"].endswith("one short window each: short")


@pytest.mark.parametrize("bos", [True, False])
def test_gptq(model: Any, bos: bool) -> None:
    given, tokenizer = texts(), word_tokenizer(bos)
    found = evaluate(model, tokenizer, given, ["gptq"])["gptq"]
    losses = {}
    for domain, text in given.items():
        raw = "\n\n".join([row for doc in text.documents for row in doc.rows])
        tokens = [1] * bos + [int(word[1:]) for word in raw.split()]
        losses[domain] = naive_windows(model, tokens, 64, 64)
    check(found, losses)
    assert "where the protocol has 2,048" in found["sentence"] and "no overlap" in found["sentence"]


@pytest.mark.parametrize("bos", [True, False])
def test_words(model: Any, bos: bool) -> None:
    given, tokenizer = texts(), word_tokenizer(bos)
    found = evaluate(model, tokenizer, given, ["words"])["words"]
    total, words, predictions = 0.0, 0, 0
    for domain, text in given.items():
        ids = [[int(word[1:]) for word in doc.text.split()] for doc in text.documents]
        logp = sum(naive_rolling(model, doc, 1 if bos else 2, 64) for doc in ids)
        count = sum(len(re.split(r"\s+", doc.text)) for doc in text.documents)
        assert found["domains"][domain]["ppl"] == pytest.approx(math.exp(-logp / count), rel=1e-5)
        assert found["domains"][domain]["words"] == count
        total, words, predictions = total + logp, words + count, predictions + sum(map(len, ids))
    assert found["ppl"] == pytest.approx(math.exp(-total / words), rel=1e-5)
    assert (found["words"], found["tokens"]) == (words, predictions)
    assert "perplexity per word" in found["sentence"] and "the model's context" in found["sentence"]


def test_words_of_wikitext_are_read_without_its_spacing_and_counted_with_it(model: Any) -> None:
    marked = [Document(("w3 @-@ w4 w5",), "w3 @-@ w4 w5"), Document(("w6 ( w7 )",), "w6 ( w7 )")]
    plain = [Document(("w6 ( w7 )",), "w6 ( w7 )")]
    given = {name: HeldOut(np.array([3, 4]), docs) for name, docs in (("wiki", marked), ("plain", plain))}
    found = evaluate(model, word_tokenizer(), given, ["words", "gptq"])
    wiki, plain_text = found["words"]["domains"]["wiki"], found["words"]["domains"]["plain"]
    assert (wiki["tokens"], wiki["words"]) == (len(["w3-w4", "w5"]) + len(["w6", "(w7)"]), 4 + 4)
    assert (plain_text["tokens"], plain_text["words"]) == (4, 4)
    clause = "WikiText's spacing is undone as lm-eval does, and words are counted before: wiki"
    assert found["words"]["sentence"].endswith(clause)
    assert "WikiText" not in found["gptq"]["sentence"]


def test_control_tokens_in_the_text_are_plain_text(model: Any) -> None:
    given = {"prose": HeldOut(np.array([3, 4]), [Document(("w3</s>w4 w5",), "w3</s>w4 w5")])}
    plain = {"prose": HeldOut(np.array([3, 4]), [Document(("w3?w4 w5",), "w3?w4 w5")])}
    found, expected = (
        evaluate(model, word_tokenizer(), texts, ["gptq", "words"]) for texts in (given, plain)
    )
    for name in ("gptq", "words"):
        assert found[name]["ppl"] == pytest.approx(expected[name]["ppl"])


def test_domains_that_are_no_whole_test_set_are_named(model: Any) -> None:
    given = {name: text._replace(whole=name != "short") for name, text in texts().items()}
    found = evaluate(model, word_tokenizer(), given, ["paper", "gptq", "words"])
    clause = "only a part of a test set, or documents held out here: short"
    assert [clause in found[name]["sentence"] for name in ("paper", "gptq", "words")] == [False, True, True]


def test_words_need_a_token_before_a_document(model: Any) -> None:
    tokenizer = word_tokenizer(bos=False)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="has neither: set eos_token"):
        evaluate(model, tokenizer, texts(), ["paper", "words"])


def check(found: Any, losses: dict[str, list[float]]) -> None:
    everything = [logp for part in losses.values() for logp in part]
    for figure, logps in ((found, everything), *((found["domains"][d], part) for d, part in losses.items())):
        assert figure["ppl"] == pytest.approx(math.exp(-sum(logps) / len(logps)), rel=1e-5)
        assert figure["tokens"] == len(logps)


def test_a_context_that_is_long_enough_is_not_cut() -> None:
    model = dense_model("phi3", tied=True, max_position_embeddings=4096)
    stream = np.random.default_rng(0).integers(3, 97, 600).astype(np.int32)
    given = {"prose": HeldOut(stream, [document(2100, 1)])}
    found = evaluate(model, word_tokenizer(), given, ["paper", "gptq", "words"])
    assert (found["paper"]["window"], found["paper"]["stride"]) == (PAPER_512, PAPER_512 // 2)
    assert (found["gptq"]["window"], found["gptq"]["stride"]) == (GPTQ_2048, GPTQ_2048)
    assert not [
        name
        for name, figures in found.items()
        if name != "dtype" and "where the protocol has" in figures["sentence"]
    ]
    assert found["gptq"]["tokens"] == GPTQ_2048 - 1, "what fills no window is left out"
    check(found["paper"], {"prose": naive_windows(model, stream, PAPER_512, PAPER_512 // 2)})


def test_the_batch_size_does_not_matter(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("paper", "gptq", "words")
    large = evaluate(model, word_tokenizer(), texts(), names)
    monkeypatch.setattr(perplexity, "TOKENS_PER_BATCH", 70)
    small = evaluate(model, word_tokenizer(), texts(), names)
    for name in names:
        assert small[name]["ppl"] == pytest.approx(large[name]["ppl"], rel=1e-6)


def test_windows_are_whole_and_overlap_by_half() -> None:
    assert window_starts(20, 8, 4) == [0, 4, 8, 12]
    assert window_starts(8, 8, 4) == [0]
    assert window_starts(5, 8, 4) == [0]


def test_rolling_windows_judge_every_token_once_with_full_context_at_the_end() -> None:
    def shown(length: int) -> list[tuple[list[int], int]]:
        return [(w.tokens.tolist(), w.scored) for w in rolling_windows(np.arange(length + 1), 4)]

    assert shown(3) == [([0, 1, 2, 3], 3)]
    assert shown(4) == [([0, 1, 2, 3, 4], 4)]
    assert shown(6) == [([0, 1, 2, 3, 4], 4), ([2, 3, 4, 5, 6], 2)]
    assert shown(8) == [([0, 1, 2, 3, 4], 4), ([4, 5, 6, 7, 8], 4)]
    assert shown(0) == []


def test_an_edge_of_white_space_counts_as_a_word() -> None:
    assert count_words("one two") == 2 and count_words(" one\n\ttwo \n") == 4


@pytest.mark.parametrize("names", [("gptq",), ("paper", "paper"), ()])
def test_protocols_without_paper_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="paper among them"):
        Evaluate(protocols=names)
