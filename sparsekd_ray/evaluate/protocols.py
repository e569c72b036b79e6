"""Perplexity on held-out text by protocols whose figures others publish, over all text and per domain.

`paper`  SparseKD's protocol. Windows of 512 tokens with stride 256 run over the held-out rows of the corpus. All
         predictions of all windows count, so most tokens count twice: once with little context and once with more.
`gptq`   The protocol of the tables of GPTQ, SparseGPT and Wanda. The raw text is joined by two newlines and cut into
         windows of 2,048 tokens that do not overlap. Tokens that fill no window are left out.
`words`  Word perplexity as lm-eval counts it: exp(−Σ log p / number of words). Words are the pieces between white
         space. The model reads every document by itself after one token (beginning of text, else end of text), in
         windows of its context. The spacing of WikiText is undone first (`wikitext.py`) in every domain whose text
         has WikiText's marks. Words are counted in the original text.

Control tokens that stand in the text are read as plain text, as they are in the corpus.

A model whose context is shorter than a protocol's window is judged on windows of its context. The `sentence` of every
figure says so.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple, NotRequired, TypedDict, cast

import numpy as np

from sparsekd_ray.config.base import ProtocolName
from sparsekd_ray.corpus import Document
from sparsekd_ray.errors import ModelError
from sparsekd_ray.evaluate import wikitext
from sparsekd_ray.evaluate.perplexity import Window, perplexity, window_nll, windows
from sparsekd_ray.runtime.logging import log_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class HeldOut(NamedTuple):
    """The held-out text of one domain."""

    rows: np.ndarray
    """int tokens of the corpus's rows, one after the other: documents, each followed by the end-of-text token."""
    documents: Sequence[Document]
    """The raw text of the rows."""
    whole: bool = True
    """Whether `documents` are all of a test set."""


class Figure(TypedDict):
    ppl: float
    tokens: int
    """Predictions that are counted."""
    words: NotRequired[int]


class ProtocolFigures(Figure):
    """The figures of one protocol, over all text and by domain."""

    window: int
    """Largest number of tokens that the model sees at once."""
    stride: int
    domains: dict[str, Figure]
    sentence: str
    """The protocol in words, with every deviation from it."""


class Figures(TypedDict):
    """The figures in an evaluation's record."""

    dtype: str
    paper: NotRequired[ProtocolFigures]
    gptq: NotRequired[ProtocolFigures]
    words: NotRequired[ProtocolFigures]


class Score(NamedTuple):
    """The score of one or more windows."""

    nll: float
    """Σ −log p of the predictions, in nats."""
    tokens: int
    """Number of predictions."""
    units: int
    """Number of tokens or words that the perplexity is divided by."""


class Protocol(NamedTuple):
    window: int | None
    """Tokens in a window; None for the model's context."""
    stride: Callable[[int], int]
    """Gives the stride of windows of this (even) size."""
    unit: str
    measure: Callable[[PreTrainedModel, PreTrainedTokenizerBase, HeldOut, int, int], list[Score]]
    """Scores of a domain in windows of this size at this stride."""
    text: str
    """A description of the text and of the predictions that count."""


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, HeldOut],
    protocols: Sequence[ProtocolName],
) -> Figures:
    """Measures `model` by each of `protocols` on the text of every domain."""
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
        log_progress(logger, f"{domain}: {name} perplexity {_figure(protocol, scores[domain])['ppl']:.2f}")
    return {
        **_figure(protocol, list(chain.from_iterable(scores.values()))),
        "window": window,
        "stride": stride,
        "domains": {domain: _figure(protocol, domain_scores) for domain, domain_scores in scores.items()},
        "sentence": "; ".join(
            [
                *_window_clauses(protocol, window, stride),
                protocol.text,
                *_domain_clauses(protocol, window, scores, texts),
            ]
        ),
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


def _window_clauses(protocol: Protocol, window: int, stride: int) -> list[str]:
    """The unit, the windows and the stride in words; a window that the model's context cuts is named."""
    size = f"windows of {window:,} tokens"
    if protocol.window is None:
        size += ", the model's context"
    elif window < protocol.window:
        size += f", the model's context, where the protocol has {protocol.window:,}"
    overlap = f"stride {stride:,}" if stride < window else "no overlap"
    return [f"perplexity per {protocol.unit}", size, overlap]


def _domain_clauses(
    protocol: Protocol, window: int, scores: Mapping[str, Sequence[Score]], texts: Mapping[str, HeldOut]
) -> Iterator[str]:
    """Names the domains whose text is changed, and those that fill no window."""
    partial = [domain for domain, text in texts.items() if not text.whole]
    if protocol.measure is not _row_scores and partial:
        yield f"only a part of a test set, or documents held out here: {', '.join(partial)}"
    respaced = [domain for domain, text in texts.items() if _has_wikitext_spacing(text)]
    if protocol.unit == "word" and respaced:
        yield (
            f"WikiText's spacing is undone as lm-eval does, and words are counted before: {', '.join(respaced)}"
        )
    short = [domain for domain in scores if _is_short(protocol, scores[domain], window)]
    if short:
        yield f"shorter than one window, and one short window each: {', '.join(short)}"


def _has_wikitext_spacing(text: HeldOut) -> bool:
    return wikitext.is_marked(document.text for document in text.documents)


def _row_scores(
    model: PreTrainedModel, _: PreTrainedTokenizerBase, text: HeldOut, window: int, stride: int
) -> list[Score]:
    return _token_scores(model, windows(text.rows, window, stride))


def _joined_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: HeldOut, window: int, stride: int
) -> list[Score]:
    # the published tables were measured with the tokenizer's own special tokens
    joined = "\n\n".join(row for document in text.documents for row in document.rows)
    tokens = tokenizer(joined, split_special_tokens=True, verbose=False)["input_ids"]
    return _token_scores(model, windows(np.array(tokens), window, stride))


def _token_scores(model: PreTrainedModel, given: Sequence[Window]) -> list[Score]:
    nll = window_nll(model, given)
    return [Score(total, w.scored, w.scored) for total, w in zip(nll, given, strict=True)]


def _document_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: HeldOut, window: int, _: int
) -> list[Score]:
    prefix = _prefix(tokenizer)
    respace = wikitext.without_spacing if _has_wikitext_spacing(text) else str
    given, words = [], []
    for document in text.documents:
        ids = tokenizer(
            respace(document.text), add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]
        parts = list(rolling_windows(np.array([prefix, *ids]), window))
        given += parts
        words += [count_words(document.text)] + [0] * (len(parts) - 1)
    nll = window_nll(model, given)
    return [Score(total, w.scored, n) for total, w, n in zip(nll, given, words, strict=True)]


def _prefix(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token before a document: beginning of text, else end of text. ModelError if there is neither."""
    for prefix in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if prefix is not None:
            return int(prefix)
    raise ModelError(
        "the protocol words reads every document after a beginning-of-text or end-of-text token, and the tokenizer "
        "has neither: set eos_token in its tokenizer_config.json, or leave words out of evaluate.protocols"
    )


def rolling_windows(tokens: np.ndarray, context: int) -> Iterator[Window]:
    """Windows that judge every token but the first once, with at least one and at most `context` tokens before it.

    The last window reaches back to be as long as the others. It judges only the tokens that they left.
    """
    for first in range(1, len(tokens), context):
        end = min(first + context, len(tokens))
        yield Window(tokens[max(0, end - context - 1) : end], end - first)


def count_words(document: str) -> int:
    r"""Number of pieces that white space separates. White space at an edge of the text adds an (empty) piece."""
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
        "every held-out document is read by itself after a one-token prefix; words are the pieces between white space",
    ),
}
