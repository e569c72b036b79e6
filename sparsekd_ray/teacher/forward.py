"""The teacher's forward pass over rows of tokens.

The model computes hidden states for as many sequences as the card takes. The head then computes logits for one chunk of
positions at a time, and only the signal of each chunk is kept. Sequences of equal length run together without padding.
This module needs torch and transformers, but no Ray.

Shapes: B sequences, L tokens, N positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

from sparsekd_ray.errors import CorpusError, ModelError
from sparsekd_ray.model import head
from sparsekd_ray.model.head import ROWS_PER_CHUNK
from sparsekd_ray.teacher.manifest import CacheManifest
from sparsekd_ray.teacher.signal import NOTHING, Sampled, TopK, padded, sampled, topk

logger = logging.getLogger(__name__)

SEQUENCES = {"cpu": 16, "cuda": 64}
"""The first batch size. It is fixed for a kind of device, because the last bits of a result depend on it."""


class Forward:
    """A teacher in memory; halves its batch for good when the card is out of memory."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        self.sequences = SEQUENCES[model.device.type]

    def signal(self, rows: pa.Table, manifest: CacheManifest) -> TopK | Sampled:
        """The manifest's signal for every position of every row, in order, in host memory.

        CorpusError for rows below two tokens; ModelError, with the sample's name, for probabilities that are not
        finite. ModelError for a card that is too small for one sequence.
        """
        lengths_B, order_B = lengths(rows), np.empty(0, np.int64)
        parts: list[TopK | Sampled] = []
        left_B = longest_first(lengths_B)
        while len(left_B):
            batch_b = bucket(left_B, lengths_B, self.sequences)
            if (part := self._attempt(rows.take(batch_b), manifest)) is None:
                continue
            parts.append(part)
            order_B, left_B = np.append(order_B, batch_b), left_B[len(batch_b) :]
        return _in_order(joined_signals(parts), order_B, lengths_B - 1)

    def _attempt(self, rows: pa.Table, manifest: CacheManifest) -> TopK | Sampled | None:
        """The signal of rows of one length; None, and a smaller batch from now on, where the card was too small."""
        try:
            part, samples = self._signal(rows, manifest), rows["sample_id"].to_pylist()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            failure = str(error).splitlines()[0]
        else:
            _finite(part, samples)
            return part
        self._halve(failure)  # by now the error is freed, and with it the failed batch's memory
        return None

    @torch.inference_mode()
    def logits(self, input_ids_BL: torch.Tensor) -> Iterator[torch.Tensor]:
        """The logits of every position but each sequence's last, `ROWS_PER_CHUNK` positions at a time."""
        ids_BL = input_ids_BL.to(self.model.device)
        hidden_BLD = head.hidden_states(self.model, ids_BL)[:, :-1]
        yield from head.chunks(hidden_BLD.flatten(0, 1), head.weight(self.model))

    @torch.inference_mode()
    def _signal(self, rows: pa.Table, manifest: CacheManifest) -> TopK | Sampled:
        input_ids_BL = tokens(rows)
        keep = _keep(rows["sample_id"].to_pylist(), input_ids_BL.shape[1] - 1, manifest)
        return joined_signals([keep(logits_nV) for logits_nV in self.logits(input_ids_BL)])

    def _halve(self, failure: str) -> None:
        if self.sequences == 1:
            raise ModelError(
                f"one sequence of this teacher, or {ROWS_PER_CHUNK} positions of its vocabulary, do not fit on "
                f"{self.model.device}: use cards with more memory, or shorten corpus.seq_len ({failure})"
            )
        self.sequences //= 2
        logger.warning(
            f"{self.model.device} is out of memory: the teacher reads at most {self.sequences} sequences at a time "
            "from now on. The results are the same but for their last bits"
        )
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()


def _keep(
    samples: list[str], positions: int, manifest: CacheManifest
) -> Callable[[torch.Tensor], TopK | Sampled]:
    """A function that makes the signal of the next chunk of logits."""
    temperatures = manifest.temperatures
    if manifest.signal == "topk":
        return lambda logits_nV: topk(logits_nV, manifest.k, temperatures)
    draws, threshold = iter(draws_of(samples, positions).split(ROWS_PER_CHUNK)), manifest.drawn_weight
    return lambda logits_nV: sampled(logits_nV, temperatures[0], threshold, next(draws).to(logits_nV.device))


def out_of_memory(error: RuntimeError) -> bool:
    """Whether this is one of torch's several errors for a device without free memory."""
    phrases = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(phrase in str(error) for phrase in phrases)


def lengths(rows: pa.Table) -> np.ndarray:
    """Tokens of every row [B]. CorpusError, with the sample's name, for one that predicts nothing."""
    lengths_B = np.diff(rows["input_ids"].combine_chunks().offsets.to_numpy())
    if (lengths_B < 2).any():
        place = int(np.argmax(lengths_B < 2))
        raise CorpusError(
            f"sample {rows['sample_id'][place]} has {lengths_B[place]} tokens: the corpus must hold sequences of at "
            "least two, or there is nothing to predict"
        )
    return np.asarray(lengths_B)


def longest_first(lengths_B: np.ndarray) -> np.ndarray:
    """Rows by falling length, so a card that is too small shows at the start; of equal ones in their order."""
    return np.argsort(-lengths_B, kind="stable")


def bucket(left_B: np.ndarray, lengths_B: np.ndarray, most: int) -> np.ndarray:
    """The next rows that run together: at most `most` of `left_B` (longest first), all of one length."""
    next_b = left_B[:most]
    return np.asarray(next_b[lengths_B[next_b] == lengths_B[next_b[0]]])


def tokens(rows: pa.Table) -> torch.Tensor:
    """int64 [B, L], of rows that have one length."""
    column = rows["input_ids"].combine_chunks()
    return torch.from_numpy(column.flatten().to_numpy().astype(np.int64)).view(len(rows), -1)


def _in_order(signal: TopK | Sampled, order_B: np.ndarray, positions_B: np.ndarray) -> TopK | Sampled:
    """The signal with its rows in the corpus's order; on input they are in the order of `order_B`."""
    if (np.diff(order_B) > 0).all():
        return signal
    counts, back = positions_B[order_B].tolist(), np.argsort(order_B)
    columns = [column.split(counts) for column in signal]
    return type(signal)(*(torch.cat([pieces[place] for place in back]) for pieces in columns))


def draws_of(samples: list[str], positions: int) -> torch.Tensor:
    """A uniform number in [0, 1) for every position. It depends on nothing but the sample's name and the position."""
    seeds = [zlib.crc32(sample.encode()) for sample in samples]
    return torch.from_numpy(
        np.concatenate([np.random.default_rng(seed).random(positions, np.float32) for seed in seeds])
    ).clamp(max=1 - 1e-6)


def _finite(signal: TopK | Sampled, samples: list[str]) -> None:
    bad_N = ~torch.isfinite(signal.logprobs_NK.sum(-1))
    if isinstance(signal, TopK):
        bad_N |= ~torch.isfinite(signal.log_z_NT.sum(-1))
    else:
        bad_N |= signal.exact_N + signal.drawn_N == 0
    bad_B = bad_N.view(len(samples), -1).any(-1)
    if bad_B.any():
        names = [sample for sample, bad in zip(samples, bad_B.tolist(), strict=True) if bad]
        raise ModelError(
            f"the teacher's probabilities for {names[0]} ({len(names)} of this batch) are NaN or infinite: "
            "its weights or its precision are broken; nothing was written for this shard"
        )


def joined_signals(parts: Sequence[TopK | Sampled]) -> TopK | Sampled:
    """One signal in host memory; samples are padded to the widest."""
    width = max(part.ids_NK.shape[1] for part in parts)
    same = [
        part._replace(
            ids_NK=padded(part.ids_NK, width, 0), logprobs_NK=padded(part.logprobs_NK, width, NOTHING)
        )
        for part in parts
    ]
    return type(parts[0])(*(torch.cat(column).cpu() for column in zip(*same, strict=True)))
