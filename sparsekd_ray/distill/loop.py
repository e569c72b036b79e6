"""One worker of a distillation: read the teacher's shards, step, validate, checkpoint, stop, save.

All workers run this same function over the same list of jobs, so one worker group serves several distillations.
ZeRO averages gradients over workers. Each worker's loss is therefore (workers / N) · Σ over its own positions, where N
is the number of the step's positions over all workers. So the gradient is that of the global mean, whatever the split.

A checkpoint is written at every validation after which training goes on. A resumed run continues bit for bit.
"""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsekd_ray import corpus
from sparsekd_ray.config import Distill, Execution
from sparsekd_ray.distill import figures, schedule, state
from sparsekd_ray.distill.engine import Student, start_engine
from sparsekd_ray.distill.job import Job, Training
from sparsekd_ray.distill.reader import SampleReader
from sparsekd_ray.distill.state import Validation
from sparsekd_ray.errors import ModelError
from sparsekd_ray.model import head, loading, masks, saving
from sparsekd_ray.runtime import collectives, metrics
from sparsekd_ray.runtime.logging import log_progress
from sparsekd_ray.store import Store
from sparsekd_ray.store.checkpoints import Checkpoints
from sparsekd_ray.teacher.manifest import CacheManifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def distill(job: Job, store: Store, execution: Execution) -> None:
    """Runs one job on this worker, in step with the others; worker 0 commits the student.

    ModelError where the cache belongs to another student, teacher or text, or where training diverges.
    """
    checkpoints = Checkpoints(store, job.out)
    training = _begin(job, store, execution, checkpoints)
    _train(training, checkpoints)
    collectives.barrier()
    if collectives.rank_and_world()[0] == 0:
        _commit(training, store)
    training.engine.destroy()
    collectives.barrier()
    checkpoints.forget()


def _begin(job: Job, store: Store, execution: Execution, checkpoints: Checkpoints) -> Training:
    """Loads model, text and cache, checks that they belong together, and resumes from the newest checkpoint."""
    started, settings = time.monotonic(), job.settings
    torch.manual_seed(job.seed)
    texts, model = store.fetch(job.corpus), loading.load(store.fetch(job.student))
    reader = SampleReader(store, job.cache, settings.temperature)
    _check(reader.manifest, model.config.vocab_size, corpus.read_manifest(texts)["tokenizer_hash"], job)
    _freeze(model, settings)
    zeros = masks.freeze_zeros(model)
    if execution.recompute:
        model.activation_checkpointing_enable()
    _, world = collectives.rank_and_world()
    sizes = schedule.micro_batches(settings.batch, world, execution.micro_batch)
    engine = start_engine(Student(model, settings), settings, execution, len(sizes[0]))
    progress, best = state.resume(job.title, engine, checkpoints)
    return Training(
        job=job,
        reader=reader,
        valid=corpus.domain_streams(texts, "valid"),
        model=model,
        zeros=zeros,
        engine=engine,
        steps=schedule.total_steps(reader.samples, settings.batch, settings.epochs),
        sizes=sizes,
        progress=progress,
        best=best,
        first_step=progress.step,
        started=started,
    )


def _check(manifest: CacheManifest, vocab_size: int, tokenizer_hash: str, job: Job) -> None:
    """ModelError for a cache that belongs to another student, teacher or text, or lacks the temperature."""
    manifest.require(
        tokenizer_hash=tokenizer_hash,
        vocab_size=vocab_size,
        teacher=job.teacher.fingerprint,
        corpus=job.corpus.fingerprint,
    )
    manifest.normaliser_index(job.settings.temperature)


def _freeze(model: PreTrainedModel, settings: Distill) -> None:
    if not settings.train_embeddings:
        model.get_input_embeddings().requires_grad_(False)
        head.weight(model).requires_grad_(False)


def _train(training: Training, checkpoints: Checkpoints) -> None:
    """Steps until the budget is spent or a validation ends it; leaves the best weights in `training.best`."""
    progress, interval = training.progress, metrics.log_interval(training.steps)
    if not progress.history:
        figures.log_row(training, _validate(training, (0.0, 0.0)))
    own = torch.zeros(2, dtype=torch.float64)  # this worker's Σ KL and Σ CE since the last row
    since_validation = torch.zeros(2, dtype=torch.float64)  # all workers' sums since the last validation
    training.model.train()  # a resumed run has had no validation that would set this mode
    row_step, row_time = progress.step, time.monotonic()
    while not training.over:
        own += _step(training)
        progress.step += 1
        validates = (
            progress.step % training.job.settings.validate_every == 0 or progress.step == training.steps
        )
        if not validates and progress.step % interval:
            continue
        sums, seconds = collectives.total(own), time.monotonic() - row_time
        count = (progress.step - row_step) * training.positions
        row: dict[str, object] = figures.loss_figures(sums, count) | {"tokens_per_s": count / seconds}
        since_validation += sums
        if validates:
            count = (progress.step - progress.history[-1]["step"]) * training.positions
            kl, ce = (since_validation / count).tolist()
            row |= _validate(training, (kl, ce))
            since_validation.zero_()
        figures.log_row(training, row)
        if validates and not training.over:
            state.save(training.engine, checkpoints, progress, training.best)
        own.zero_()
        row_step, row_time = progress.step, time.monotonic()


def _step(training: Training) -> Tensor:
    """One optimiser step; returns this worker's Σ KL and Σ CE."""
    engine, reader, settings = training.engine, training.reader, training.job.settings
    (rank, world), step = collectives.rank_and_world(), training.progress.step
    for group in engine.optimizer.param_groups:
        group["lr"] = training.learning_rate(step)
    samples = schedule.batch_at(step, settings.batch, reader.shard_rows, training.job.seed)
    cursor = sum(sum(worker) for worker in training.sizes[:rank])
    sums = torch.zeros(2, dtype=torch.float64)
    for size in training.sizes[rank]:
        # a worker with an empty share must still take part in the collectives: it runs a row without labels
        rows = samples[cursor : cursor + size] or samples[:1]
        cursor += size
        batch = reader.batch(rows, engine.device)
        labels_N = batch.labels_N if size else torch.full_like(batch.labels_N, -1)
        loss, kl, ce = engine(batch.input_ids_BL, labels_N, batch.target, training.positions)
        # ZeRO divides by the number of workers; `positions` has divided by the positions of all workers already
        engine.backward(loss * world, scale_wrt_gas=False)
        engine.step()
        sums += torch.stack([kl, ce]).double().cpu()
    return sums


def _validate(training: Training, loss: tuple[float, float]) -> dict[str, object]:
    """Adds a validation to the history, keeps the weights if they are the best so far, and returns its figures."""
    progress, job = training.progress, training.job
    ppl, domains = figures.validation_perplexities(training)
    if not math.isfinite(ppl):
        raise ModelError(
            f"{job.title} diverged: validation perplexity {ppl} at step {progress.step}, learning rate "
            f"{job.settings.lr:g}. Lower distill.lr, or the round's lr; finished artifacts are intact."
        )
    tokens = progress.step * training.positions
    progress.history.append(
        Validation(step=progress.step, tokens=tokens, loss=loss, valid_ppl=ppl, valid_domains=domains)
    )
    first = collectives.rank_and_world()[0] == 0
    if first:
        log_progress(logger, figures.progress_line(training))
    if ppl == min(progress.perplexities):
        progress.best_step = progress.step
        training.best = state.weights(training.model) if first else {}
    return {"valid_ppl": ppl, "valid_domains": domains}


def _commit(training: Training, store: Store) -> None:
    """Worker 0 alone: the best weights become the artifact."""
    job, progress = training.job, training.progress
    for name, parameter in training.model.named_parameters():
        parameter.data.copy_(training.best[name])
    if changed := masks.changed_zeros(training.model, dict(training.zeros)):
        raise ModelError(
            f"{job.title}: training moved masked weights off zero, {changed}; nothing was committed"
        )
    card = f"A student of sparsekd-ray, step `{job.title}`, before export.\n"
    saving.save(training.model, store.fetch(job.student), store.workdir(job.out), card)
    measured = {
        "steps": progress.step,
        "planned_steps": training.steps,
        "trained_tokens": progress.history[-1]["tokens"],
        "best_step": progress.best_step,
        "valid_ppl": min(progress.perplexities),
        "stopped": training.verdict or "budget",
        "history": progress.history,
    }
    seconds = time.monotonic() - training.started
    store.commit(
        job.out, identity=dict(job.identity), inputs=dict(job.inputs), metrics=measured, seconds=seconds
    )
