"""Fewer layers: which blocks change the residual stream least.

Two published rules. Gromov et al. 2024 ("The Unreasonable Ineffectiveness of the Deeper Layers") drop n consecutive
blocks: those over which the direction of the stream turns least, by the angular distance
    d(l, n) = arccos(cos(h_l, h_{l+n})) / π,
h_l being what enters block l at the last token of a sequence, mean over sequences. ShortGPT (Men et al. 2024) drops
the single blocks of least influence, BI = 1 − mean cos(h before, h after) over all tokens. Both look at the stream
before the final norm; `statistics.py` measures them. Blocks are numbered from 0; state L, behind the last block, closes
the list of states.

Shapes: L blocks, S = L + 1 states.
"""

import math

import torch

from sparsekd_ray.errors import ConfigError
from sparsekd_ray.model.mlp import require_finite


def count(layers: int, sparsity: float) -> int:
    """The number of layers whose removal comes nearest to the sparsity, all layers being of one size.

    Raises ConfigError, with what can be reached, if that is none or all of them.
    """
    removed = math.floor(layers * sparsity + 0.5)
    if 1 <= removed < layers:
        return removed
    reach = f"from {1 / layers:.4f} to {1 - 1 / layers:.4f} in steps of {1 / layers:.4f}"
    raise ConfigError(
        f"sparsity {sparsity:.4g} asks for {removed} of {layers} layers to go; "
        + (f"whole layers allow {reach}" if layers > 1 else "a model of one layer cannot lose any")
    )


def block(angle_SS: torch.Tensor, removed: int) -> list[int]:
    """The `removed` consecutive blocks over which the stream turns least; of equal ones the first.

    angle_SS: mean angular distance of state l (row) and state k (column).
    """
    require_finite("angle_SS", angle_SS)
    _check(removed, len(angle_SS) - 1)
    first = int(angle_SS.diagonal(removed).argmin())
    return list(range(first, first + removed))


def influence(influence_L: torch.Tensor, removed: int) -> list[int]:
    """The `removed` blocks of least influence, rising; of equal ones the first."""
    require_finite("influence_L", influence_L)
    _check(removed, len(influence_L))
    return sorted(influence_L.sort(stable=True).indices[:removed].tolist())


def _check(removed: int, layers: int) -> None:
    if not 1 <= removed < layers:
        raise ValueError(f"cannot remove {removed} of {layers} layers; allowed: 1 to {layers - 1}")
