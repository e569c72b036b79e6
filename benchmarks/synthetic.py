"""Synthetic data: a teacher's logits over a vocabulary of real size, and a teacher with random weights.

The logits are Zipf's law over ids that are numbered from frequent to rare, as tokenizers number them, plus normal noise
of 1.5, plus 40 ids that the context prefers, drawn from Zipf's law, by 4 nat on average. So the likeliest id has about
three quarters of the mass at T = 1 and the 32 likeliest a quarter at T = 2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from sparsekd_ray.corpus.shards import domain_table

NOISE, PREFERRED, PREFERENCE = 1.5, 40, 4.0


def logits(count: int, vocabulary: int, generator: torch.Generator) -> torch.Tensor:
    """float32 [count, vocabulary]."""
    prior_V = -torch.log(torch.arange(vocabulary) + 2.7)
    logits_NV = prior_V + NOISE * torch.randn(count, vocabulary, generator=generator)
    line_V = (0.75 * prior_V).exp().double().cumsum(-1)
    places_NP = line_V[-1] * torch.rand(count, PREFERRED, dtype=torch.float64, generator=generator)
    ids_NP = torch.searchsorted(line_V, places_NP).clamp(max=vocabulary - 1)
    liking_NP = PREFERENCE * torch.empty(count, PREFERRED).exponential_(1, generator=generator)
    return logits_NV.scatter_add_(1, ids_NP, liking_NP)


def rows(count: int, length: int, vocabulary: int) -> pa.Table:
    """Training rows of random tokens."""
    ids = np.random.default_rng(0).integers(0, vocabulary, (count, length), dtype=np.int32)
    return domain_table("random", "train", ids)


def save_teacher(folder: Path, **sizes: Any) -> None:
    """A Phi-3 directory with random weights."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Phi3Config(pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)
    transformers.Phi3ForCausalLM(config).save_pretrained(folder)
