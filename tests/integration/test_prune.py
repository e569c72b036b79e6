"""The prune stage on real model directories: every method and family by count and by error, rounds, resumption."""

import dataclasses
import hashlib
import math
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pruning
import pytest
import torch
from models import FAMILIES, mlp_bias
from pruning import CALIBRATE, DENSE, LOW_RANK, PREDICTED, SETTINGS, TEXTS, elements, finish

from benchmarks.s3_server import free_port
from sparsekd_ray.config import Execution, Prune
from sparsekd_ray.model import loading, saving, spec
from sparsekd_ray.prune import calibrate, low_rank, svd
from sparsekd_ray.prune.run import prune
from sparsekd_ray.prune.task import Task
from sparsekd_ray.runtime.logging import listening
from sparsekd_ray.runtime.tasks import TaskMap, map_local, map_on_ray
from sparsekd_ray.store import Ref, Store
from sparsekd_ray.teacher.forward import tokens

torch.set_num_threads(1)

IN_PIECES = ("whitened", "gauge", "neurons", "sdm", "wanda")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return pruning.prepare(tmp_path_factory.mktemp("pruned"))


def weights(store: Store, ref: Ref) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in store.fetch(ref).iterdir()
        if path.suffix in (".safetensors", ".json") and path.name != "record.json"
    }


def metric(asked: Task) -> low_rank.Metric:
    return low_rank.PLAIN if asked.settings.method == "svd" else low_rank.WHITENED


def step(asked: Task) -> float:
    """The smallest change of sparsity by the method: half of one may be missing or over."""
    settings = asked.settings
    return {"neurons": 1 / 45, "sdm": 1 / 45, "depth": 1 / 3}.get(
        settings.method, settings.align * (90 + 32) / asked.dense_mlp_params
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SETTINGS)
def test_counts_are_those_of_the_files(name: str, family: str, store: Store) -> None:
    asked = pruning.task(store, DENSE[family], f"count.{family}.{name}", SETTINGS[name], 1 / 3)
    facts = finish(asked)
    folder, masked = store.fetch(asked.out), name in ("wanda", "magnitude")
    mlp = elements(folder, ".mlp.")[masked]
    assert facts["mlp_params"] == mlp and facts["params"] == elements(folder)[0]
    assert facts["sparsity"] == 1 - mlp / asked.dense_mlp_params
    assert abs(facts["sparsity"] - 1 / 3) <= step(asked) / 2 + 1e-9
    assert facts["method"] == asked.settings.method and facts["sparsity_requested"] == 1 / 3
    model = loading.load(folder)
    assert facts["params"] == loading.count_parameters(model)
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()
    assert spec.is_low_rank(folder) == (name in LOW_RANK)
    assert getattr(model.config, "sparsekd_mask", None) == (name if masked else None)
    if name in LOW_RANK:
        ranks = {key: rank for key, rank in facts["ranks"].items() if rank is not None}
        assert ranks == spec.mlp_ranks(folder)
    assert (facts.get("predicted_loss") is not None) == (name in PREDICTED or "width" in facts)


def inputs_of(store: Store, model: Any, asked: Task) -> dict[str, torch.Tensor]:
    """The inputs [N, n] of every module of an MLP on the calibration text, by name, float64."""
    found: dict[str, torch.Tensor] = {}

    def note(name: str) -> Callable[[Any, Any], None]:
        return lambda _, arguments: found.update({name: arguments[0].flatten(0, 1).double()})

    for name, module in model.named_modules():
        if name.rpartition(".")[0].endswith(".mlp"):
            module.register_forward_pre_hook(note(name))
    with torch.no_grad():
        model(tokens(calibrate.sample(store, TEXTS, CALIBRATE)))
    return found


def measured_loss(store: Store, asked: Task, names: Iterable[str]) -> dict[str, float]:
    """½ Σ Fisher · mean square of what an output misses on the calibration text, over the outputs of each matrix.

    In plain SVD outputs are taken as alike, and inputs as independent and alike.
    """
    before, after = (loading.load(store.fetch(ref)) for ref in (asked.model, asked.out))
    inputs, losses = inputs_of(store, before, asked), {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        measured = asked.layer_statistics(int(name.split(".")[2]))
        x_Nn = inputs[name] if name in inputs else inputs[f"{parent}.gate_proj"]
        parts = [leaf] if f"fisher.{leaf}" in measured else ["gate_proj", "up_proj"]
        fisher_m = torch.cat([measured[f"fisher.{part}"].double() for part in parts])
        missing_mn = loading.mlp_matrix(before, name) - loading.mlp_matrix(after, name)
        error_Nm = x_Nn @ missing_mn.T
        for model, sign in ((before, 1), (after, -1)):
            if (bias_m := mlp_bias(model, name)) is not None:
                error_Nm = error_Nm + sign * bias_m
        square_m = error_Nm.square().mean(0)
        if asked.settings.method == "svd":
            square_m, fisher_m = missing_mn.square().sum(1) * x_Nn.square().mean(), fisher_m.mean()
        losses[name] = float((fisher_m * square_m).sum() / 2)
    return losses


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", PREDICTED)
def test_the_predicted_loss_is_what_the_outputs_miss_on_the_calibration_text(
    name: str, family: str, store: Store
) -> None:
    asked = pruning.task(store, DENSE[family], f"loss.{family}.{name}", SETTINGS[name], 0.4)
    planned, facts = low_rank.plan(asked, map_local, metric(asked)), finish(asked)
    measured = measured_loss(store, asked, planned.shapes)
    assert planned.loss == pytest.approx(measured, rel=1e-3, abs=1e-9)
    assert facts["predicted_loss"] == pytest.approx(sum(measured.values()), rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("first", "second"),
    [("svd-tiered", "svd-tiered"), ("whitened", "whitened"), ("whitened", "gauge"), ("gauge", "gauge"),
     ("bias", "bias"), ("bias", "gauge-bias"), ("whitened", "bias")],
)  # fmt: skip
def test_a_second_round_goes_on_from_the_low_rank_student(
    first: str, second: str, family: str, store: Store
) -> None:
    label, dense = f"{family}.{first}.{second}", DENSE[family]
    one = pruning.task(store, dense, f"one.{label}", SETTINGS[first], 0.3)
    finish(one)
    two = pruning.task(store, one.out, f"two.{label}", SETTINGS[second], 0.55, dense=dense)
    facts = finish(two)
    folder = store.fetch(two.out)
    assert facts["mlp_params"] == elements(folder, ".mlp.")[0]
    assert abs(facts["sparsity"] - 0.55) <= step(two) / 2
    held = spec.mlp_ranks(store.fetch(one.out))
    ranks = spec.mlp_ranks(folder)
    assert all(rank <= held.get(name, 99) for name, rank in ranks.items()) and set(held) <= set(ranks)
    form = SETTINGS[second]
    assert spec.mlp_storage(folder) == (form.storage == "gauge", form.bias)
    if second in PREDICTED:
        assert facts["predicted_loss"] == pytest.approx(
            sum(measured_loss(store, two, ranks).values()), rel=1e-3
        )


def test_gauge_and_factors_of_one_rank_are_one_matrix(store: Store) -> None:
    """Equal ranks cost less in gauge form, so both are asked for the size at which every matrix has rank 12."""
    products = {}
    for name, cost in (("factors", 122 + 77), ("gauge", 122 + 77 - 24)):
        settings = Prune(method="svd-whitened", allocation="uniform", align=12, storage=name)
        sparsity = 1 - 12 * cost / (90 * 32 + 32 * 45)
        asked = pruning.task(store, DENSE["phi3"], f"same.{name}", settings, sparsity)
        assert set(finish(asked)["ranks"].values()) == {12}
        model = loading.load(store.fetch(asked.out))
        products[name] = {n: loading.mlp_matrix(model, n) for n in spec.mlp_ranks(model)}
    for name, matrix in products["factors"].items():
        torch.testing.assert_close(products["gauge"][name], matrix, rtol=1e-4, atol=1e-5)


def test_gate_and_up_share_a_basis_where_that_loses_less(store: Store) -> None:
    """Layer 0: 16 directions for both, which a shared basis holds; layer 1: 12 for each, and none in common."""
    ref = Ref("dense", "crafted", "ff")
    model, random = loading.load(store.fetch(DENSE["qwen3"])), torch.Generator().manual_seed(0)

    def product(rows: int, directions_rn: torch.Tensor) -> torch.Tensor:
        return torch.randn(rows, len(directions_rn), generator=random) @ directions_rn / 8

    basis_nn = torch.linalg.qr(torch.randn(32, 32, generator=random)).Q
    bases = [(basis_nn[:16], basis_nn[:16]), (basis_nn[:12], basis_nn[12:24])]
    for layer, pair in enumerate(bases):
        for leaf, basis_rn in zip(("gate_proj", "up_proj"), pair, strict=True):
            weight = model.get_submodule(f"model.layers.{layer}.mlp.{leaf}").weight
            weight.data.copy_(product(45, basis_rn))
    with store.building(ref) as out:
        saving.save(model, store.fetch(DENSE["qwen3"]), out, "crafted")
    pruning.commit(store, ref)
    shapes = {}
    for method in ("svd", "svd-whitened"):
        asked = pruning.task(store, ref, "crafted", Prune(method=method, allocation="optimal"), 0.3)
        shapes[method] = list(low_rank.plan(asked, map_local, metric(asked)).shapes)
    assert not any("gate_up" in name for name in shapes["svd"]) and len(shapes["svd"]) == 9
    assert [name for name in shapes["svd-whitened"] if ".0." in name or ".1." in name] == [
        f"model.layers.{tail}"
        for tail in (
            "0.mlp.gate_up_proj",
            "0.mlp.down_proj",
            "1.mlp.gate_proj",
            "1.mlp.up_proj",
            "1.mlp.down_proj",
        )
    ]


class Killed(Exception):
    """Stands for the end of the process."""


def until(count: int, published: list[str]) -> TaskMap:
    """Runs pieces here until `count` of them have published something."""

    def each(function: Callable[..., Any], pieces: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        for result in map_local(function, pieces):
            if len(published) >= count:
                raise Killed
            yield result

    return each


def backwards(function: Callable[..., Any], pieces: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
    """Last piece first, each as if it had travelled."""
    for place in reversed(range(len(pieces))):
        travelled = pickle.loads(pickle.dumps((function, [pieces[place]])))
        ((_, result),) = map_local(*travelled)
        yield place, pickle.loads(pickle.dumps(result))


@pytest.mark.parametrize("name", IN_PIECES)
def test_a_killed_pruning_goes_on_with_what_is_missing_and_ends_the_same(
    name: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed, reverse = (
        pruning.task(store, DENSE["qwen3"], f"{kind}.{name}", SETTINGS[name], 0.4)
        for kind in ("whole", "killed", "reverse")
    )
    finish(whole)
    published: list[str] = []
    publish = Task.publish

    def noted(self: Task, key: str, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
        published.append(key)
        publish(self, key, tensors, about)

    monkeypatch.setattr(Task, "publish", noted)
    for count in (1, 2):
        try:
            prune(killed, until(count, published))
        except Killed:
            assert len(published) == count
    finish(killed)
    assert len(published) == len(set(published)) >= (1 if name == "wanda" else 3), "one of each"
    finish(reverse, backwards)
    assert weights(store, killed.out) == weights(store, whole.out) == weights(store, reverse.out)
    assert not (Path(store.fetch(killed.out)) / "checkpoints").exists()


def test_a_piece_of_another_rank_is_made_again(store: Store) -> None:
    asked = pruning.task(store, DENSE["phi3"], "another", SETTINGS["whitened"], 0.4)
    name = "model.layers.1.mlp.down_proj"
    low_rank.factors(asked, name, 3, metric(asked))
    finish(asked)
    model = loading.load(store.fetch(asked.out))
    assert model.get_submodule(f"{name}.A").weight.shape[0] == spec.mlp_ranks(model)[name] != 3


def test_spread_over_ray_the_bytes_are_the_same(store: Store, cluster: None) -> None:

    one, other = (
        pruning.task(store, DENSE["qwen3"], f"ray.{kind}", SETTINGS["gauge-bias"], 0.4)
        for kind in ("here", "ray")
    )
    with listening() as log_queue:
        assert finish(one)["ranks"] == finish(other, map_on_ray(Execution(), log_queue))["ranks"]
    assert weights(store, one.out) == weights(store, other.out)


def test_masks_are_held_through_a_distillation(store: Store, cluster: None) -> None:
    """One worker with DeepSpeed, in a process of its own."""
    import ray

    from sparsekd_ray.config import Distill
    from sparsekd_ray.distill.loop import Job

    asked = pruning.task(store, DENSE["phi3"], "held", SETTINGS["wanda"], 0.5)
    finish(asked)
    settings = Distill(lr=3e-3, batch=8, validate_every=3, weight_decay=0.1)
    roles = {"student": asked.out, "cache": pruning.cache(store, DENSE["phi3"]), "teacher": DENSE["phi3"]}
    out = Ref("distill", "held", "aa")
    job = Job("held", **roles, corpus=TEXTS, out=out, settings=settings, seed=1, identity={}, inputs={})

    @ray.remote(num_cpus=1)
    def alone() -> None:
        import os

        import torch

        torch.set_num_threads(1)
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(PORT)
        from sparsekd_ray.distill.loop import distill

        distill(job, store, Execution(workers=1))

    PORT = free_port()
    ray.get(alone.remote())
    before, after = (loading.load(store.fetch(ref)) for ref in (asked.out, out))
    assert after.config.sparsekd_mask == "wanda" and store.record(out).metrics["best_step"] > 0
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        assert not torch.equal(old, new), f"{name} was not trained"
        if ".mlp." in name:
            assert torch.equal(old == 0, new == 0)
    assert elements(store.fetch(out), ".mlp.") == elements(store.fetch(asked.out), ".mlp.")


def test_an_energy_stands_for_the_sparsity_at_which_its_ranks_come_out(store: Store) -> None:
    settings = Prune(method="svd-whitened", allocation="energy")
    asked = pruning.task(store, DENSE["phi3"], "energy", settings, 0.5)
    shapes = spec.shapes_from_config(asked.folder())
    ranks = {
        n: svd.energy_rank(torch.from_numpy(low_rank.spectrum(asked, n, metric(asked))), 0.7) for n in shapes
    }
    sparsity = low_rank.sparsity_at(asked, 0.7, map_local, metric(asked))
    planned = low_rank.plan(dataclasses.replace(asked, sparsity=sparsity), map_local, metric(asked))
    assert all(
        planned.ranks[n] == (r if r * sum(shapes[n]) < math.prod(shapes[n]) else None)
        for n, r in ranks.items()
    )
    assert 0 < sparsity < 1 and set(planned.ranks.values()) != {None}
