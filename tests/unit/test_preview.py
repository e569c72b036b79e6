"""The table of a pruning against the pruning itself: what it says each matrix becomes is what the files hold."""

from pathlib import Path

import pruning
import pytest
import torch
from models import FAMILIES
from pruning import DENSE, PREDICTED, SETTINGS, elements, finish

from sparsekd_ray.errors import ModelError
from sparsekd_ray.model import spec
from sparsekd_ray.prune import preview
from sparsekd_ray.prune.task import Task
from sparsekd_ray.runtime.tasks import map_local
from sparsekd_ray.store import Store

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return pruning.prepare(tmp_path_factory.mktemp("previewed"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SETTINGS)
def test_the_table_is_what_the_pruning_does(name: str, family: str, store: Store) -> None:
    asked = pruning.task(store, DENSE[family], f"{family}.{name}", SETTINGS[name], 1 / 3)
    rows = preview.table(asked, map_local)
    made = Path(store.workdir(asked.out)).glob("**/*.safetensors")
    assert all(path.name.endswith(".spectrum.safetensors") for path in made), (
        "spectra are kept, no model is made"
    )
    total, facts = preview.total(rows), finish(asked)
    assert total.parameters == facts["mlp_params"] and total.dense == asked.dense_mlp_params
    assert total.becomes == f"−{facts['sparsity']:.2%}"
    if name in PREDICTED:
        assert total.predicted_loss == pytest.approx(facts["predicted_loss"])
    else:
        assert total.predicted_loss is None
    for row in rows if asked.settings.method not in ("depth", "wanda", "magnitude") else ():
        parts = [row.matrix]
        if family == "qwen3" and row.becomes == "dense":  # a joint name, where both stay
            parts += [row.matrix.replace("gate_up", part) for part in ("gate", "up")]
        found = sum(elements(store.fetch(asked.out), f"{part}.")[0] for part in dict.fromkeys(parts))
        assert row.parameters == found, row


@pytest.mark.parametrize("storage", ["factors", "gauge"])
def test_the_table_of_a_second_round(storage: str, store: Store) -> None:
    settings = SETTINGS["whitened"].model_copy(update={"storage": storage})
    one = pruning.task(store, DENSE["phi3"], f"one.{storage}", settings, 0.3)
    finish(one)
    two = pruning.task(store, one.out, f"two.{storage}", settings, 0.5, dense=DENSE["phi3"])
    rows = preview.table(two, map_local)
    assert preview.total(rows).parameters == finish(two)["mlp_params"]
    ranks = spec.mlp_ranks(store.fetch(two.out))
    assert {row.matrix: row.becomes for row in rows} == {
        row.matrix: f"rank {ranks[row.matrix]}" if row.matrix in ranks else "dense" for row in rows
    }


def test_the_table_refuses_what_the_pruning_would(store: Store) -> None:
    one = pruning.task(store, DENSE["phi3"], "low-rank", SETTINGS["svd-tiered"], 0.3)
    finish(one)
    two = pruning.task(store, DENSE["phi3"], "after", SETTINGS["neurons"], 0.5)
    with pytest.raises(ModelError, match="low-rank already"):
        preview.table(Task(**vars(two) | {"model": one.out}), map_local)
