"""How much each matrix keeps under an exact parameter budget. Pure: names, spectra and counts in, ranks out.

A matrix of m by n costs m n parameters while dense and r (m + n) as a product of rank r, so factors save
something only below the break-even rank m n / (m + n); a matrix that would need more stays dense.

SparseKD's tiered rule: every matrix keeps the smallest rank that retains its tier's share of spectral
energy Σ σ². One number ε = 1 − τ is the energy that any matrix may lose; the protected ones (first and last
layer, every down_proj) may lose half of it. ε is bisected until the count comes to the budget. Spectra of
language models are flat and ranks come in whole steps, so the last steps are a subset-sum problem: the few
changes nearest to the bisected solution, found exactly, that bring the count within 0.1 % of the MLP's
parameters, or as near as whole steps allow.

A matrix's options, in rising cost, are the multiples of `align` that save something, then what it is now.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from sparsekd_ray.errors import ConfigError

TOLERANCE = 1e-3  # of the original dense MLP parameters: how near the budget is near enough

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Options:
    """What one matrix may become, cheapest first, ending with what it is now."""

    ranks: tuple[int | None, ...]  # None: dense
    costs: np.ndarray  # [options] parameters, rising
    losses: (
        np.ndarray
    )  # [options] share of energy lost, doubled if protected so that one ε bounds all; falling


def protected_names(names: Collection[str]) -> frozenset[str]:
    """SparseKD's protected tier: the MLP matrices of the first and the last layer, and every down_proj."""
    layers = {name: int(found[1]) for name in names if (found := re.search(r"\blayers\.(\d+)\.", name))}
    edges = {min(layers.values()), max(layers.values())} if layers else set()
    return frozenset(name for name in names if layers.get(name) in edges or name.endswith("down_proj"))


def aligned_ranks(m: int, n: int, align: int) -> range:
    """Multiples of `align` below the break-even rank: r (m + n) < m n."""
    return range(align, -(-m * n // (m + n)), align)


def max_sparsity(shapes: Shapes, align: int) -> float:
    """The largest share of dense MLP parameters that low rank can remove: every matrix at rank `align`.

    A matrix too small to save anything even there stays dense.
    """
    dense = sum(m * n for m, n in shapes.values())
    least = sum(align * (m + n) if aligned_ranks(m, n, align) else m * n for m, n in shapes.values())
    return 1 - least / dense


def tiered(
    spectra: Mapping[str, np.ndarray],
    shapes: Shapes,
    sparsity: float,
    align: int,
    dense_mlp_params: int,
    protected: Collection[str],
) -> dict[str, int | None]:
    """Ranks by the tiered energy rule, `None` where the matrix stays dense.

    spectra: singular values of each matrix, largest first; fewer than min(m, n) of them mean that the
    matrix is already a product of that rank, which can only fall. sparsity: share of `dense_mlp_params`
    (the original model's MLP, before any round) to be absent afterwards. Raises ConfigError where no choice
    of ranks comes near the budget.
    """
    names = list(shapes)
    table = [_options(spectra[name], *shapes[name], align, name in protected) for name in names]
    target, tolerance = round(dense_mlp_params * (1 - sparsity)), TOLERANCE * dense_mlp_params
    _check_budget(table, sparsity, target, tolerance, dense_mlp_params, align)
    chosen = _repair(table, _bisect(table, target), target, tolerance)
    return {name: options.ranks[i] for name, options, i in zip(names, table, chosen, strict=True)}


def uniform(
    spectra: Mapping[str, np.ndarray], shapes: Shapes, sparsity: float, align: int, dense_mlp_params: int
) -> dict[str, int | None]:
    """Ranks that leave every matrix the same share of its parameters; arguments and errors as in `tiered`."""
    names = list(shapes)
    table = [_options(spectra[name], *shapes[name], align, False) for name in names]
    target, tolerance = round(dense_mlp_params * (1 - sparsity)), TOLERANCE * dense_mlp_params
    _check_budget(table, sparsity, target, tolerance, dense_mlp_params, align)
    shares = [(1 - sparsity) * m * n for m, n in shapes.values()]
    start = [int(np.argmin(np.abs(o.costs - share))) for o, share in zip(table, shares, strict=True)]
    chosen = _repair(table, start, target, tolerance)
    return {name: options.ranks[i] for name, options, i in zip(names, table, chosen, strict=True)}


def _options(sigma_k: np.ndarray, m: int, n: int, align: int, protected: bool) -> Options:
    low_rank = len(sigma_k) < min(m, n)
    present = (len(sigma_k), len(sigma_k) * (m + n)) if low_rank else (None, m * n)
    ranks = [r for r in aligned_ranks(m, n, align) if r * (m + n) < present[1]]
    energy_k = np.asarray(sigma_k, dtype=np.float64) ** 2
    tail = np.append(np.cumsum(energy_k[::-1])[::-1], 0.0)  # tail[r] = Σ_{i>r} σ²
    losses = np.append(tail[ranks], 0.0) / (tail[0] or 1.0)
    return Options(
        ranks=(*ranks, present[0]),
        costs=np.array([*(r * (m + n) for r in ranks), present[1]]),
        losses=losses * (2 if protected else 1),
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


def _bisect(table: list[Options], target: int) -> list[int]:
    """Options at the ε whose count is nearest to the target: below, or one step of ε above."""

    def at(epsilon: float) -> list[int]:
        return [int(np.argmax(o.losses <= epsilon)) for o in table]

    steps = np.unique(np.concatenate([o.losses for o in table]))  # the count changes at these ε only
    low, high = 0, len(steps) - 1
    while low < high:  # the smallest ε that meets the budget
        middle = (low + high) // 2
        low, high = (low, middle) if _count(table, at(steps[middle])) <= target else (middle + 1, high)
    candidates = [at(steps[i]) for i in (low, max(low - 1, 0))]
    return min(candidates, key=lambda chosen: abs(_count(table, chosen) - target))


def _count(table: list[Options], chosen: list[int]) -> int:
    return sum(int(o.costs[i]) for o, i in zip(table, chosen, strict=True))


def _repair(table: list[Options], start: list[int], target: int, tolerance: float) -> list[int]:
    """The least disturbance that is near enough, looking one step up and down first, then further."""
    reach, chosen = 1, start
    while abs(_count(table, chosen) - target) > tolerance:
        edges = [(i - reach, i + reach + 1, len(o.costs)) for o, i in zip(table, start, strict=True)]
        windows = [range(max(low, 0), min(high, size)) for low, high, size in edges]
        chosen = _nearest(table, start, windows, target, tolerance)
        if all(low <= 0 and high >= size for low, high, size in edges):
            break  # every combination has been seen
        reach *= 2
    return chosen


def _nearest(
    table: list[Options], start: list[int], windows: list[range], target: int, tolerance: float
) -> list[int]:
    """One option per matrix from its window, so that the count is within tolerance or else nearest to target.

    Among those, the smallest sum of changed losses. Exact dynamic programming over the reachable counts.

    Matrices have few distinct shapes, so sums coincide and the states stay few. Sums that can no longer
    come within one step of the target are dropped: single steps lead from below it to above it, so no best
    answer lies further away.
    """
    costs = [o.costs[w.start : w.stop] for o, w in zip(table, windows, strict=True)]
    ends = [(c[0], c[-1]) for c in reversed(costs)]
    rest = np.cumsum([(0, 0), *ends], axis=0)[::-1]  # rest[i]: cheapest and dearest sum of matrices i and on
    aim = int(np.clip(target, *rest[0]))
    slack = max(tolerance, *(int(np.diff(c).max(initial=0)) for c in costs))
    sums, change, history = np.zeros(1, dtype=np.int64), np.zeros(1), []
    for i, (o, w) in enumerate(zip(table, windows, strict=True)):
        all_sums = (sums[:, None] + costs[i]).ravel()
        all_change = (change[:, None] + np.abs(o.losses[w.start : w.stop] - o.losses[start[i]])).ravel()
        near = (all_sums + rest[i + 1, 0] <= aim + slack) & (all_sums + rest[i + 1, 1] >= aim - slack)
        order = np.flatnonzero(near)
        order = order[np.lexsort((all_change[order], all_sums[order]))]
        order = order[np.append(True, np.diff(all_sums[order]) > 0)]  # of equal sums, the least change
        history.append(order)  # state → which state and option it came from
        sums, change = all_sums[order], all_change[order]
    excess = np.maximum(np.abs(sums - target) - tolerance, 0)
    state, chosen = int(np.lexsort((change, excess))[0]), []
    for w, order in zip(reversed(windows), reversed(history), strict=True):
        state, option = divmod(int(order[state]), len(w))
        chosen.append(w.start + option)
    return chosen[::-1]
