"""The calibrate stage: statistics of a model on a sample of the corpus, once, for every pruning method and budget.

The artifact: `layer-000.safetensors`, … (see `statistics.collect`), `stack.safetensors` (see `statistics.stack`) and
`manifest.json`. Groups of layers are tasks that may run anywhere. Each task loads the model, reads all calibration
sequences, so that no sums of two tasks need merging, and publishes a file per layer. The files are the same, byte for
byte, for any number of tasks on one kind of CPU. On a GPU the backward pass of attention may add in another order:
Fisher scalars then differ in their last bits. A layer that was published before a kill is not measured again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsekd_ray import corpus
from sparsekd_ray.config import Calibrate
from sparsekd_ray.errors import ConfigError, CorpusError, IntegrityError, ModelError
from sparsekd_ray.model import loading, spec
from sparsekd_ray.model.mlp import require_finite
from sparsekd_ray.prune import statistics
from sparsekd_ray.runtime.logging import log_progress
from sparsekd_ray.runtime.tasks import TaskMap
from sparsekd_ray.store import Ref, Store
from sparsekd_ray.store.dtype import Dtype, dtype_on, require_one_dtype
from sparsekd_ray.teacher.forward import tokens

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STACK = "stack.safetensors"
TASK_BYTES = 4 * 2**30  # limit of the Gram matrices of one task, unless those of one layer are larger
TOKENS_PER_INPUT = 4  # below which a Gram matrix is too noisy to trust


class Manifest(TypedDict):
    """The measured model, and the text and its amount. `model` and `corpus` are fingerprints."""

    model: str
    corpus: str
    family: str
    hidden: int
    inner: int
    layers: int
    sequences: int
    tokens: int
    samples_sha256: str
    seed: int
    dtype: Dtype


def calibrate(
    model: Ref,
    texts: Ref,
    out: Ref,
    *,
    settings: Calibrate,
    groups: int,
    store: Store,
    gpu: bool,
    task_map: TaskMap,
) -> dict[str, int]:
    """Fills `out`'s working directory with statistics of `model` on training rows of `texts`; returns the metrics.

    groups: the least number of tasks that the layers are shared out to. Raises CorpusError if there are fewer rows than
    `settings.samples`, ConfigError if they hold fewer tokens than the widest matrix has inputs, ModelError for a
    model that is not supported or whose weights or activations are not finite.
    """
    manifest = _manifest(model, texts, settings, store, gpu)
    _check_tokens(manifest)
    require_one_dtype(store, out, manifest["dtype"])
    layers = range(manifest["layers"])
    names = [STACK, *(layer_name(index) for index in layers)]
    done = set(store.published(out))
    todo = [index for index in layers if layer_name(index) not in done]
    if done & set(names):
        logger.info(f"{len(layers) - len(todo)} of {len(layers)} layers are measured already")
    parts = partition(todo, groups, gram_bytes(manifest))
    if STACK not in done:
        parts = [[], *parts]
    left = len(todo)
    for index, _ in task_map(measure, [(store, model, texts, out, settings, gpu, part) for part in parts]):
        left -= len(parts[index])
        log_progress(logger, f"{len(layers) - left}/{len(layers)} layers measured")
    if missing := sorted(set(names) - set(store.published(out))):
        raise IntegrityError(f"calibration ended without {len(missing)} files, the first is {missing[0]}")
    (store.workdir(out) / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
    return {"tokens": manifest["tokens"], "sequences": manifest["sequences"], "layers": manifest["layers"]}


def measure(
    store: Store, model: Ref, texts: Ref, out: Ref, settings: Calibrate, gpu: bool, layers: Sequence[int]
) -> None:
    """One task: measures and publishes these layers, or the stack if it names none."""
    done = set(store.published(out))  # an earlier attempt at this task may have been killed
    todo = [index for index in layers if layer_name(index) not in done]
    if not todo and (layers or STACK in done):
        return
    if not gpu:
        torch.set_num_threads(1)  # always one, because the last bits of a sum depend on the number of threads
    ids_BL = tokens(sample(store, texts, settings))
    # the first task of a machine downloads the weights, the others find them
    directory = store.fetch(model)
    loaded = loading.load(directory, dtype=dtype_on(gpu), device="cuda" if gpu else "cpu")
    for name, tensor in loaded.state_dict().items():
        require_finite(name, tensor)
    if not todo:
        _publish(store, out, STACK, statistics.stack(loaded, ids_BL))
        return
    measured = statistics.collect(loaded, ids_BL, todo)
    for index in todo:
        _publish(store, out, layer_name(index), measured.pop(index))


def partition(layers: Sequence[int], groups: int, layer_bytes: int) -> list[list[int]]:
    """Consecutive layers in `groups` nearly equal parts, or in more where a part would exceed `TASK_BYTES`."""
    most = max(1, TASK_BYTES // layer_bytes)
    count = min(len(layers), max(groups, math.ceil(len(layers) / most)))
    return [part.tolist() for part in np.array_split(np.array(layers, dtype=int), count)] if count else []


def gram_bytes(manifest: Manifest) -> int:
    """Memory of one layer's Gram matrices."""
    return 4 * (manifest["hidden"] ** 2 + manifest["inner"] ** 2)


def sample(store: Store, texts: Ref, settings: Calibrate) -> pa.Table:
    """The calibration rows: drawn without replacement from the training rows of all domains, in the corpus's order."""
    table = corpus.read_rows(store.fetch(texts), "train")
    if table.num_rows < settings.samples:
        raise CorpusError(
            f"calibrate.samples is {settings.samples}, the corpus has {table.num_rows} training sequences: "
            "lower calibrate.samples, or raise corpus.samples"
        )
    rows = table.take(sample_indices(table.num_rows, settings)).combine_chunks()
    lengths_B = np.diff(rows["input_ids"].combine_chunks().offsets.to_numpy())
    if (odd := np.flatnonzero(lengths_B != lengths_B[0])).size:
        raise CorpusError(
            f"sample {rows['sample_id'][int(odd[0])]} has {lengths_B[odd[0]]} tokens, the first one {lengths_B[0]}: "
            "statistics need sequences of one length; build the corpus again"
        )
    return rows


def sample_indices(rows: int, settings: Calibrate) -> np.ndarray:
    """The indices of the calibration rows among `rows` training rows, rising."""
    generator = np.random.default_rng(settings.seed)
    return np.sort(generator.choice(rows, settings.samples, replace=False))


def layer_name(index: int) -> str:
    return f"layer-{index:03d}.safetensors"


def read(folder: Path) -> Manifest:
    """The manifest of a statistics artifact."""
    manifest: Manifest = json.loads((folder / MANIFEST).read_text())
    return manifest


def layer(folder: Path, index: int) -> dict[str, Tensor]:
    """One layer's statistics, fp32 in host memory, by the names of `statistics.collect`."""
    return load_file(folder / layer_name(index))


def stack(folder: Path) -> dict[str, Tensor]:
    """`angle` and `influence` of the whole stack, as in `statistics.stack`."""
    return load_file(folder / STACK)


def check(manifest: Manifest, model_fingerprint: str) -> None:
    """ModelError unless the statistics are of the model with this fingerprint."""
    if manifest["model"] != model_fingerprint:
        raise ModelError(
            f"the statistics are of the model {manifest['model']}, not of {model_fingerprint}: a model is pruned "
            "by its own statistics; calibrate this model"
        )


def _manifest(model: Ref, texts: Ref, settings: Calibrate, store: Store, gpu: bool) -> Manifest:
    values = spec.config_dict(store.fetch(model, ["config.json"]))
    family, rows = spec.check_supported(values), sample(store, texts, settings)
    hidden, inner, layers = spec.sizes(values, "hidden_size", "intermediate_size", "num_hidden_layers")
    count, length = tokens(rows).shape
    names = "\n".join(rows["sample_id"].to_pylist())
    return {
        "model": model.fingerprint,
        "corpus": texts.fingerprint,
        "family": family,
        "hidden": hidden,
        "inner": inner,
        "layers": layers,
        "sequences": count,
        "tokens": count * length,
        "samples_sha256": hashlib.sha256(names.encode()).hexdigest(),
        "seed": settings.seed,
        "dtype": dtype_on(gpu),
    }


def _check_tokens(manifest: Manifest) -> None:
    """ConfigError for fewer tokens than inputs, because the Gram matrix is then singular for lack of text."""
    inputs, tokens_read = max(manifest["hidden"], manifest["inner"]), manifest["tokens"]
    length = tokens_read // manifest["sequences"]
    counts = (
        f"calibrate.samples {manifest['sequences']} × {length} tokens = {tokens_read:,} tokens, the widest matrix has "
        f"{inputs:,} inputs"
    )
    advice = f"set calibrate.samples to {math.ceil(TOKENS_PER_INPUT * inputs / length)} or more"
    if tokens_read < inputs:
        raise ConfigError(
            f"{counts}: at least as many tokens as inputs are needed, better {TOKENS_PER_INPUT} times as many; {advice}"
        )
    if tokens_read < TOKENS_PER_INPUT * inputs:
        logger.warning(
            f"{counts}, fewer than {TOKENS_PER_INPUT} tokens per input: the statistics are noisy; {advice}"
        )


def _publish(store: Store, out: Ref, name: str, tensors: dict[str, Tensor]) -> None:
    if store.record(out) is not None or store.pull(out, name):  # another attempt was faster
        return
    with store.publishing(out, name) as path:
        save_file({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, path)
