"""One worker of a distillation: read the teacher's shards, step, validate, checkpoint, stop, save.

All workers run this same function over the same list of jobs, so one worker group serves several distillations.
ZeRO averages gradients over workers; each worker's loss is therefore (workers / N) · Σ over its own positions, N being
the step's positions over all workers, so that whatever the split, the gradient is that of the global mean.

A checkpoint is written at every validation after which training goes on: the DeepSpeed state of
every worker, the best weights so far, and the history that decides when to stop. Resuming continues bit for bit.

Shapes: B sequences, L tokens, K kept ids.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sparsekd_ray import corpus
from sparsekd_ray.config import Distill, Execution
from sparsekd_ray.distill import schedule
from sparsekd_ray.distill.loss import kd_loss
from sparsekd_ray.distill.reader import SampleReader
from sparsekd_ray.errors import IntegrityError, ModelError
from sparsekd_ray.evaluate.perplexity import perplexity, window_nll, windows
from sparsekd_ray.model import head, loading, masks, saving
from sparsekd_ray.runtime import collectives
from sparsekd_ray.store import Ref, Store
from sparsekd_ray.store.checkpoints import Checkpoints, tag
from sparsekd_ray.teacher.manifest import CacheManifest
from sparsekd_ray.teacher.signal import Target

logger = logging.getLogger(__name__)

PROGRESS = "progress.json"


@dataclass(frozen=True)
class Job:
    """One distillation of `student` into `out`, on the `cache` of `teacher`, validated on `corpus`."""

    title: str
    student: Ref
    cache: Ref
    teacher: Ref
    corpus: Ref
    out: Ref
    settings: Distill
    seed: int
    identity: dict[str, Any]
    inputs: dict[str, str]


@dataclass
class Progress:
    """All state of the loop beside the engine's: one small JSON file, readable by eye."""

    step: int
    world: int
    best_step: int
    history: list[dict[str, Any]]

    @property
    def perplexities(self) -> list[float]:
        return [point["valid_ppl"] for point in self.history]


class Student(nn.Module):
    """A causal language model whose forward pass is the distillation loss; it owns the head the loss needs."""

    def __init__(self, model: Any, settings: Distill) -> None:
        super().__init__()
        self.model, self.settings = model, settings

    def forward(
        self, input_ids_BL: torch.Tensor, labels_N: torch.Tensor, target: Target, positions: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss to differentiate, Σ KL and Σ CE; `positions` is the number of predictions of the whole step."""
        hidden_BLD = head.hidden_states(self.model, input_ids_BL)[:, :-1]
        return kd_loss(
            hidden_BLD.flatten(0, 1),
            head.weight(self.model),
            labels_N,
            target,
            temperature=self.settings.temperature,
            kl_weight=self.settings.alpha / positions,
            ce_weight=(1 - self.settings.alpha) / positions,
        )


def distill(job: Job, store: Store, execution: Execution) -> None:
    """Runs one job on this worker, in step with the others; worker 0 commits the student."""
    rank, world = collectives.rank_and_world()
    started, settings = time.monotonic(), job.settings
    torch.manual_seed(job.seed)
    reader = SampleReader(store, job.cache, settings.temperature)
    source, texts = store.fetch(job.student), store.fetch(job.corpus)
    valid = corpus.domain_streams(texts, "valid")
    model = loading.load(source)
    _check(reader.manifest, model.config.vocab_size, corpus.read_manifest(texts), job)
    _freeze(model, settings)
    zeros = masks.freeze_zeros(model)
    if execution.recompute:
        model.activation_checkpointing_enable()
    steps = schedule.total_steps(reader.samples, settings.batch, settings.epochs)
    sizes = schedule.micro_batches(settings.batch, world, execution.micro_batch)
    engine = _engine(Student(model, settings), settings, execution, len(sizes[0]))
    kept = Checkpoints(store, job.out)
    progress, best = _resume(job, engine, kept) or (Progress(0, world, 0, []), {})

    def over() -> bool:
        stop = schedule.verdict(progress.perplexities, settings.patience, settings.min_gain)
        return progress.step == steps or stop is not None

    def validate(losses: list[float]) -> None:
        nonlocal best
        point = _validate(model, valid, reader.seq_len) | {"step": progress.step, "loss": losses}
        progress.history.append(point | {"tokens": progress.step * settings.batch * (reader.seq_len - 1)})
        if not math.isfinite(point["valid_ppl"]):
            raise ModelError(
                f"{job.title} diverged: validation perplexity {point['valid_ppl']} at step {progress.step}, learning "
                f"rate {settings.lr:g}. Lower distill.lr, or the round's lr; what was finished before is intact."
            )
        if rank == 0:
            logger.info(_line(job.title, progress, steps, settings, started))
        if point["valid_ppl"] == min(progress.perplexities):
            progress.best_step = progress.step
            best = _weights(model) if rank == 0 else {}

    if not progress.history:
        validate([0.0, 0.0])
    model.train()  # as after a validation, which a resumed run has not just had
    sums = torch.zeros(2, dtype=torch.float64)
    while not over():
        sums += _step(engine, reader, job, progress.step, steps, sizes, rank)
        progress.step += 1
        if progress.step % settings.validate_every == 0 or progress.step == steps:
            since = progress.step - progress.history[-1]["step"]
            validate((collectives.total(sums) / (since * settings.batch * (reader.seq_len - 1))).tolist())
            sums.zero_()
            if not over():
                _save(engine, kept, progress, best)
    collectives.barrier()
    if rank == 0:
        for name, parameter in model.named_parameters():
            parameter.data.copy_(best[name])
        if lost := masks.changed_zeros(model, zeros):
            raise ModelError(
                f"{job.title}: training moved masked weights off zero, {lost}; nothing was committed"
            )
        _commit(job, store, model, source, progress, steps, time.monotonic() - started)
    engine.destroy()
    collectives.barrier()
    kept.forget()


def _step(
    engine: Any, reader: SampleReader, job: Job, step: int, steps: int, sizes: list[list[int]], rank: int
) -> torch.Tensor:
    """One optimiser step; returns this worker's Σ KL and Σ CE."""
    settings = job.settings
    for group in engine.optimizer.param_groups:
        group["lr"] = schedule.learning_rate(step, steps, settings.lr, settings.warmup)
    samples = schedule.batch_at(step, settings.batch, reader.shard_rows, job.seed)
    positions = settings.batch * (reader.seq_len - 1)
    cursor = sum(sum(worker) for worker in sizes[:rank])
    sums = torch.zeros(2, dtype=torch.float64)
    for size in sizes[rank]:
        # an empty share still takes part in the collectives: one row, no label counted
        rows = samples[cursor : cursor + size] or samples[:1]
        cursor += size
        batch = reader.batch(rows, engine.device)
        labels_N = batch.labels_N if size else torch.full_like(batch.labels_N, -1)
        loss, kl, ce = engine(batch.input_ids_BL, labels_N, batch.target, positions)
        # ZeRO divides by the number of workers, `positions` has already divided by everything else
        engine.backward(loss * len(sizes), scale_wrt_gas=False)
        engine.step()
        sums += torch.stack([kl, ce]).double().cpu()
    return sums


def _engine(student: Student, settings: Distill, execution: Execution, micro_steps: int) -> Any:
    os.environ["DS_ACCELERATOR"] = "cuda" if execution.gpus else "cpu"
    import deepspeed

    # on a CPU this op would be compiled for 90 seconds at the first start; gloo does its work
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    zero: dict[str, Any] = {"stage": execution.zero_stage}
    if execution.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    optimizer = {"lr": settings.lr, "weight_decay": settings.weight_decay, "betas": [0.9, 0.95]}
    options = {
        "train_micro_batch_size_per_gpu": execution.micro_batch,
        "gradient_accumulation_steps": micro_steps,
        "gradient_clipping": settings.grad_clip,
        "zero_optimization": zero,
        "bf16": {"enabled": execution.gpus},
        "optimizer": {"type": "AdamW", "params": optimizer | {"torch_adam": not execution.offload}},
        "steps_per_print": 10**9,
    }
    trained = [p for p in student.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=student, model_parameters=trained, config=options)
    return engine


def _check(manifest: CacheManifest, vocab_size: int, texts: corpus.Manifest, job: Job) -> None:
    """Refuses a cache that does not belong to this student, its teacher and its text, or lacks the temperature."""
    manifest.require(
        tokenizer_hash=texts["tokenizer_hash"],
        vocab_size=vocab_size,
        teacher=job.teacher.fingerprint,
        corpus=job.corpus.fingerprint,
    )
    manifest.normaliser_index(job.settings.temperature)


def _freeze(model: Any, settings: Distill) -> None:
    if not settings.train_embeddings:
        model.get_input_embeddings().requires_grad_(False)
        model.get_output_embeddings().requires_grad_(False)


def _validate(model: Any, streams: dict[str, Any], seq_len: int) -> dict[str, Any]:
    """Perplexity on disjoint windows, shared out over the workers; the same figure on all of them."""
    rank, world = collectives.rank_and_world()
    model.eval()
    sums = torch.zeros(len(streams), 2, dtype=torch.float64)
    for row, stream in enumerate(streams.values()):
        share = windows(stream, seq_len, seq_len)[rank::world]
        scored = sum(window.scored for window in share)
        sums[row] = torch.tensor([math.fsum(window_nll(model, share)), scored], dtype=torch.float64)
    model.train()
    nll, counts = collectives.total(sums).T.tolist()
    domains = {d: perplexity([part], n) for d, part, n in zip(streams, nll, counts, strict=True)}
    return {"valid_ppl": perplexity(nll, sum(counts)), "valid_domains": domains}


def _save(engine: Any, kept: Checkpoints, progress: Progress, best: dict[str, torch.Tensor]) -> None:
    """Publishes a checkpoint, each worker its own part, and drops the one before it."""
    rank, _ = collectives.rank_and_world()
    folder = kept.folder() / tag(progress.step)
    engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
    if rank == 0:
        save_file(best, folder / "best.safetensors")
        (folder / PROGRESS).write_text(json.dumps(vars(progress)))
    of_all = {path for path in folder.iterdir() if "zero_pp_rank_" not in path.name and path.name[0] != "."}
    own = set(folder.glob(f"*zero_pp_rank_{rank}_*"))
    kept.publish(sorted(own | of_all if rank == 0 else own))
    collectives.barrier()
    if rank == 0:
        kept.complete(folder.name)
    collectives.barrier()
    kept.forget(before=progress.step)


def _resume(job: Job, engine: Any, kept: Checkpoints) -> tuple[Progress, dict[str, torch.Tensor]] | None:
    """Loads the newest complete checkpoint into the engine; None where there is none to continue from."""
    rank, world = collectives.rank_and_world()
    newest = collectives.broadcast(kept.newest())
    if newest is None:
        if rank == 0:
            kept.discard_all()  # parts of one that was never completed
        collectives.barrier()
        return None
    progress = Progress(**json.loads((kept.fetch(newest, PROGRESS) / PROGRESS).read_text()))
    if progress.world != world:
        # optimiser states are cut for a number of workers
        collectives.barrier()  # all have read why
        if rank == 0:
            logger.info(
                f"{job.title}: checkpoint of {progress.world} workers, now {world}: starting this step again"
            )
            kept.discard_all()
        collectives.barrier()
        return None
    folder = kept.fetch(newest)
    engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if engine.global_steps != progress.step:
        raise IntegrityError(
            f"{folder}: step {engine.global_steps} loaded, {progress.step} recorded; remove this folder"
        )
    if rank == 0:
        logger.info(f"{job.title}: resumes at step {progress.step}")
    return progress, load_file(folder / "best.safetensors")


def _commit(
    job: Job, store: Store, model: Any, source: Path, progress: Progress, steps: int, seconds: float
) -> None:
    out = store.workdir(job.out)
    saving.save(model, source, out, f"A student of sparsekd-ray, step `{job.title}`, before export.\n")
    settings = job.settings
    stopped = schedule.verdict(progress.perplexities, settings.patience, settings.min_gain) or "budget"
    metrics = {
        "steps": progress.step,
        "planned_steps": steps,
        "trained_tokens": progress.history[-1]["tokens"],
        "best_step": progress.best_step,
        "valid_ppl": min(progress.perplexities),
        "stopped": stopped,
        "history": progress.history,
    }
    store.commit(job.out, identity=job.identity, inputs=job.inputs, metrics=metrics, seconds=seconds)


def _weights(model: Any) -> dict[str, torch.Tensor]:
    """A copy of the weights in host memory; a tied tensor is one parameter."""
    return {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()}


def _line(title: str, progress: Progress, steps: int, settings: Distill, started: float) -> str:
    point = progress.history[-1]
    lr = schedule.learning_rate(max(0, progress.step - 1), steps, settings.lr, settings.warmup)
    rate = point["tokens"] / (time.monotonic() - started)
    kl, ce = point["loss"]
    return (
        f"{title}: step {progress.step}/{steps}  KL {kl:.3f}  CE {ce:.3f}  lr {lr:.1e}  "
        f"valid ppl {point['valid_ppl']:.2f}  {rate:,.0f} tokens/s"
    )
