"""Logits as fp32 sums, a chunk of rows at a time: the one place where hidden states meet the head.

The student's loss, evaluation, the statistics of pruning and the teacher all call this module, so the same hidden
states give the same logits, bit for bit, in all of them. A product of two bf16 numbers is exact in fp32, and a matrix
unit sums such products in fp32 anyway; only the result must not be rounded back. A bf16 logit of 20 is off by up to
0.06 nat, which adds 1e-4 to 5e-4 nat of noise to a KL divergence: more than the cache's codec does.

Shapes: N rows (positions), n rows of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsekd_ray.model import cost

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS_PER_CHUNK = cost.ROWS_PER_CHUNK


def hidden_states(model: PreTrainedModel, input_ids_BL: Tensor) -> Tensor:
    """The head's input: final hidden states [B, L, D], whatever outputs the model's config asks for."""
    output = model.base_model(
        input_ids=input_ids_BL, use_cache=False, return_dict=True, output_attentions=False
    )
    hidden_BLD: Tensor = output.last_hidden_state
    return hidden_BLD


def weight(model: PreTrainedModel) -> Tensor:
    """The head's weight [V, D]; that of the embedding where the two are tied."""
    head_VD: Tensor = model.get_output_embeddings().weight
    return head_VD


def logits(hidden_nD: Tensor, head_VD: Tensor) -> Tensor:
    """Logits [n, V] of one chunk, fp32 (float64 for float64 weights).

    A family that scales or caps its logits does so here, and multiplies by the derivative in `distill.loss` and in
    `prune.statistics`, which form the gradient to the logits themselves.
    """
    return product(hidden_nD, head_VD.T)


def chunks(hidden_ND: Tensor, head_VD: Tensor) -> Iterator[Tensor]:
    """The logits of all rows in order, `ROWS_PER_CHUNK` rows at a time."""
    for hidden_nD in torch.split(hidden_ND, ROWS_PER_CHUNK):
        yield logits(hidden_nD, head_VD)


def product(a_nm: Tensor, b_mk: Tensor) -> Tensor:
    """a @ b [n, k] whose sums are at least fp32 and are not rounded to the type of the factors."""
    if a_nm.dtype in (torch.float32, torch.float64):
        return a_nm @ b_mk
    if a_nm.is_cuda:
        return torch.mm(a_nm, b_mk, out_dtype=torch.float32)
    return a_nm.float() @ b_mk.float()  # a CPU has no product of narrow factors with a wide result
