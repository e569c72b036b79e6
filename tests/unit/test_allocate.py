"""Ranks under a budget: every rule against brute force, the optimal one against all choices, real sizes in time."""

import itertools
import math
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import get_args

import numpy as np
import pytest

from sparsekd_ray.errors import ConfigError
from sparsekd_ray.model import spec
from sparsekd_ray.model.cost import aligned_ranks, parameters
from sparsekd_ray.prune import allocate, knapsack
from sparsekd_ray.prune.allocate import TOLERANCE, Rule, choose, losses, max_sparsity, protected_names

RULES: tuple[Rule, ...] = get_args(Rule)
Shape = tuple[int, int]
PHI, QWEN, STANDIN = ("phi3", 3072, 8192, 32), ("qwen3", 1024, 3072, 28), ("phi3", 128, 352, 4)


def matrices(family: str, hidden: int, inner: int, layers: int) -> dict[str, Shape]:
    values = {
        "model_type": family,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
    }
    return spec.shapes_from_config(values)


def size(shapes: Mapping[str, Shape]) -> int:
    return sum(m * n for m, n in shapes.values())


def random_spectra(shapes: Mapping[str, Shape], seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {name: np.sort(generator.random(min(shape)) + 0.1)[::-1] for name, shape in shapes.items()}


def uneven(shapes: Mapping[str, Shape], seed: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Spectra of unlike size and decay, and weights over two decades."""
    rng = np.random.default_rng(seed)
    spectra = {
        name: np.sort(rng.gamma(2, 1, min(shape)))[::-1]
        * np.linspace(1, rng.uniform(0, 1), min(shape))
        * rng.uniform(0.3, 3)
        for name, shape in shapes.items()
    }
    return spectra, {name: float(rng.lognormal()) for name in shapes}


def cost(shape: Shape, rank: int | None, gauge: bool = False, bias: bool = False) -> int:
    """The numbers that are stored, one by one: factors, or U and C; and a bias."""
    m, n = shape
    if rank is None:
        return m * n
    return (m * rank + rank * (n - rank) if gauge else m * rank + rank * n) + m * bias


def count(shapes: Mapping[str, Shape], ranks: Mapping[str, int | None], *form: bool) -> int:
    return sum(cost(shape, ranks[name], *form) for name, shape in shapes.items())


def choices(shape: Shape, align: int, held: int | None, *form: bool) -> list[int | None]:
    """All that a matrix may become: aligned ranks that cost less than what it is now, and what it is now."""
    now = cost(shape, held, *form)
    return [*(r for r in range(align, min(shape) + 1, align) if cost(shape, r, *form) < now), held]


def sums(tables: Iterable[np.ndarray]) -> np.ndarray:
    """The sums of all combinations of one entry from each table."""
    return reduce(lambda total, table: np.add.outer(total, table).ravel(), tables, np.zeros(1))


# cost


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (8, 8), (12, 30), (64, 33)])
@pytest.mark.parametrize("align", [1, 2, 3, 64])
@pytest.mark.parametrize("gauge", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_costs_and_aligned_ranks_by_counting(shape: Shape, align: int, gauge: bool, bias: bool) -> None:
    for rank in (None, *range(1, min(shape) + 1)):
        assert parameters(*shape, rank, gauge, bias) == cost(shape, rank, gauge, bias)
    assert list(aligned_ranks(*shape, align, gauge, bias)) == choices(shape, align, None, gauge, bias)[:-1]


def test_gauge_has_no_break_even() -> None:
    assert max(aligned_ranks(3072, 1024, 1)) == 767 and max(aligned_ranks(3072, 1024, 1, gauge=True)) == 1023
    assert parameters(3072, 1024, 815, gauge=True) == pytest.approx(0.85 * 3072 * 1024, rel=1e-3)


# every rule


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(40))
def test_budget_is_as_near_as_any_combination_of_ranks(rule: Rule, seed: int) -> None:
    rng = random.Random(seed)
    family, form = rng.choice(["phi3", "qwen3"]), (rng.random() < 0.5, rng.random() < 0.3)
    shapes = matrices(family, rng.randint(5, 17), rng.randint(5, 23), rng.randint(1, 2))
    first, *others = shapes
    align = rng.choice([a for a in (1, 2, 3, 4) if len(choices(shapes[first], a, None, *form)) > 1])
    spectra = random_spectra(shapes, seed)
    held: dict[str, int | None] = dict.fromkeys(shapes)
    if seed % 2:  # some matrices are already products
        for name in rng.sample(others, k=len(others) // 2 + 1):
            m, n = shapes[name]
            held[name] = rng.randint(1, max(1, (m * n - m - 1) // (m + n)))
            spectra[name] = spectra[name][: held[name]]
    allowed = {name: choices(shape, align, held[name], *form) for name, shape in shapes.items()}
    costs = [np.array([cost(shapes[name], r, *form) for r in ranks]) for name, ranks in allowed.items()]
    dense, target = size(shapes), rng.randint(sum(c.min() for c in costs), count(shapes, held, *form) - 1)
    ranks = choose(
        rule, spectra, shapes, 1 - target / dense, align, dense,
        protected=protected_names(shapes), gauge=form[0], bias=form[1],
    )  # fmt: skip
    assert all(ranks[name] in allowed[name] for name in shapes)
    distance = abs(count(shapes, ranks, *form) - target)
    assert distance <= max(TOLERANCE * dense, np.abs(sums(costs) - target).min())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("model", "align"), [(PHI, 64), (QWEN, 64), (STANDIN, 1), (("phi3", 511, 1409, 6), 64)]
)
@pytest.mark.parametrize("gauge", [False, True])
def test_real_sizes_meet_the_budget_within_a_thousandth(
    rule: Rule, model: tuple[str, int, int, int], align: int, gauge: bool
) -> None:
    shapes = matrices(*model)
    dense, (spectra, weights), protected = size(shapes), uneven(shapes, 0), protected_names(shapes)
    for sparsity in (0.15, 0.35, 0.5, 0.65):
        started = time.perf_counter()
        ranks = choose(
            rule, spectra, shapes, sparsity, align, dense, weights=weights, protected=protected, gauge=gauge
        )
        assert time.perf_counter() - started < 5
        assert abs(1 - count(shapes, ranks, gauge) / dense - sparsity) <= 0.001
        assert all(
            r in choices(s, align, None, gauge) for r, s in zip(ranks.values(), shapes.values(), strict=True)
        )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sparsity", [-0.1, 0.0, 0.97, 1.0, 1.5])
def test_impossible_budgets_are_refused_with_the_limits(rule: Rule, sparsity: float) -> None:
    shapes = matrices("phi3", 32, 45, 3)
    spectra, limit = random_spectra(shapes, 0), max_sparsity(shapes, 8)
    with pytest.raises(ConfigError, match=f"up to {limit:.4f}"):
        choose(rule, spectra, shapes, sparsity, 8, size(shapes))
    assert set(choose(rule, spectra, shapes, limit, 8, size(shapes)).values()) == {8}
    gauged = max_sparsity(shapes, 8, gauge=True)
    assert gauged > limit
    assert set(choose(rule, spectra, shapes, gauged, 8, size(shapes), gauge=True).values()) == {8}


def test_max_sparsity_leaves_matrices_dense_that_no_aligned_rank_shrinks() -> None:
    shapes = {"up": (10, 10), "gate": (100, 100)}
    assert max_sparsity(shapes, 8) == pytest.approx(1 - (100 + 8 * 200) / 10_100)  # 8 · 20 > 100
    assert max_sparsity(shapes, 8, gauge=True) == pytest.approx(1 - (8 * 12 + 8 * 192) / 10_100)
    assert max_sparsity(shapes, 8, bias=True) == pytest.approx(1 - (100 + 8 * 200 + 100) / 10_100)
    assert max_sparsity(shapes, 100) == 0


def test_numbers_that_are_none_are_named() -> None:
    shapes = matrices("phi3", 16, 24, 1)
    good, (first, second) = random_spectra(shapes, 0), shapes
    with pytest.raises(ValueError, match=f"spectrum of {first} holds NaN"):
        choose("uniform", good | {first: np.array([np.nan])}, shapes, 0.5, 1, size(shapes))
    for wrong in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match=f"weight of {second} is"):
            choose("optimal", good, shapes, 0.5, 1, size(shapes), weights={first: 1.0, second: wrong})


def test_losses_are_what_truncation_leaves_out() -> None:
    shapes = {"a": (4, 3), "b": (3, 5), "c": (6, 6)}
    spectra = {
        "a": np.array([3.0, 2, 1]),
        "b": np.array([2.0, 1]),
        "c": np.zeros(6),
    }  # b is a product of rank 2
    assert losses(spectra, shapes, {"a": 1, "b": 2, "c": 3}) == {"a": 5, "b": 0, "c": 0}
    ranks = {"a": None, "b": 1, "c": None}
    assert losses(spectra, shapes, ranks, {"a": 1, "b": 10, "c": 1}) == {"a": 0, "b": 10, "c": 0}


# tiered, energy, uniform


@pytest.mark.parametrize(("rule", "epsilon"), [("tiered", 0.2), ("energy", 0.12)])
def test_ranks_are_those_of_one_threshold_with_half_the_loss_for_protected_tiers(
    rule: Rule, epsilon: float
) -> None:
    shapes = matrices("qwen3", 40, 64, 4)
    spectra, protected = random_spectra(shapes, 3), protected_names(shapes)
    assert protected == {n for n in shapes if ".0." in n or ".3." in n or n.endswith("down_proj")}

    wanted: dict[str, int | None] = {}
    for name, (m, n) in shapes.items():
        energy = spectra[name] ** 2
        allowed = energy.sum() * (epsilon / 2 if rule == "tiered" and name in protected else epsilon)
        rank = next(r for r in range(1, len(energy) + 1) if energy[r:].sum() <= allowed)
        wanted[name] = rank if rank * (m + n) < m * n else None
    # no repair is due if the target is exactly what a threshold gives
    sparsity = 1 - count(shapes, wanted) / size(shapes)
    assert choose(rule, spectra, shapes, sparsity, 1, size(shapes), protected=protected) == wanted
    assert None in wanted.values() and len(set(wanted.values())) > 3


@pytest.mark.parametrize(("second", "wanted"), [(0.3, [8, 9, 1, 1]), (0.5 / 19, [8, 8, 1, 2])])
def test_repair_changes_the_matrix_where_it_costs_least(second: float, wanted: list[int]) -> None:
    """Two flat spectra move together, so no threshold gives 19 ranks in all: one matrix has to move alone.

    A flat one regains 1/20 of its energy by that, a steep one `second`.
    """
    shapes = {f"model.layers.{i}.mlp.up_proj": (20, 20) for i in range(4)}
    steep = np.sqrt([0.5, second, *[(0.5 - second) / 18] * 18])
    spectra = dict(zip(shapes, [np.ones(20), np.ones(20), steep, steep], strict=True))
    ranks = [r or 20 for r in choose("energy", spectra, shapes, 1 - 19 * 40 / 1600, 1, 1600).values()]
    assert sorted(ranks[:2]) + sorted(ranks[2:]) == wanted


@pytest.mark.parametrize("seed", range(8))
def test_repair_is_the_least_change_of_all_that_are_near_enough(seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = [
        knapsack.Options(tuple(range(4)), np.cumsum(rng.integers(3, 9, 4)), np.sort(rng.random(4))[::-1])
        for _ in range(4)
    ]
    start, target, tolerance = [1, 2, 1, 0], 50, 2

    def change(chosen: Sequence[int]) -> float:
        return sum(abs(o.losses[i] - o.losses[j]) for o, i, j in zip(table, chosen, start, strict=True))

    near = [
        chosen
        for chosen in itertools.product(range(4), repeat=4)
        if abs(sum(o.costs[i] for o, i in zip(table, chosen, strict=True)) - target) <= tolerance
    ]
    found = knapsack._nearest(table, start, [range(4)] * 4, target, tolerance)
    assert tuple(found) in near and len(near) > 3
    assert change(found) == pytest.approx(min(map(change, near)))


@pytest.mark.parametrize("rule", ["tiered", "energy", "optimal"])
def test_a_zero_matrix_keeps_least(rule: Rule) -> None:
    shapes = matrices("phi3", 16, 24, 2)
    spectra = random_spectra(shapes, 0)
    spectra["model.layers.0.mlp.down_proj"] = np.zeros(16)
    ranks = choose(rule, spectra, shapes, 0.4, 2, size(shapes))
    assert ranks["model.layers.0.mlp.down_proj"] == min(rank or 99 for rank in ranks.values()) < 7


@pytest.mark.parametrize("sparsity", [0.15, 0.5, 0.65])
def test_uniform_leaves_every_matrix_the_same_share(sparsity: float) -> None:
    shapes = matrices(*STANDIN)
    ranks = choose("uniform", random_spectra(shapes, 0), shapes, sparsity, 1, size(shapes))
    for name, shape in shapes.items():
        assert cost(shape, ranks[name]) / math.prod(shape) == pytest.approx(1 - sparsity, abs=0.02)


# optimal


@pytest.mark.parametrize("seed", range(120))
def test_optimal_is_the_least_loss_of_all_choices_in_the_budget(seed: int) -> None:
    """Brute force over everything, with dense and held matrices, both storages, biases, and zero tails."""
    rng = random.Random(seed)
    form = (rng.random() < 0.4, rng.random() < 0.3)
    shapes = {f"m{i}": (rng.randint(6, 30), rng.randint(6, 30)) for i in range(rng.randint(1, 4))}
    if seed % 3 == 0:  # few distinct shapes, as in a model
        shapes = dict.fromkeys((f"m{i}" for i in range(5)), (12, 20)) | {"m0": (20, 12), "m1": (9, 30)}
    align, (spectra, weights) = rng.choice([1, 2, 4] if len(shapes) < 5 else [2, 4]), uneven(shapes, seed)
    held: dict[str, int | None] = dict.fromkeys(shapes)
    for name in rng.sample(sorted(shapes), k=len(shapes) // 3):
        held[name] = rng.randint(1, min(shapes[name]) // 3)
        spectra[name] = spectra[name][: held[name]]
    for name in rng.sample(sorted(shapes), k=len(shapes) // 2 if seed % 4 == 0 else 0):
        spectra[name][len(spectra[name]) // 2 :] = 0
    allowed = {name: choices(shape, align, held[name], *form) for name, shape in shapes.items()}
    costs = [np.array([cost(shapes[n], r, *form) for r in allowed[n]]) for n in shapes]
    lost = [
        np.array([weights[n] * np.sum(spectra[n][r:] ** 2) if r else 0 for r in allowed[n]]) for n in shapes
    ]
    dense, least = size(shapes), sum(int(c.min()) for c in costs)
    if least >= min(dense, count(shapes, held, *form)):
        pytest.skip("nothing can shrink")
    target = rng.randint(least, min(dense, count(shapes, held, *form)) - 1)
    ranks = choose(
        "optimal", spectra, shapes, 1 - target / dense, align, dense,
        weights=weights, gauge=form[0], bias=form[1],
    )  # fmt: skip
    distance = np.abs(sums(costs) - target)
    below = target - int(TOLERANCE * dense) // 2  # the middle of the counts that do not overdraw the budget
    inside = np.abs(sums(costs) - below) <= int(TOLERANCE * dense / 2)
    near = inside if inside.any() else distance <= max(TOLERANCE * dense, distance.min())
    best = sums(lost)[near].min()
    assert all(ranks[name] in allowed[name] for name in shapes)
    assert sum(losses(spectra, shapes, ranks, weights).values()) == pytest.approx(best, rel=1e-9, abs=1e-12)


def test_dense_is_a_jump_that_greedy_misses() -> None:
    """One of two equal flat matrices stays whole: no rank between break-even and dense is worth its price."""
    shapes, flat = {"a": (20, 20), "b": (20, 20)}, np.ones(20)
    ranks = choose("optimal", {"a": flat, "b": flat}, shapes, 0.25, 1, 800)
    assert sorted(ranks.values(), key=str) == [5, None]
    assert sum(losses({"a": flat, "b": flat}, shapes, ranks).values()) == 15
    assert sum(losses({"a": flat, "b": flat}, shapes, {"a": 8, "b": 7}).values()) == 25


@pytest.mark.parametrize(
    ("model", "align"),
    [(PHI, 64), (PHI, 1), (QWEN, 64), (QWEN, 1), (STANDIN, 1), (("qwen3", 511, 1409, 6), 1)],
)
@pytest.mark.parametrize("gauge", [False, True])
def test_optimal_is_proven_at_real_sizes_and_never_worse_than_the_other_rules(
    model: tuple[str, int, int, int], align: int, gauge: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = matrices(*model)
    spectra, weights = uneven(shapes, 1)
    gaps, search = [], knapsack.least_loss

    def watched(table: list[knapsack.Options], target: int, tolerance: float) -> tuple[list[int], float]:
        chosen, gap = search(table, target, tolerance)
        gaps.append(gap)
        return chosen, gap

    monkeypatch.setattr(knapsack, "least_loss", watched)
    lost = {}
    for rule in RULES:
        ranks = choose(
            rule, spectra, shapes, 0.35, align, size(shapes),
            weights=weights, protected=protected_names(shapes), gauge=gauge,
        )  # fmt: skip
        lost[rule] = sum(losses(spectra, shapes, ranks, weights).values())
    assert gaps == [0] and lost["optimal"] == min(lost.values()) < 0.8 * lost["uniform"]


@pytest.mark.parametrize("seed", range(6))
def test_a_search_cut_short_says_how_far_it_may_be_from_the_best(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(seed)
    table = [
        knapsack.Options(
            tuple(range(12)), np.cumsum(rng.integers(90, 400, 12)), np.sort(rng.random(12))[::-1]
        )
        for _ in range(12)
    ]
    target = sum(int(o.costs[5]) for o in table)
    best, gap = knapsack.least_loss(table, target, 3)
    assert gap == 0
    monkeypatch.setattr(knapsack, "STATES", 4)
    found, gap = knapsack.least_loss(table, target, 3)
    assert abs(knapsack.count(table, found) - target) <= 3
    over = knapsack.loss(table, found) - knapsack.loss(table, best)
    assert -1e-12 <= over <= gap + 1e-12
    monkeypatch.setattr(allocate, "GAP", -1.0)
    with pytest.raises(ConfigError, match=r"not proven .* raise prune\.align"):
        allocate._optimal(table, target, 3)
