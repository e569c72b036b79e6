"""Perplexity on held-out text by protocols whose figures others publish, over all text and per domain.

`paper`  SparseKD's: the corpus's held-out rows in windows of 512 tokens, stride 256; every prediction of every window
         counts, so most tokens count twice, once with little context and once with more.
`gptq`   that of the tables of GPTQ, SparseGPT and Wanda: the raw text joined by two newlines, windows of 2,048 tokens
         that do not overlap; what fills no window is left out.
`words`  word perplexity as lm-eval counts it: exp(−Σ log p / number of words), a word being what stands between white
         space. Every document is read by itself after one token (beginning of text, else end of text), in windows of
         the model's context. The text is taken as it is: lm-eval's task `wikitext` first undoes the spaces that
         WikiText puts around punctuation, so its figure of that one data set differs.

A model whose context is shorter than a protocol's window is judged on windows of its context, and every figure's
`sentence` says so.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, NotRequired, TypedDict, cast

import numpy as np

from sparsekd_ray.config.base import ProtocolName
from sparsekd_ray.corpus import Document
from sparsekd_ray.evaluate.perplexity import Window, perplexity, window_nll, windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class HeldOut(NamedTuple):
    """The held-out text of one domain."""

    rows: np.ndarray
    """int tokens of the corpus's rows, one after the other: documents, each followed by the end-of-text token."""
    documents: Sequence[Document]
    """The raw text behind them."""


class Figure(TypedDict):
    ppl: float
    tokens: int
    """Predictions that count."""
    words: NotRequired[int]


class ProtocolFigures(Figure):
    """What one protocol measured, over all text and by domain."""

    window: int
    """Tokens that the model sees at once, at most."""
    stride: int
    domains: dict[str, Figure]
    sentence: str
    """The protocol in words, with every deviation from it."""


class Figures(TypedDict):
    """What an evaluation's record holds."""

    dtype: str
    paper: NotRequired[ProtocolFigures]
    gptq: NotRequired[ProtocolFigures]
    words: NotRequired[ProtocolFigures]


class Score(NamedTuple):
    """Of some windows: Σ −log p in nats, the predictions that it sums, and what it is divided by."""

    nll: float
    tokens: int
    units: int


class Protocol(NamedTuple):
    window: int | None
    """Tokens in a window; None for the model's context."""
    stride: Callable[[int], int]
    """Of a window's size, which is even."""
    unit: str
    measure: Callable[[PreTrainedModel, PreTrainedTokenizerBase, HeldOut, int, int], list[Score]]
    """Scores of a domain in windows of this size at this stride."""
    text: str
    """The text and what is counted, in words."""


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, HeldOut],
    protocols: Sequence[ProtocolName],
) -> Figures:
    """The figures of `model` by each of `protocols`, on all of `texts`."""
    model.eval()
    figures = {name: _figures(name, model, tokenizer, texts) for name in protocols}
    return cast(Figures, {"dtype": str(model.dtype).removeprefix("torch."), **figures})


def _figures(
    name: ProtocolName,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, HeldOut],
) -> ProtocolFigures:
    protocol, context = PROTOCOLS[name], model.config.max_position_embeddings
    window = min(protocol.window or context, context) // 2 * 2
    stride = protocol.stride(window)
    scores: dict[str, list[Score]] = {}
    for domain, text in texts.items():
        scores[domain] = protocol.measure(model, tokenizer, text, window, stride)
        logger.info(f"{domain}: {name} perplexity {_figure(protocol, scores[domain])['ppl']:.2f}")
    everything = _figure(protocol, [score for found in scores.values() for score in found])
    short = [domain for domain, found in scores.items() if _is_short(protocol, found, window)]
    return {
        **everything,
        "window": window,
        "stride": stride,
        "domains": {domain: _figure(protocol, found) for domain, found in scores.items()},
        "sentence": _sentence(protocol, window, stride, short),
    }


def _figure(protocol: Protocol, scores: Sequence[Score]) -> Figure:
    units = sum(score.units for score in scores)
    figure: Figure = {
        "ppl": perplexity((score.nll for score in scores), units),
        "tokens": sum(score.tokens for score in scores),
    }
    if protocol.unit == "word":
        figure["words"] = units
    return figure


def _is_short(protocol: Protocol, scores: Sequence[Score], window: int) -> bool:
    return protocol.window is not None and sum(score.tokens for score in scores) < window - 1


def _sentence(protocol: Protocol, window: int, stride: int, short: Sequence[str]) -> str:
    """The protocol in words; what was cut is named."""
    named, parts = protocol.window, [f"perplexity per {protocol.unit}", f"windows of {window:,} tokens"]
    if named is None:
        parts[-1] += ", the model's context"
    elif window < named:
        parts[-1] += f", the model's context, where the protocol has {named:,}"
    parts.append(f"stride {stride:,}" if stride < window else "no overlap")
    parts.append(protocol.text)
    if short:
        parts.append(f"shorter than one window, and one short window each: {', '.join(short)}")
    return "; ".join(parts)


def _row_scores(
    model: PreTrainedModel, _: PreTrainedTokenizerBase, text: HeldOut, window: int, stride: int
) -> list[Score]:
    return _token_scores(model, windows(text.rows, window, stride))


def _joined_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: HeldOut, window: int, stride: int
) -> list[Score]:
    # with the tokenizer's own special tokens, as the published tables have it
    joined = "\n\n".join(row for document in text.documents for row in document.rows)
    tokens = tokenizer(joined, verbose=False)["input_ids"]
    return _token_scores(model, windows(np.array(tokens), window, stride))


def _token_scores(model: PreTrainedModel, given: Sequence[Window]) -> list[Score]:
    nll = window_nll(model, given)
    return [Score(total, w.scored, w.scored) for total, w in zip(nll, given, strict=True)]


def _document_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: HeldOut, window: int, _: int
) -> list[Score]:
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    given, words = [], []
    for document in text.documents:
        ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        parts = list(rolling_windows(np.array([prefix, *ids]), window))
        given += parts
        words += [count_words(document.text)] + [0] * (len(parts) - 1)
    nll = window_nll(model, given)
    return [Score(total, w.scored, n) for total, w, n in zip(nll, given, words, strict=True)]


def rolling_windows(tokens: np.ndarray, context: int) -> Iterator[Window]:
    """Windows that judge every token but the first once, with at least one and at most `context` tokens before it.

    The last window reaches back to be as long as the others, and judges only what they left.
    """
    for first in range(1, len(tokens), context):
        end = min(first + context, len(tokens))
        yield Window(tokens[max(0, end - context - 1) : end], end - first)


def count_words(document: str) -> int:
    r"""Pieces between white space, as `re.split(r"\s+", …)` counts them: an edge of white space counts as one more."""
    return len(re.split(r"\s+", document))


PROTOCOLS: dict[ProtocolName, Protocol] = {
    "paper": Protocol(
        512,
        lambda window: window // 2,
        "token",
        _row_scores,
        "every prediction of every window counts; held-out documents of a domain are joined by the end-of-text token",
    ),
    "gptq": Protocol(
        2048,
        lambda window: window,
        "token",
        _joined_scores,
        "rows of held-out text as their source gives them, joined by two newlines",
    ),
    "words": Protocol(
        None,
        lambda window: window,
        "word",
        _document_scores,
        "every held-out document by itself after a one-token prefix, divided by its words between white space",
    ),
}
