"""Speeds of every student against the dense model. One task times them on a worker, because it has the GPU."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

from sparsekd_ray.config import Config
from sparsekd_ray.store import Ref, Store
from sparsekd_ray.store.dtype import dtype_on

logger = logging.getLogger(__name__)

PROMPT, NEW_TOKENS, REPEATS = 128, 32, 7


class Speeds(NamedTuple):
    """Figures of the dense model, then of each student, by the names of a comparison's columns."""

    device: str
    figures: list[dict[str, float]]


def measure(config: Config, store: Store, dense: Ref, students: Sequence[tuple[str, Ref]]) -> Speeds:
    """Times students, given by name, against the dense model. Connects to Ray."""
    from sparsekd_ray.runtime.cluster import connected
    from sparsekd_ray.runtime.logging import listening
    from sparsekd_ray.runtime.tasks import map_on_ray

    with connected(config.execution), listening() as log_queue:
        task_map = map_on_ray(config.execution, log_queue)
        ((_, speeds),) = task_map(timed, [(store, dense, list(students), config.execution.gpus)])
    assert isinstance(speeds, Speeds)
    return speeds


def timed(store: Store, dense: Ref, students: Sequence[tuple[str, Ref]], gpu: bool) -> Speeds:
    """The task. It times one student at a time, since two models that run at once slow each other down."""
    import torch

    from sparsekd_ray.evaluate import speed
    from sparsekd_ray.model import loading

    place = {"device": "cuda" if gpu else "cpu", "dtype": dtype_on(gpu)}
    reference = loading.load(store.fetch(dense), **place)
    context = reference.config.max_position_embeddings
    new_tokens = min(NEW_TOKENS, context // 2)
    prompt = min(PROMPT, context - new_tokens)
    figures = [{"flops_per_token": speed.flops_per_token(reference, prompt)}]
    for name, ref in students:
        student = loading.load(store.fetch(ref), **place)
        row = speed.compare(reference, student, prompt=prompt, new_tokens=new_tokens, repeats=REPEATS)
        figures.append({"flops_per_token": speed.flops_per_token(student, prompt)} | row)
        logger.info(
            f"speed of {name}: prefill {row['prefill_speedup']:.2f} ×, decode {row['decode_speedup']:.2f} ×"
        )
    return Speeds(torch.cuda.get_device_name() if gpu else "cpu", figures)
