"""A store with tiny dense models of both families, a corpus, and on demand statistics and teacher caches of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from manifests import cache_manifest
from models import VOCABULARY, dense_directory
from safetensors import safe_open

from sparsekd_ray.config import Calibrate, Prune
from sparsekd_ray.corpus.shards import MANIFEST, domain_table, read_shard, write_shards
from sparsekd_ray.model import loading, spec
from sparsekd_ray.prune import calibrate
from sparsekd_ray.prune.methods import METHODS
from sparsekd_ray.prune.run import prune
from sparsekd_ray.prune.task import Task
from sparsekd_ray.runtime.tasks import TaskMap, map_local
from sparsekd_ray.store import Ref, Store
from sparsekd_ray.teacher import shards
from sparsekd_ray.teacher.forward import Forward

TEXTS = Ref("corpus", "prose", "bb22")
DENSE = {family: Ref("dense", family, f"aa{family}") for family in ("phi3", "qwen3")}
CALIBRATE = Calibrate(samples=16)
ROWS, LENGTH, SHARD_ROWS, TEMPERATURES = 48, 32, 16, [0.5, 2.0]

WHITENED = Prune(method="svd-whitened", allocation="optimal")
SETTINGS = {
    "svd-tiered": Prune(method="svd"),
    "svd-optimal": Prune(method="svd", allocation="optimal"),
    "whitened": WHITENED,
    "whitened-energy": Prune(method="svd-whitened", allocation="energy", align=2),
    "gauge": WHITENED.model_copy(update={"storage": "gauge"}),
    "bias": WHITENED.model_copy(update={"bias": True}),
    "gauge-bias": WHITENED.model_copy(update={"storage": "gauge", "bias": True}),
    "neurons": Prune(method="neurons"),
    "neurons-leverage": Prune(method="neurons", score="leverage"),
    "sdm": Prune(method="sdm"),
    "depth-block": Prune(method="depth"),
    "depth-influence": Prune(method="depth", drop="influence"),
    "wanda": Prune(method="wanda"),
    "magnitude": Prune(method="magnitude"),
}
LOW_RANK = [name for name, settings in SETTINGS.items() if settings.method.startswith("svd")]
PREDICTED = [name for name in LOW_RANK if name != "svd-tiered"]


def prepare(root: Path) -> Store:
    store = Store(str(root))
    random = np.random.default_rng(0)
    rows = {split: random.integers(6, VOCABULARY, (n, LENGTH), dtype=np.int32)
            for split, n in (("train", ROWS), ("valid", 4), ("test", 8))}  # fmt: skip
    manifest = {"seq_len": LENGTH, "vocab_size": VOCABULARY, "tokenizer_hash": "dd", "shard_rows": SHARD_ROWS}
    with store.building(TEXTS) as out:
        for split, rows_NL in rows.items():
            write_shards(domain_table("prose", split, rows_NL), out / split, SHARD_ROWS)
        (out / MANIFEST).write_text(json.dumps(manifest | {"rows": {"train": {"prose": ROWS}}}))
    commit(store, TEXTS)
    for family, ref in DENSE.items():
        with store.building(ref) as out:
            dense_directory(out, family, tied=family == "phi3", head_dim=8)
        commit(store, ref)
    return store


def commit(store: Store, ref: Ref, **metrics: Any) -> Ref:
    store.commit(ref, identity={}, inputs={}, metrics=metrics, seconds=0)
    return ref


def statistics(store: Store, model: Ref) -> Ref:
    """Of this model, measured at the first call."""
    out = Ref("statistics", model.name, model.fingerprint)
    if store.record(out) is None:
        settings = {"settings": CALIBRATE, "groups": 1, "gpu": False}
        run: dict[str, Any] = {"store": store, "task_map": map_local}
        commit(store, out, **calibrate.calibrate(model, TEXTS, out, **settings, **run))
    return out


def cache(store: Store, model: Ref, corpus: str = TEXTS.fingerprint) -> Ref:
    """What this model says of the corpus, as a capture leaves it."""
    out = Ref("cache", model.name, model.fingerprint + corpus)
    if store.record(out) is None:
        manifest = cache_manifest(
            k=12, temperatures=tuple(TEMPERATURES), vocab_size=VOCABULARY, tokenizer_hash="dd", corpus=corpus,
            teacher=model.fingerprint, seq_len=LENGTH, shard_rows=(SHARD_ROWS,) * (ROWS // SHARD_ROWS), rows=ROWS,
        )  # fmt: skip
        teacher = Forward(loading.load(store.fetch(model)))
        with store.building(out) as folder:
            for path in sorted((store.fetch(TEXTS) / "train").iterdir()):
                rows = read_shard(path)
                shards.write(folder / path.name, rows, teacher.signal(rows, manifest), manifest)
            manifest.write(folder)
        commit(store, out)
    return out


def task(
    store: Store,
    model: Ref,
    name: str,
    settings: Prune,
    sparsity: float,
    dense: Ref | None = None,
    **more: Any,
) -> Task:
    """With all inputs that the cascade would give the method; `dense` is the model that sparsity is of."""
    inputs: dict[str, Any] = {}
    needed = METHODS[settings.method].inputs_for(settings)
    if "statistics" in needed:
        inputs["statistics"] = statistics(store, model)
    if "texts" in needed:
        inputs |= {"texts": TEXTS, "calibrate": CALIBRATE}
    if "cache" in needed:
        inputs["cache"] = cache(store, dense or model)
    out = Ref("prune", settings.method, name)
    size = spec.mlp_parameters(store.fetch(dense or model))
    return Task(store, model, out, settings, sparsity, size, **inputs | more)


def finish(asked: Task, task_map: TaskMap = map_local) -> dict[str, Any]:
    """Prunes and commits; the facts."""
    facts = prune(asked, task_map)
    commit(asked.store, asked.out, **facts)
    return facts


def elements(path: Path, part: str = "") -> tuple[int, int]:
    """Elements of the tensors on disk whose names hold `part`, and how many are not zero; no permutations."""
    count = other = 0
    for file in path.glob("*.safetensors"):
        with safe_open(file, "np") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if part in name and not name.endswith(".order"):
                    tensor = tensors.get_tensor(name)
                    count, other = count + tensor.size, other + int(np.count_nonzero(tensor))
    return count, other
