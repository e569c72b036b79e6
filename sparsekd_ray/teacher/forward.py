"""The teacher's forward pass over rows of tokens: hidden states for as many sequences as the card takes, the head a
chunk of positions at a time, of each chunk only the signal kept.

Torch and transformers alone: runs where there is no Ray. Shapes: B sequences, L tokens, N positions, D hidden size,
V vocabulary.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from sparsekd_ray.errors import CorpusError, ModelError
from sparsekd_ray.teacher.signal import NOTHING, ROWS_PER_CHUNK, Sampled, TopK, padded, sampled, topk

SEQUENCES = {"cpu": 16, "cuda": 64}
"""At first, and on one kind of card the same in every process: the last bits of a result depend on it."""


class Forward:
    """A teacher in memory; halves its batch for good when the card is out of memory."""

    def __init__(self, model: Any, manifest: dict[str, Any]) -> None:
        self.model, self.manifest = model.eval(), manifest
        self.sequences = SEQUENCES[model.device.type]

    def signal(self, rows: pa.Table) -> TopK | Sampled:
        """The manifest's signal for every position of every row, in order, in host memory.

        CorpusError for rows of unequal length or below two tokens; ModelError for probabilities that are no numbers,
        with the sample's name, and for a card that is too small for one sequence.
        """
        input_ids_BL, samples = tokens(rows), rows["sample_id"].to_pylist()
        parts: list[TopK | Sampled] = []
        first = 0
        while first < len(samples):
            size = self.sequences
            part, failure = None, ""
            try:
                part = self._signal(input_ids_BL[first : first + size], samples[first : first + size])
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                failure = str(error).splitlines()[0]
            if part is None:  # the error is gone, and with it what it held of the failed batch
                self._halve(failure)
                continue
            _finite(part, samples[first : first + size])
            parts.append(part)
            first += size
        return joined_signals(parts)

    @torch.inference_mode()
    def logits(self, input_ids_BL: torch.Tensor) -> Iterator[torch.Tensor]:
        """The logits of every position but each sequence's last, `ROWS_PER_CHUNK` positions at a time."""
        ids_BL = input_ids_BL.to(self.model.device)
        hidden_BLD = self.model.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state[:, :-1]
        head_VD = self.model.get_output_embeddings().weight
        for rows_nD in hidden_BLD.flatten(0, 1).split(ROWS_PER_CHUNK):
            # bf16 logits of 20 would be 0.06 nat off: the product is accumulated in fp32 anyway, and kept so
            wide = rows_nD.is_cuda and rows_nD.dtype != torch.float32
            yield torch.mm(rows_nD, head_VD.T, out_dtype=torch.float32) if wide else rows_nD @ head_VD.T

    @torch.inference_mode()
    def _signal(self, input_ids_BL: torch.Tensor, samples: list[str]) -> TopK | Sampled:
        kept = self._keep(samples, input_ids_BL.shape[1] - 1)
        return joined_signals([kept(logits_nV) for logits_nV in self.logits(input_ids_BL)])

    def _keep(self, samples: list[str], positions: int) -> Callable[[torch.Tensor], TopK | Sampled]:
        """What is kept of the next chunk of logits."""
        temperatures = tuple(self.manifest["temperatures"])
        if self.manifest["signal"] == "topk":
            return lambda logits_nV: topk(logits_nV, self.manifest["k"], temperatures)
        draws = iter(draws_of(samples, positions).split(ROWS_PER_CHUNK))
        threshold = self.manifest["threshold"]
        return lambda logits_nV: sampled(
            logits_nV, temperatures[0], threshold, next(draws).to(logits_nV.device)
        )

    def _halve(self, failure: str) -> None:
        if self.sequences == 1:
            raise ModelError(
                f"one sequence of this teacher, or {ROWS_PER_CHUNK} positions of its vocabulary, do not fit on "
                f"{self.model.device}: use cards with more memory, or shorten corpus.seq_len ({failure})"
            )
        self.sequences //= 2
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()


def out_of_memory(error: RuntimeError) -> bool:
    told = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in told)


def tokens(rows: pa.Table) -> torch.Tensor:
    """int64 [B, L]. CorpusError, with the sample's name, unless all rows have the same two tokens or more."""
    column, samples = rows["input_ids"].combine_chunks(), rows["sample_id"].to_pylist()
    lengths_B = np.diff(column.offsets.to_numpy())
    wrong_B = (lengths_B < 2) | (lengths_B != lengths_B[0])
    if wrong_B.any():
        place = int(np.argmax(wrong_B))
        raise CorpusError(
            f"sample {samples[place]} has {lengths_B[place]} tokens, the first of its shard {lengths_B[0]}: the corpus "
            "must hold sequences of one length, of at least two tokens"
        )
    return torch.from_numpy(column.flatten().to_numpy().astype(np.int64)).view(len(samples), -1)


def draws_of(samples: list[str], positions: int) -> torch.Tensor:
    """A uniform number in [0, 1) for every position, from the sample's name alone: the same whoever asks, and when."""
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
