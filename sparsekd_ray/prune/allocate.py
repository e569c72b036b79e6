"""The rank of each matrix under an exact parameter budget. Pure: names, spectra and counts in, ranks out.

A matrix's options, in rising cost, are the multiples of `align` that save something (`cost.py`), then its present
form: dense, or the rank it has. Truncation to rank r loses the energy Σ_{i>r} σ² of the matrix's spectrum. Rules:

- uniform: every matrix keeps the same share of its parameters.
- energy: one number ε = 1 − τ is the share of its energy that any matrix may lose; every matrix keeps the
  smallest rank that does. ε is bisected until the count comes to the budget.
- tiered (SparseKD): as energy, but the protected matrices (first and last layer, every down_proj) may lose half.
- optimal: the least sum of weight × energy lost, over all choices that meet the budget and do not overdraw it. With
  whitened spectra and no weights this is the squared error of all MLP outputs; with Fisher scalars as weights, nats
  per token.

Spectra of language models are flat and ranks come in whole steps, so whatever the rule, the count is within 0.1 % of
the original MLP's parameters, or as near as whole steps allow: the searches are in `knapsack.py`.
"""

import re
from collections.abc import Collection, Mapping
from typing import Literal

import numpy as np

from sparsekd_ray.errors import ConfigError
from sparsekd_ray.model.cost import aligned_ranks, parameters
from sparsekd_ray.prune import knapsack
from sparsekd_ray.prune.knapsack import Options

TOLERANCE = 1e-3  # allowed distance from the budget, as a share of the dense MLP parameters
GAP = 1e-2  # allowed unproven share of the optimal rule's loss, where the proof would take too long

Rule = Literal["uniform", "tiered", "energy", "optimal"]
Shapes = Mapping[str, tuple[int, int]]
Ranks = dict[str, int | None]


def protected_names(names: Collection[str]) -> frozenset[str]:
    """SparseKD's protected tier: the MLP matrices of the first and the last layer, and every down_proj."""
    layers = {name: int(match[1]) for name in names if (match := re.search(r"\blayers\.(\d+)\.", name))}
    edges = {min(layers.values()), max(layers.values())} if layers else set()
    return frozenset(name for name in names if layers.get(name) in edges or name.endswith("down_proj"))


def max_sparsity(shapes: Shapes, align: int, gauge: bool = False, bias: bool = False) -> float:
    """The largest share of dense MLP parameters that low rank can remove: every matrix at rank `align`.

    A matrix too small to save anything even there stays dense.
    """
    dense = sum(m * n for m, n in shapes.values())
    ranks = [next(iter(aligned_ranks(m, n, align, gauge, bias)), None) for m, n in shapes.values()]
    least = sum(parameters(m, n, r, gauge, bias) for (m, n), r in zip(shapes.values(), ranks, strict=True))
    return 1 - least / dense


def choose(
    rule: Rule,
    spectra: Mapping[str, np.ndarray],
    shapes: Shapes,
    sparsity: float,
    align: int,
    dense_mlp_params: int,
    *,
    weights: Mapping[str, float] | None = None,
    protected: Collection[str] = frozenset(),
    gauge: bool = False,
    bias: bool = False,
) -> Ranks:
    """The rank of every matrix by this rule, `None` where it stays dense.

    spectra: singular values of each matrix, largest first; fewer than min(m, n) of them mean that the matrix is
    already a product of that rank, stored as `gauge` and `bias` say, which can only fall. sparsity: share of
    `dense_mlp_params` (the original model's MLP, before any round) to be absent afterwards. weights: of the optimal
    rule, 1 where not given. protected: of the tiered rule. Raises ConfigError where no choice of ranks comes near
    the budget, ValueError for a spectrum or weight that is not finite or is negative.
    """
    _check_numbers(spectra, shapes, weights)
    table = []
    for name, (m, n) in shapes.items():
        tail = _tail(spectra[name])
        by_share = (2 if rule == "tiered" and name in protected else 1) / (tail[0] or 1.0)
        scale = _weight(weights, name) if rule == "optimal" else by_share
        table.append(_options(scale * tail, m, n, align, gauge, bias))
    target, tolerance = round(dense_mlp_params * (1 - sparsity)), TOLERANCE * dense_mlp_params
    _check_budget(table, sparsity, target, tolerance, dense_mlp_params, align)
    if rule == "optimal":
        chosen = _optimal(table, target, tolerance)
    else:
        start = _even(table, shapes, 1 - sparsity) if rule == "uniform" else _bisect(table, target)
        chosen = knapsack.repair(table, start, target, tolerance)
    return {name: o.ranks[i] for name, o, i in zip(shapes, table, chosen, strict=True)}


def losses(
    spectra: Mapping[str, np.ndarray],
    shapes: Shapes,
    ranks: Mapping[str, int | None],
    weights: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """weight × Σ_{i>r} σ² of every matrix: what truncation to these ranks is predicted to lose; dense loses 0."""
    tails = {name: _tail(spectra[name]) for name in shapes}
    ranks_kept = {
        name: len(spectra[name]) if ranks[name] is None else int(ranks[name] or 0) for name in shapes
    }
    return {name: float(_weight(weights, name) * tails[name][ranks_kept[name]]) for name in shapes}


def _tail(sigma_k: np.ndarray) -> np.ndarray:
    """[k + 1] Σ_{i>r} σ² for every rank r from 0 to k."""
    energy_k = np.asarray(sigma_k, dtype=np.float64) ** 2
    return np.append(np.cumsum(energy_k[::-1])[::-1], 0.0)


def _weight(weights: Mapping[str, float] | None, name: str) -> float:
    return 1.0 if weights is None else weights[name]


def _check_numbers(
    spectra: Mapping[str, np.ndarray], shapes: Shapes, weights: Mapping[str, float] | None
) -> None:
    for name in shapes:
        if not np.isfinite(spectra[name]).all():
            raise ValueError(f"the spectrum of {name} holds NaN or infinity")
        if not 0 <= _weight(weights, name) < np.inf:
            raise ValueError(f"the weight of {name} is {_weight(weights, name)}; allowed: finite, from 0 up")


def _options(loss: np.ndarray, m: int, n: int, align: int, gauge: bool, bias: bool) -> Options:
    present_rank = len(loss) - 1 if len(loss) - 1 < min(m, n) else None
    present = parameters(m, n, present_rank, gauge, bias)
    costs = {r: parameters(m, n, r, gauge, bias) for r in aligned_ranks(m, n, align, gauge, bias)}
    ranks = [r for r, cost in costs.items() if cost < present]
    return Options(
        ranks=(*ranks, present_rank),
        costs=np.array([*(costs[r] for r in ranks), present], dtype=np.int64),
        losses=np.append(loss[ranks], 0.0),
    )


def _check_budget(
    table: list[Options], sparsity: float, target: int, tolerance: float, dense: int, align: int
) -> None:
    least, present = sum(int(o.costs[0]) for o in table), sum(int(o.costs[-1]) for o in table)
    if sparsity <= 0 or not least - tolerance <= target <= present + tolerance:
        raise ConfigError(
            f"sparsity {sparsity:.4g} leaves {target} of {dense} MLP parameters; this model has {present} "
            f"and, with ranks in multiples of {align}, can go down to {least}: ask for a sparsity above "
            f"{max(0.0, 1 - present / dense):.4f} and up to {1 - least / dense:.4f}"
        )


def _even(table: list[Options], shapes: Shapes, share: float) -> list[int]:
    """Options whose cost is nearest to this share of the dense matrix."""
    return [
        int(np.argmin(np.abs(o.costs - share * m * n)))
        for o, (m, n) in zip(table, shapes.values(), strict=True)
    ]


def _bisect(table: list[Options], target: int) -> list[int]:
    """Options at the ε whose count is nearest to the target: below, or one step of ε above."""

    def at(epsilon: float) -> list[int]:
        return [int(np.argmax(o.losses <= epsilon)) for o in table]

    steps = np.unique(np.concatenate([o.losses for o in table]))  # the count changes at these ε only
    low, high = 0, len(steps) - 1
    while low < high:  # the smallest ε that meets the budget
        middle = (low + high) // 2
        fits = knapsack.count(table, at(steps[middle])) <= target
        low, high = (low, middle) if fits else (middle + 1, high)
    candidates = [at(steps[i]) for i in (low, max(low - 1, 0))]
    return min(candidates, key=lambda chosen: abs(knapsack.count(table, chosen) - target))


def _optimal(table: list[Options], target: int, tolerance: float) -> list[int]:
    """The least sum of losses of a count up to `tolerance` below the target; where there is none, within tolerance
    of it or at the nearest count. More parameters always lose less: a rule that minimises must not overdraw."""
    chosen, gap = knapsack.least_loss(table, target - int(tolerance) // 2, tolerance / 2)
    if not target - tolerance <= knapsack.count(table, chosen) <= target:
        chosen, gap = knapsack.least_loss(table, target, tolerance)
    if gap > GAP * knapsack.loss(table, chosen):
        raise ConfigError(
            f"the allocation found loses {knapsack.loss(table, chosen):.4g}, and it is not proven that none loses "
            f"{gap:.2g} less, which is more than {GAP:.0%}: raise prune.align, so that there are fewer choices"
        )
    return chosen
