"""The state from which a distillation resumes: the engine's state, the best weights so far, and the history.

A checkpoint is one folder. Every worker writes its own part of the optimiser's state; worker 0 writes the rest.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from typing import TypedDict

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsekd_ray.distill.engine import Engine
from sparsekd_ray.errors import IntegrityError
from sparsekd_ray.runtime import collectives
from sparsekd_ray.store.checkpoints import Checkpoints, tag

logger = logging.getLogger(__name__)

PROGRESS = "progress.json"
BEST = "best.safetensors"


class Validation(TypedDict):
    """One point of a distillation's history."""

    step: int
    tokens: int
    """Tokens of training so far."""
    loss: tuple[float, float]
    """Mean KL and cross-entropy per position in nats, over the steps since the validation before."""
    valid_ppl: float
    valid_domains: dict[str, float]


@dataclass
class Progress:
    """All state of the loop but the engine's; in a checkpoint, one small JSON file that a person can read."""

    world: int
    """Number of workers. The optimiser's state is split for this number."""
    step: int = 0
    best_step: int = 0
    history: list[Validation] = field(default_factory=list)

    @property
    def perplexities(self) -> list[float]:
        return [validation["valid_ppl"] for validation in self.history]


def save(engine: Engine, checkpoints: Checkpoints, progress: Progress, best: dict[str, Tensor]) -> None:
    """Publishes a checkpoint, each worker its own part, and drops the one before it."""
    rank, _ = collectives.rank_and_world()
    folder = checkpoints.folder() / tag(progress.step)
    engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
    if rank == 0:
        save_file(best, folder / BEST)
        (folder / PROGRESS).write_text(json.dumps(asdict(progress)))
    shared = {path for path in folder.iterdir() if "zero_pp_rank_" not in path.name and path.name[0] != "."}
    own = set(folder.glob(f"*zero_pp_rank_{rank}_*"))
    checkpoints.publish(sorted(own | shared if rank == 0 else own))
    collectives.barrier()
    if rank == 0:
        checkpoints.complete(folder.name)
    collectives.barrier()
    checkpoints.forget(before=progress.step)


def resume(title: str, engine: Engine, checkpoints: Checkpoints) -> tuple[Progress, dict[str, Tensor]]:
    """Loads the newest complete checkpoint into the engine; a fresh start where there is none to go on from.

    Returns the progress and, on worker 0 alone, the best weights so far.
    """
    rank, world = collectives.rank_and_world()
    newest = collectives.broadcast(checkpoints.newest())
    if newest is None:
        return _start_over(checkpoints)  # a checkpoint that was never completed may have left parts
    progress = Progress(**json.loads((checkpoints.fetch(newest, PROGRESS) / PROGRESS).read_text()))
    if progress.world != world:
        collectives.barrier()  # until every worker has read the old progress
        if rank == 0:
            logger.warning(
                f"{title}: checkpoint of {progress.world} workers, now {world}: starting this step again"
            )
        return _start_over(checkpoints)
    folder = checkpoints.fetch(newest)
    engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if engine.global_steps != progress.step:
        raise IntegrityError(
            f"{folder}: step {engine.global_steps} loaded, {progress.step} recorded; remove this folder"
        )
    if rank == 0:
        logger.info(f"{title}: resumes at step {progress.step}")
    return progress, load_file(folder / BEST) if rank == 0 else {}


def _start_over(checkpoints: Checkpoints) -> tuple[Progress, dict[str, Tensor]]:
    rank, world = collectives.rank_and_world()
    if rank == 0:
        checkpoints.discard_all()
    collectives.barrier()
    return Progress(world), {}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights in host memory; a tied tensor is one parameter."""
    return {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()}
