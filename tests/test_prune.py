"""The tiered allocation against brute force, and the prune stage on real model directories."""

import itertools
import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from test_checkpoint import FAMILIES, dense_directory

from sparsekd_ray.errors import ConfigError, ModelError
from sparsekd_ray.model import checkpoint
from sparsekd_ray.prune import allocate
from sparsekd_ray.prune.allocate import TOLERANCE, max_sparsity, protected_names, tiered
from sparsekd_ray.prune.apply import prune

torch.set_num_threads(1)

# allocation


def matrices(family: str, hidden: int, inner: int, layers: int) -> dict[str, tuple[int, int]]:
    values = {
        "model_type": family,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
    }
    return checkpoint.shapes_from_config(values)


def random_spectra(shapes: dict[str, tuple[int, int]], seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {name: np.sort(generator.random(min(shape)) + 0.1)[::-1] for name, shape in shapes.items()}


def cost(shape: tuple[int, int], rank: int | None) -> int:
    return math.prod(shape) if rank is None else rank * sum(shape)


def count(shapes: dict[str, tuple[int, int]], ranks: dict[str, int | None]) -> int:
    return sum(cost(shape, ranks[name]) for name, shape in shapes.items())


def choices(shape: tuple[int, int], align: int, held: int | None) -> list[int | None]:
    """All that a matrix may become: aligned ranks that cost less than what it is now, and what it is now."""
    ranks = [r for r in range(align, min(shape) + 1, align) if cost(shape, r) < cost(shape, held)]
    return [*ranks, held]


def brute_force_distance(
    shapes: dict[str, tuple[int, int]], align: int, target: int, held: dict[str, int | None]
) -> int:
    """How near any combination of choices whatever comes to the target."""
    costs = [[cost(s, r) for r in choices(s, align, held[name])] for name, s in shapes.items()]
    return min(abs(sum(combination) - target) for combination in itertools.product(*costs))


@pytest.mark.parametrize("seed", range(40))
def test_budget_is_as_near_as_any_combination_of_ranks(seed: int) -> None:
    rng = random.Random(seed)
    family = rng.choice(["phi3", "qwen3"])
    shapes = matrices(family, rng.randint(5, 17), rng.randint(5, 23), rng.randint(1, 2))
    first, *others = shapes
    align = rng.choice([a for a in (1, 2, 3, 4) if len(choices(shapes[first], a, None)) > 1])  # it can shrink
    spectra = random_spectra(shapes, seed)
    held: dict[str, int | None] = dict.fromkeys(shapes)
    if seed % 2:  # some matrices are already products
        for name in rng.sample(others, k=len(others) // 2 + 1):
            m, n = shapes[name]
            held[name] = rng.randint(1, (m * n - 1) // (m + n))
            spectra[name] = spectra[name][: held[name]]
    dense = sum(m * n for m, n in shapes.values())
    least = sum(min(cost(s, r) for r in choices(s, align, held[name])) for name, s in shapes.items())
    target = rng.randint(least, count(shapes, held) - 1)
    ranks = tiered(spectra, shapes, 1 - target / dense, align, dense, protected_names(shapes))
    assert all(ranks[name] in choices(s, align, held[name]) for name, s in shapes.items())
    distance = abs(count(shapes, ranks) - target)
    assert distance <= max(TOLERANCE * dense, brute_force_distance(shapes, align, target, held))


@pytest.mark.parametrize(
    ("family", "hidden", "inner", "layers", "align"),
    [
        ("phi3", 3072, 8192, 32, 64),
        ("qwen3", 1024, 3072, 28, 64),
        ("phi3", 128, 352, 4, 1),
        ("phi3", 511, 1409, 6, 64),
    ],
)
@pytest.mark.parametrize("sparsity", [0.15, 0.35, 0.65])
def test_real_sizes_meet_the_budget_within_a_thousandth(
    family: str, hidden: int, inner: int, layers: int, align: int, sparsity: float
) -> None:
    shapes = matrices(family, hidden, inner, layers)
    dense = sum(m * n for m, n in shapes.values())
    ranks = tiered(random_spectra(shapes, 0), shapes, sparsity, align, dense, protected_names(shapes))
    assert abs(1 - count(shapes, ranks) / dense - sparsity) <= 0.001
    assert all(rank is None or (rank % align == 0 and cost(s, rank) < math.prod(s))
               for rank, s in zip(ranks.values(), shapes.values(), strict=True))  # fmt: skip


def test_ranks_are_those_of_one_threshold_with_half_the_loss_for_protected_tiers() -> None:
    shapes = matrices("qwen3", 40, 64, 4)
    spectra, protected = random_spectra(shapes, 3), protected_names(shapes)
    assert protected == {n for n in shapes if ".0." in n or ".3." in n or n.endswith("down_proj")}
    dense = sum(m * n for m, n in shapes.values())

    def by_threshold(epsilon: float) -> dict[str, int | None]:
        ranks: dict[str, int | None] = {}
        for name, (m, n) in shapes.items():
            energy = spectra[name] ** 2
            allowed = energy.sum() * (epsilon / 2 if name in protected else epsilon)
            rank = next(r for r in range(1, len(energy) + 1) if energy[r:].sum() <= allowed)
            ranks[name] = rank if rank * (m + n) < m * n else None
        return ranks

    wanted = by_threshold(0.2)  # no repair is due if the target is exactly what a threshold gives
    sparsity = 1 - count(shapes, wanted) / dense
    assert tiered(spectra, shapes, sparsity, 1, dense, protected) == wanted
    assert None in wanted.values() and len(set(wanted.values())) > 5


@pytest.mark.parametrize(("second", "wanted"), [(0.3, [8, 9, 1, 1]), (0.5 / 19, [8, 8, 1, 2])])
def test_repair_changes_the_matrix_where_it_costs_least(second: float, wanted: list[int]) -> None:
    """Two flat spectra move together, so no threshold gives 19 ranks in all: one matrix has to move alone.

    A flat one regains 1/20 of its energy by that, a steep one `second`.
    """
    shapes = {f"model.layers.{i}.mlp.up_proj": (20, 20) for i in range(4)}
    steep = np.sqrt([0.5, second, *[(0.5 - second) / 18] * 18])
    spectra = dict(zip(shapes, [np.ones(20), np.ones(20), steep, steep], strict=True))
    ranks = list(tiered(spectra, shapes, 1 - 19 * 40 / 1600, 1, 1600, frozenset()).values())
    assert sorted(ranks[:2]) + sorted(ranks[2:]) == wanted


@pytest.mark.parametrize("seed", range(8))
def test_repair_is_the_least_change_of_all_that_are_near_enough(seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = [
        allocate.Options(tuple(range(4)), np.cumsum(rng.integers(3, 9, 4)), np.sort(rng.random(4))[::-1])
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
    found = allocate._nearest(table, start, [range(4)] * 4, target, tolerance)
    assert tuple(found) in near and len(near) > 3
    assert change(found) == pytest.approx(min(map(change, near)))


def test_a_zero_matrix_keeps_least() -> None:
    shapes = matrices("phi3", 16, 24, 2)
    spectra = random_spectra(shapes, 0)
    spectra["model.layers.0.mlp.down_proj"] = np.zeros(16)
    ranks = tiered(spectra, shapes, 0.4, 2, sum(m * n for m, n in shapes.values()), frozenset())
    assert ranks["model.layers.0.mlp.down_proj"] == min(rank or 99 for rank in ranks.values()) < 7


@pytest.mark.parametrize("sparsity", [-0.1, 0.0, 0.97, 1.0, 1.5])
def test_impossible_budgets_are_refused_with_the_limits(sparsity: float) -> None:
    shapes = matrices("phi3", 32, 45, 3)
    dense = sum(m * n for m, n in shapes.values())
    limit = max_sparsity(shapes, 8)
    with pytest.raises(ConfigError, match=f"up to {limit:.4f}"):
        tiered(random_spectra(shapes, 0), shapes, sparsity, 8, dense, frozenset())
    ranks = tiered(random_spectra(shapes, 0), shapes, limit, 8, dense, frozenset())
    assert set(ranks.values()) == {8}


def test_max_sparsity_leaves_matrices_dense_that_no_aligned_rank_shrinks() -> None:
    shapes = {"up": (10, 10), "gate": (100, 100)}
    assert max_sparsity(shapes, 8) == pytest.approx(1 - (100 + 8 * 200) / 10_100)  # 8 · 20 > 100
    assert max_sparsity(shapes, 64) == 0


# the stage


def elements(path: Path, part: str = "") -> int:
    """Elements of the tensors on disk, as another reader of the format sees them."""
    total = 0
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            total += sum(tensors.get_tensor(name).numel() for name in tensors.keys() if part in name)  # noqa: SIM118
    return total


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_prune_meets_the_budget_on_disk_in_two_rounds(family: str, tied: bool, tmp_path: Path) -> None:
    source = dense_directory(tmp_path / "dense", family, tied)
    dense_mlp = checkpoint.mlp_parameters(source)
    previous, held = source, dict.fromkeys(checkpoint.shapes_from_config(source), 10**9)
    for sparsity in (0.3, 0.6):
        out, said = tmp_path / f"{sparsity}", []
        metrics = prune(
            previous, out, sparsity=sparsity, align=2, dense_mlp_params=dense_mlp, say=said.append
        )
        assert metrics["params"] == elements(out) and metrics["mlp_params"] == elements(out, ".mlp.")
        assert metrics["params"] == checkpoint.count_parameters(checkpoint.load(out))
        assert metrics["sparsity"] == 1 - metrics["mlp_params"] / dense_mlp
        half_step = 2 * (32 + 45) / 2 / dense_mlp  # of a matrix of 32 by 45, two ranks at a time
        assert metrics["sparsity"] == pytest.approx(sparsity, abs=half_step)
        assert metrics["sparsity_requested"] == sparsity and said
        assert all(rank is None or rank <= held[name] for name, rank in metrics["ranks"].items())
        previous, held = out, {name: rank or held[name] for name, rank in metrics["ranks"].items()}
    with pytest.raises(ConfigError, match=r"above 0\.[56]"):
        prune(previous, tmp_path / "back", sparsity=0.3, align=2, dense_mlp_params=dense_mlp, say=print)
    assert not (tmp_path / "back").exists()


def test_factors_are_those_of_the_joint_matrix(tmp_path: Path) -> None:
    source = dense_directory(tmp_path / "dense", "phi3", tied=True)
    metrics = prune(
        source,
        tmp_path / "out",
        sparsity=0.5,
        align=4,
        dense_mlp_params=checkpoint.mlp_parameters(source),
        say=print,
    )
    dense, student = checkpoint.load(source), checkpoint.load(tmp_path / "out")
    name = "model.layers.1.mlp.gate_up_proj"
    W_mn = dense.get_submodule(name).weight.detach().double()
    sigma_k = torch.linalg.svdvals(W_mn)[metrics["ranks"][name] :]
    error = torch.linalg.norm(W_mn - checkpoint.mlp_matrix(student, name))
    assert error == pytest.approx(float(sigma_k.square().sum().sqrt()), rel=1e-5)


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    source = dense_directory(tmp_path / "dense", "phi3", tied=True)
    model = checkpoint.load(source)
    model.model.layers[1].mlp.down_proj.weight.data[3, 4] = torch.inf
    model.save_pretrained(source)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj\.weight holds NaN or infinity"):
        prune(source, tmp_path / "out", sparsity=0.5, align=2, dense_mlp_params=9000, say=print)


@pytest.mark.parametrize("sparsity", [0.15, 0.5, 0.65])
def test_uniform_leaves_every_matrix_the_same_share(sparsity):
    block = {"gate_up_proj": (704, 128), "down_proj": (128, 352)}
    shapes = {f"model.layers.{i}.mlp.{name}": shape for i in range(4) for name, shape in block.items()}
    spectra = {name: np.linspace(5, 1, min(shape)) for name, shape in shapes.items()}
    dense = sum(m * n for m, n in shapes.values())
    ranks = allocate.uniform(spectra, shapes, sparsity, 1, dense)
    left = {name: ranks[name] * (m + n) for name, (m, n) in shapes.items()}
    assert abs(sum(left.values()) / dense - (1 - sparsity)) <= 1e-3
    assert all(abs(left[name] / (m * n) - (1 - sparsity)) < 0.02 for name, (m, n) in shapes.items())
