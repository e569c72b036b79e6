"""Perplexity by two protocols, over all text and per domain.

"sliding" is SparseKD's: windows of w tokens, stride w/2, the mean over all w − 1 predictions of every window, so most
tokens count twice, once with little context and once with more. "disjoint" takes windows of w that do not overlap.
The second's windows are every other one of the first's, so one pass gives both. Only whole windows count, unless a
domain's text is shorter than one. (lm-eval's `wikitext` reports word perplexity, a different quantity.)

Shapes: B windows, L tokens per window, D hidden size, V vocabulary, N positions.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from sparsekd_ray.model import head

logger = logging.getLogger(__name__)

WINDOWS_PER_BATCH = 16


def protocol(window: int, context: int) -> tuple[int, int]:
    """(window, stride) in tokens: the paper's, cut to the model's context; the window is even."""
    size = min(window, context) // 2 * 2
    return size, size // 2


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """First token of every window over `length` tokens; one short window where the text is shorter than that."""
    return list(range(0, length - window + 1, stride)) or [0]


@torch.no_grad()
def window_nll(model: Any, stream: np.ndarray, starts: list[int], window: int) -> list[tuple[float, int]]:
    """(summed negative log-likelihood in nats, number of predictions) of each window of `stream`."""
    found: list[tuple[float, int]] = []
    for first in range(0, len(starts), WINDOWS_PER_BATCH):
        rows = [stream[s : s + window] for s in starts[first : first + WINDOWS_PER_BATCH]]
        input_ids_BL = torch.from_numpy(np.stack(rows)).long().to(model.device)
        nll_BL = token_nll(model, input_ids_BL)
        found += [(total, nll_BL.shape[1]) for total in nll_BL.double().sum(-1).tolist()]
    return found


def token_nll(model: Any, input_ids_BL: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of every token but the first [B, L − 1], logits a chunk of positions at a time."""
    hidden_BLD = model.base_model(input_ids=input_ids_BL, use_cache=False).last_hidden_state[:, :-1]
    hidden_ND, labels_N = hidden_BLD.flatten(0, 1), input_ids_BL[:, 1:].flatten()
    logits = head.chunks(hidden_ND, head.weight(model))
    nll = [
        F.cross_entropy(logits_nV, labels_n, reduction="none")
        for logits_nV, labels_n in zip(logits, labels_N.split(head.ROWS_PER_CHUNK), strict=True)
    ]
    return torch.cat(nll).view(hidden_BLD.shape[:2])


def perplexity(parts: list[tuple[float, int]]) -> float:
    total, tokens = math.fsum(nll for nll, _ in parts), sum(count for _, count in parts)
    return math.exp(min(total / tokens, 700.0))  # a diverged model's figure stays a finite number


def evaluate(model: Any, streams: Mapping[str, np.ndarray], window: int) -> dict[str, Any]:
    """Perplexities of `model` on each domain's token stream and on all of them together, by both protocols."""
    size, stride = protocol(window, model.config.max_position_embeddings)
    sliding: dict[str, list[tuple[float, int]]] = {}
    disjoint: dict[str, list[tuple[float, int]]] = {}
    model.eval()
    for domain, stream in streams.items():
        starts = window_starts(len(stream), size, stride)
        sliding[domain] = window_nll(model, stream, starts, size)
        disjoint[domain] = [
            part for start, part in zip(starts, sliding[domain], strict=True) if start % size == 0
        ]
        logger.info(f"{domain}: perplexity {perplexity(sliding[domain]):.2f}")
    return {"window": size, "stride": stride, "sliding": _summary(sliding), "disjoint": _summary(disjoint)}


def _summary(by_domain: dict[str, list[tuple[float, int]]]) -> dict[str, Any]:
    everything = [part for parts in by_domain.values() for part in parts]
    return _figures(everything) | {
        "domains": {domain: _figures(parts) for domain, parts in by_domain.items()}
    }


def _figures(parts: list[tuple[float, int]]) -> dict[str, Any]:
    return {"ppl": perplexity(parts), "tokens": sum(count for _, count in parts)}
