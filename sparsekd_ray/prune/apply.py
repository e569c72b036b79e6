"""The prune stage: a dense or already low-rank model directory in, a smaller low-rank one out.

Every MLP matrix is decomposed, the allocation gives each its rank under one exact budget, and the factors
take the matrix's place. Sparsity is always the share of the original dense model's MLP parameters that is
gone, so a later round of the cascade states the same quantity as the first. The counts returned are those
of the files on disk.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from sparsekd_ray.errors import ModelError
from sparsekd_ray.model import checkpoint
from sparsekd_ray.prune import allocate, svd

Allocation = Literal["tiered", "uniform"]


def prune(
    source: Path,
    out: Path,
    *,
    sparsity: float,
    align: int,
    allocation: Allocation = "tiered",
    dense_mlp_params: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Prune `source` to the given sparsity into `out`; factors keep the source's number type.

    sparsity: share of `dense_mlp_params` absent afterwards; align: ranks are multiples of it. Returns the
    counts on disk, the ranks (null: dense) and the seconds. Raises ConfigError if the budget cannot be met,
    ModelError if the model is not supported or holds a value that is not finite.
    """
    start = time.perf_counter()
    model = checkpoint.load(source, dtype="auto")
    check_finite(model)
    ranks = choose_ranks(model, sparsity, align, allocation, dense_mlp_params, say)
    student = factorise(model, ranks, say)
    card = f"Low-rank student: {sparsity:.1%} of MLP parameters removed by {allocation} SVD, before any recovery.\n"
    checkpoint.save(student, source, out, card)
    sizes = {name: math.prod(shape) for name, shape in checkpoint.tensors_on_disk(out).items()}
    mlp_params = sum(size for name, size in sizes.items() if ".mlp." in name)
    return {
        "params": sum(sizes.values()),
        "mlp_params": mlp_params,
        "dense_mlp_params": dense_mlp_params,
        "sparsity_requested": sparsity,
        "sparsity": 1 - mlp_params / dense_mlp_params,
        "align": align,
        "ranks": ranks,
        "seconds": time.perf_counter() - start,
    }


def check_finite(model: PreTrainedModel) -> None:
    """Raise ModelError, naming the tensor, if a weight is NaN or infinite."""
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ModelError(f"{name} holds NaN or infinity: the file is damaged or the training diverged")


def choose_ranks(
    model: PreTrainedModel,
    sparsity: float,
    align: int,
    allocation: Allocation,
    dense_mlp_params: int,
    say: Callable[[str], None],
) -> dict[str, int | None]:
    """The rank of every MLP matrix (None: dense) by the rule named, from the spectra of what it is now."""
    shapes, held = checkpoint.shapes_from_config(model), checkpoint.mlp_ranks(model)
    spectra = {}
    for i, name in enumerate(shapes, 1):
        spectra[name] = svd.singular_values(checkpoint.mlp_matrix(model, name))[: held.get(name)].numpy()
        say(f"spectrum {i}/{len(shapes)} {name}")
    if allocation == "uniform":
        return allocate.uniform(spectra, shapes, sparsity, align, dense_mlp_params)
    return allocate.tiered(
        spectra, shapes, sparsity, align, dense_mlp_params, allocate.protected_names(shapes)
    )


def factorise(
    model: PreTrainedModel, ranks: dict[str, int | None], say: Callable[[str], None]
) -> PreTrainedModel:
    """The sparse model whose named MLP matrices have these ranks; None leaves a matrix as it is."""
    state = dict(model.state_dict())
    kept = checkpoint.mlp_ranks(model)
    changed = {name: rank for name, rank in ranks.items() if rank is not None and rank != kept.get(name)}
    for i, (name, rank) in enumerate(changed.items(), 1):
        B_mr, A_rn = svd.truncated_factors(checkpoint.mlp_matrix(model, name), rank)
        for held in ("weight", "A.weight", "B.weight"):
            state.pop(f"{name}.{held}", None)
        state |= {f"{name}.A.weight": A_rn.to(model.dtype), f"{name}.B.weight": B_mr.to(model.dtype)}
        say(f"factors {i}/{len(changed)} {name} rank {rank}")
    return checkpoint.rebuild(model, kept | changed, state)
