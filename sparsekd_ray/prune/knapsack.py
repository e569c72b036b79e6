"""One option for each of many matrices, under one exact budget: a multi-choice knapsack. Pure, in numpy.

Greedy removal does not solve it, because a matrix's last option (dense, or the rank it has) can be a jump: losing the
first direction means losing all above the break-even rank. There are two exact searches. Both are dynamic programming
over the parameter counts that partial choices reach (matrices have few distinct shapes, so counts coincide and stay
few).

`repair` makes the smallest change to a given choice that brings its count within tolerance of the target, or as near
as whole steps allow. `least_loss` finds, among all choices whose count lies in a window, one with the least sum of
losses.

The second search needs a bound to stay small, and Lagrange gives it. Let λ be the price of a parameter at which the
choices of least loss + λ cost just fit (the slope at which the lower convex hulls of all matrices together meet the
budget). No choice within the budget H then loses less than Σ min(loss + λ cost) − λ H, and what a choice of count c
loses beyond this bound, its excess, is Σ δ + λ (H − c), δ ≥ 0 being what each of its options lies above its matrix's
minimum. So all choices with an excess up to any cap are found by keeping only options and partial sums below it; the
cap is doubled until one is found, and the best found is then the best of all. (Dyer 1984; Pisinger 1995 for the core.)
If more than `STATES` partial sums are needed, only those with the smallest excess are kept. The answer then comes with
a proven limit of the loss above the least one. No shape that a supported model has comes near this.
"""

from dataclasses import dataclass

import numpy as np

STATES = 1 << 20  # partial sums remembered per matrix
PRODUCTS = 1 << 24  # partial sums times options looked at, per matrix


@dataclass(frozen=True)
class Options:
    """The options of one matrix, cheapest first. The last one is its present form."""

    ranks: tuple[int | None, ...]  # None: dense
    costs: np.ndarray  # [options] parameters, rising, int64
    losses: np.ndarray  # [options] of whatever is to be bounded or summed, falling


def count(table: list[Options], chosen: list[int]) -> int:
    """Parameters of these options together."""
    return sum(int(o.costs[i]) for o, i in zip(table, chosen, strict=True))


def loss(table: list[Options], chosen: list[int]) -> float:
    """Loss of these options together."""
    return float(sum(o.losses[i] for o, i in zip(table, chosen, strict=True)))


def repair(table: list[Options], start: list[int], target: int, tolerance: float) -> list[int]:
    """The least disturbance of `start` whose count is within tolerance of the target, or else nearest to it.

    The search looks one step up and down first, then further. Among equals it takes the smallest sum of changed losses.
    """
    reach, chosen = 1, start
    while abs(count(table, chosen) - target) > tolerance:
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

    Among those, the smallest sum of changed losses. Sums that can no longer come within one step of the target
    are dropped: single steps lead from below it to above it, so no best answer lies further away.
    """
    costs = [o.costs[w.start : w.stop] for o, w in zip(table, windows, strict=True)]
    rest = _rest(costs)
    aim = int(np.clip(target, *rest[0]))
    slack = max(tolerance, *(int(np.diff(c).max(initial=0)) for c in costs))
    sums, change, history = np.zeros(1, dtype=np.int64), np.zeros(1), []
    for i, (o, w) in enumerate(zip(table, windows, strict=True)):
        all_sums = (sums[:, None] + costs[i]).ravel()
        all_change = (change[:, None] + np.abs(o.losses[w.start : w.stop] - o.losses[start[i]])).ravel()
        near = (all_sums + rest[i + 1, 0] <= aim + slack) & (all_sums + rest[i + 1, 1] >= aim - slack)
        history.append(_best_of_each_sum(all_sums, all_change, near))
        sums, change = all_sums[history[-1]], all_change[history[-1]]
    excess = np.maximum(np.abs(sums - target) - tolerance, 0)
    return _trace(int(np.lexsort((change, excess))[0]), history, [np.array(w) for w in windows])


def least_loss(table: list[Options], target: int, tolerance: float) -> tuple[list[int], float]:
    """Options of the least total loss with a count within tolerance of the target, or else at the nearest count.

    The second value limits what they may lose beyond the least: 0 where it is proven that no choice loses less.
    """
    start = repair(table, _relaxed(table, target)[1], target, tolerance)
    reach = max(int(tolerance), abs(count(table, start) - target))
    return _search(table, (target - reach, target + reach), start)


def _search(table: list[Options], window: tuple[int, int], incumbent: list[int]) -> tuple[list[int], float]:
    """As `least_loss`, of the choices whose count lies in the window, of which the incumbent is one."""
    price, _ = _relaxed(table, window[1])
    lines = [o.losses + price * o.costs for o in table]
    excess = [line - line.min() for line in lines]
    paid = price * window[1]
    bound = float(sum(line.min() for line in lines)) - paid
    rounding = 1e-12 * (abs(bound) + paid)  # of the sums
    worst = max(loss(table, incumbent) - bound, 0.0) + rounding
    unit = int(np.gcd.reduce(np.concatenate([o.costs for o in table])))
    proven, cap = 0.0, min(worst, max(price * unit, worst * 1e-9))
    while True:
        chosen, complete = _within_cap(table, excess, price, window, cap)
        if chosen is not None and complete:
            return chosen, 0.0
        if chosen is not None or cap >= worst:
            best = min([incumbent, chosen or incumbent], key=lambda choice: loss(table, choice))
            return best, max(loss(table, best) - bound - proven, 0.0)
        proven, cap = cap if complete else proven, min(2 * cap, worst)


def _relaxed(table: list[Options], high: int) -> tuple[float, list[int]]:
    """λ, and the choice below the budget that belongs to it: hull steps are taken steepest first while they fit.

    λ is the loss per parameter of the first step that does not fit, 0 if all fit.
    """
    hulls = [_lower_hull(o.costs, o.losses) for o in table]
    step = np.concatenate([np.diff(o.costs[hull]) for o, hull in zip(table, hulls, strict=True)])
    gain = np.concatenate([-np.diff(o.losses[hull]) for o, hull in zip(table, hulls, strict=True)])
    owner = np.repeat(np.arange(len(table)), [len(hull) - 1 for hull in hulls])
    order = np.argsort(-gain / step, kind="stable")
    fits = int(np.searchsorted(sum(int(o.costs[0]) for o in table) + np.cumsum(step[order]), high, "right"))
    taken = np.bincount(owner[order[:fits]], minlength=len(table))
    price = float(gain[order[fits]] / step[order[fits]]) if fits < len(order) else 0.0
    return price, [hull[t] for hull, t in zip(hulls, taken, strict=True)]


def _lower_hull(costs: np.ndarray, losses: np.ndarray) -> list[int]:
    """Indices of the lower convex hull (Andrew's monotone chain); costs rise."""
    hull: list[int] = []
    x, y = costs.tolist(), losses.tolist()
    for i in range(len(x)):
        while len(hull) > 1 and (y[i] - y[hull[-2]]) * (x[hull[-1]] - x[hull[-2]]) <= (
            y[hull[-1]] - y[hull[-2]]
        ) * (x[i] - x[hull[-2]]):
            hull.pop()
        hull.append(i)
    return hull


def _within_cap(
    table: list[Options], excess: list[np.ndarray], price: float, window: tuple[int, int], cap: float
) -> tuple[list[int] | None, bool]:
    """The choice of least excess in the window, None if all exceed the cap; and whether the search was complete."""
    low, high = window
    kept = [np.flatnonzero(e <= cap) for e in excess]
    costs = [o.costs[k] for o, k in zip(table, kept, strict=True)]
    rest, complete = _rest(costs), True
    sums, so_far, history = np.zeros(1, dtype=np.int64), np.zeros(1), []
    for i, k in enumerate(kept):
        all_sums = (sums[:, None] + costs[i]).ravel()
        all_excess = (so_far[:, None] + excess[i][k]).ravel()
        most = all_sums + rest[i + 1, 1]
        near = (all_sums + rest[i + 1, 0] <= high) & (most >= low)
        near &= all_excess + price * np.maximum(high - most, 0) <= cap
        order = _best_of_each_sum(all_sums, all_excess, near)
        room = min(STATES, PRODUCTS // len(kept[i + 1]) if i + 1 < len(kept) else STATES)
        if len(order) > room:
            order, complete = order[np.argsort(all_excess[order], kind="stable")[:room]], False
        history.append(order)
        sums, so_far = all_sums[order], all_excess[order]
    total = so_far + price * (high - sums)
    if not len(total):
        return None, complete
    return _trace(int(np.argmin(total)), history, kept), complete


def _rest(costs: list[np.ndarray]) -> np.ndarray:
    """[matrices + 1, 2]: the cheapest and the dearest sum of matrices i and on."""
    ends = [(int(c[0]), int(c[-1])) for c in reversed(costs)]
    return np.cumsum([(0, 0), *ends], axis=0)[::-1]


def _best_of_each_sum(sums: np.ndarray, values: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Indices of the allowed entries in the order of their sums; among equal sums only the smallest value."""
    order = np.flatnonzero(allowed)
    order = order[np.lexsort((values[order], sums[order]))]
    return order[np.append(True, np.diff(sums[order]) > 0)] if len(order) else order


def _trace(state: int, history: list[np.ndarray], options: list[np.ndarray]) -> list[int]:
    """The option of each matrix on the way to the final state; an index counts states times options."""
    chosen = []
    for order, kept in zip(reversed(history), reversed(options), strict=True):
        state, option = divmod(int(order[state]), len(kept))
        chosen.append(int(kept[option]))
    return chosen[::-1]
