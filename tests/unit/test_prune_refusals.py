"""What the prune stage refuses, by name, before it leaves anything; and what sdm takes from the teacher's cache."""

from dataclasses import replace
from typing import Any

import pruning
import pytest
import torch
from pruning import DENSE, LOW_RANK, SETTINGS, TEXTS, finish

from sparsekd_ray.errors import ConfigError, ModelError
from sparsekd_ray.model import loading
from sparsekd_ray.prune import calibrate
from sparsekd_ray.prune.run import prune
from sparsekd_ray.prune.task import Task
from sparsekd_ray.runtime.tasks import map_local
from sparsekd_ray.store import Ref, Store
from sparsekd_ray.teacher.forward import tokens

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return pruning.prepare(tmp_path_factory.mktemp("refused"))


@pytest.mark.parametrize(
    "name", ["svd-tiered", "whitened", "neurons", "sdm", "depth-block", "wanda", "magnitude"]
)
@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.down_proj", "model.layers.2.mlp.up_proj"])
def test_weights_that_are_not_finite_are_named(name: str, tensor: str, store: Store) -> None:
    """After the statistics were measured, which would have refused them too."""
    ref = Ref("dense", "broken", tensor[13:].replace(".", "_"))
    sound = pruning.task(store, DENSE["qwen3"], "nan", SETTINGS[name], 1 / 3)
    if store.record(ref) is None:
        model = loading.load(store.fetch(DENSE["qwen3"]))
        model.get_submodule(tensor).weight.data[3, 4] = torch.nan
        with store.building(ref) as out:
            model.save_pretrained(out)
        pruning.commit(store, ref)
    out = Ref("prune", "broken", f"{ref.fingerprint}.{name}")
    asked = replace(sound, model=ref, out=out)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(calibrate, "check", lambda *_: None)
        with pytest.raises(ModelError, match=rf"{tensor}\.weight holds NaN or infinity"):
            prune(asked, map_local)


@pytest.mark.parametrize("name", ["whitened", "svd-optimal", "neurons", "sdm", "depth-block"])
def test_statistics_of_another_model_are_refused(name: str, store: Store) -> None:
    other = pruning.statistics(store, DENSE["phi3"])
    asked = pruning.task(store, DENSE["qwen3"], f"other.{name}", SETTINGS[name], 0.4, statistics=other)
    with pytest.raises(ModelError, match=r"statistics are of the model aaphi3, not of aaqwen3"):
        prune(asked, map_local)


def test_what_a_method_would_cut_in_half_is_refused(store: Store) -> None:
    students = {}
    for name in ("bias", "wanda"):
        asked = pruning.task(store, DENSE["phi3"], f"half.{name}", SETTINGS[name], 0.3)
        finish(asked)
        students[name] = asked.out
    refused = {"bias": r"low-rank already", "wanda": r"masked by wanda"}
    for source, message in refused.items():
        for name in ("neurons", "sdm", "depth-block", "magnitude") + ("wanda",) * (source == "bias"):
            asked = pruning.task(store, DENSE["phi3"], f"half.{source}.{name}", SETTINGS[name], 0.6)
            asked = Task(**vars(asked) | {"model": students[source]})
            with pytest.raises(ModelError, match=message):
                prune(asked, map_local)
    for name in ("svd-tiered", "whitened"):
        for source, message in (("bias", "has biases"), ("wanda", "masked by wanda")):
            asked = pruning.task(store, DENSE["phi3"], f"half.{source}.{name}", SETTINGS[name], 0.6)
            with pytest.raises(ModelError, match=message):
                prune(Task(**vars(asked) | {"model": students[source]}), map_local)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("sparsity", [1e-3, 0.999])
def test_budgets_out_of_reach_are_refused_and_nothing_is_kept(
    name: str, sparsity: float, store: Store
) -> None:
    if name in ("wanda", "magnitude") or (name in LOW_RANK and sparsity < 0.5):
        return  # masks reach any share, and a thousandth is within the tolerance of ranks
    asked = pruning.task(store, DENSE["phi3"], f"reach.{name}.{sparsity}", SETTINGS[name], sparsity)
    with pytest.raises(ConfigError, match=r"ask for a sparsity|whole layers allow"):
        prune(asked, map_local)
    assert not list(store.workdir(asked.out).rglob("*.safetensors"))


def test_a_second_round_cannot_go_back(store: Store) -> None:
    for name in ("svd-tiered", "neurons", "depth-block", "wanda"):
        one = pruning.task(store, DENSE["phi3"], f"forth.{name}", SETTINGS[name], 0.6)
        finish(one)
        two = pruning.task(store, one.out, f"back.{name}", SETTINGS[name], 0.3, dense=DENSE["phi3"])
        with pytest.raises(ConfigError, match=r"sparsity"):
            prune(two, map_local)


def test_sdm_takes_a_cache_of_its_own_text_at_its_temperature(store: Store) -> None:
    def asked(**more: Any) -> Task:
        return pruning.task(store, DENSE["phi3"], "sdm-bad", settings, 0.4, **more)

    settings = SETTINGS["sdm"].model_copy(update={"temperature": 0.75})
    with pytest.raises(ModelError, match=r"temperatures 1, 0.5, 2, not at 0.75"):
        prune(asked(), map_local)
    settings = SETTINGS["sdm"]
    with pytest.raises(ModelError, match="of another corpus"):
        prune(asked(cache=pruning.cache(store, DENSE["phi3"], "elsewhere")), map_local)


def test_sdm_keeps_what_the_cached_teacher_would_miss(store: Store) -> None:
    """The stage against the pure function, with targets taken from logits instead of from the cache."""
    from sparsekd_ray.prune import sdm
    from sparsekd_ray.prune.structured import important_neurons
    from sparsekd_ray.teacher.signal import Target, tempered, topk

    asked = pruning.task(store, DENSE["qwen3"], "sdm-same", SETTINGS["sdm"], 0.4)
    model = loading.load(store.fetch(asked.model))
    ids_BL = tokens(calibrate.sample(store, TEXTS, asked.calibrate))
    with torch.no_grad():
        kept = [topk(model(ids_L[None]).logits[0, :-1], 12, (0.5,)) for ids_L in ids_BL]
    targets = [Target(k.ids_NK, *tempered(k.logprobs_NK, k.log_z_NT[:, 0], 0.5)) for k in kept]
    wanted = sdm.select(model, ids_BL, 27, targets=targets, alpha=0.4)
    assert important_neurons(asked, 27) == [kept_K.tolist() for kept_K in wanted]
