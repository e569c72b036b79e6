"""Negative log-likelihoods of windows of tokens, and perplexity.

Shapes: B windows of one length, L predictions per window, N = B · L, n rows of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from sparsekd_ray.model import head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS_PER_BATCH = 8192


class Window(NamedTuple):
    """Consecutive tokens. The last `scored` of them are predicted, each from all tokens before it in the window."""

    tokens: np.ndarray
    scored: int


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Starts of all complete windows over `length` tokens; [0] (one short window) if the text is shorter."""
    return list(range(0, length - window + 1, stride)) or [0]


def windows(stream: np.ndarray, window: int, stride: int) -> list[Window]:
    """The windows of a stream. Every token of a window but the first is scored."""
    parts = (stream[start : start + window] for start in window_starts(len(stream), window, stride))
    return [Window(tokens, len(tokens) - 1) for tokens in parts]


@torch.no_grad()
def window_nll(model: PreTrainedModel, given: Sequence[Window]) -> list[float]:
    """Negative log-likelihood in nats of each window's scored tokens, in order. Windows of one length run together."""
    totals = [0.0] * len(given)
    for places in _batches([len(window.tokens) for window in given]):
        tokens_BL = torch.from_numpy(np.stack([given[place].tokens for place in places])).long()
        nll_BL = token_nll(model, tokens_BL.to(model.device)).double()
        for place, nll_L in zip(places, nll_BL, strict=True):
            totals[place] = nll_L[len(nll_L) - given[place].scored :].sum().item()
    return totals


def _batches(lengths: Sequence[int]) -> Iterable[list[int]]:
    """Indices of windows that run together: all of one length, about `TOKENS_PER_BATCH` tokens in total."""
    by_length: dict[int, list[int]] = {}
    for place, length in enumerate(lengths):
        by_length.setdefault(length, []).append(place)
    for length, places in by_length.items():
        size = max(1, TOKENS_PER_BATCH // length)
        yield from (places[first : first + size] for first in range(0, len(places), size))


def token_nll(model: PreTrainedModel, tokens_BL: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood [B, L] of every token but the first of each window [B, L + 1].

    The last token is only predicted and no input of the model, so a window may be one longer than the context.
    """
    hidden_BLD = head.hidden_states(model, tokens_BL[:, :-1])
    logits = head.chunks(hidden_BLD.flatten(0, 1), head.weight(model))
    labels = torch.split(tokens_BL[:, 1:].flatten(), head.ROWS_PER_CHUNK)
    nll = [F.cross_entropy(x_nV, y_n, reduction="none") for x_nV, y_n in zip(logits, labels, strict=True)]
    return torch.cat(nll).view(hidden_BLD.shape[:2])


def perplexity(nll: Iterable[float], count: int) -> float:
    """exp of the mean over `count` predictions (or words)."""
    return math.exp(min(math.fsum(nll) / count, 700.0))  # finite also for a diverged model
