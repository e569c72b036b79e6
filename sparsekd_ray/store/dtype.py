"""The one dtype in which all files of an unfinished artifact are computed.

Where a step runs is no part of its identity, so a step that was killed on a CPU may be resumed on a GPU, which computes
in bfloat16. Its files would be of two kinds under a manifest that names one.
"""

from __future__ import annotations

import json
from typing import Literal

from sparsekd_ray.errors import ConfigError
from sparsekd_ray.store.artifacts import CHECKPOINTS, Store
from sparsekd_ray.store.record import Ref

Dtype = Literal["float32", "bfloat16"]
FILE = f"{CHECKPOINTS}/dtype.json"
GPUS: dict[Dtype, str] = {"float32": "false", "bfloat16": "true"}
"""The value of `execution.gpus` that computes in each dtype."""


def dtype_on(gpu: bool) -> Dtype:
    """Type of the weights while a model is run."""
    return "bfloat16" if gpu else "float32"


def require_one_dtype(store: Store, out: Ref, dtype: Dtype) -> None:
    """Publishes the dtype of `out` before its first file. ConfigError where files in another dtype are published."""
    published = store.pull(out, FILE)
    if published is None or store.published(out) == [FILE]:
        store.discard(out, FILE)
        with store.publishing(out, FILE) as path:
            path.write_text(json.dumps(dtype))
        return
    begun: Dtype = json.loads(published.read_text())
    if begun != dtype:
        raise ConfigError(
            f"{store.url(out.key)} was begun in {begun} and would go on in {dtype}; its files must all be of one kind. "
            f"Go on with execution.gpus {GPUS[begun]}, or delete this directory to begin again in {dtype}"
        )
