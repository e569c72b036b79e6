"""Compares students of sparse signals with a student of the full distribution: same start, samples and steps.

KL alone (no cross-entropy), in this process, AdamW with the cascade's schedule. Judged on held-out text: perplexity on
windows that do not overlap, and KL to the teacher over the whole vocabulary at T = 1.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyarrow as pa
import torch

from benchmarks import cache
from benchmarks.gradient import whole
from benchmarks.trained import open_store
from sparsekd_ray import corpus
from sparsekd_ray.distill import schedule
from sparsekd_ray.distill.loss import kd_loss
from sparsekd_ray.model import head
from sparsekd_ray.model.head import ROWS_PER_CHUNK
from sparsekd_ray.runtime.logging import headline
from sparsekd_ray.teacher import shards, threshold
from sparsekd_ray.teacher.forward import Forward, tokens
from sparsekd_ray.teacher.signal import Target, joined

BATCH, LR, WARMUP = 8, 4e-3, 0.05
TEACHER, STUDENT = "dense+kd", "round 3 pruned"
Targets = Callable[[list[int]], Target]


def compare(root: str, seeds: tuple[int, ...], steps: int, temperature: float) -> list[dict[str, Any]]:
    """A row per signal: bytes per token, and mean and standard deviation over seeds of both figures."""
    demo = open_store(root)
    teacher, rows = Forward(demo.model(TEACHER)), demo.rows(1024)
    held_out = corpus.domain_streams(demo.directory("corpus"), "test")
    signals = {
        "topk": cached(teacher, rows, "topk", temperature),
        "sampled": cached(teacher, rows, "sampled", temperature),
        "full, live": (live(teacher, rows, temperature), 0.0),
    }
    table = []
    for name, (targets, size) in signals.items():
        figures = []
        for seed in seeds:
            student = demo.model(STUDENT)
            train(student, tokens(rows), targets, seed, steps, temperature)
            figures.append(judge(student, teacher, held_out))
            headline(
                f"{name}, seed {seed}: held-out perplexity {figures[-1][0]:.2f}, KL {figures[-1][1]:.4f}"
            )
        table.append({"signal": name, "bytes_per_token": size} | _spread(figures))
    before = judge(demo.model(STUDENT), teacher, held_out)
    return [{"signal": "before", "bytes_per_token": 0.0} | _spread([before] * len(seeds)), *table]


def _spread(figures: list[tuple[float, float]]) -> dict[str, float]:
    found = {}
    for name, values in zip(("ppl", "kl"), zip(*figures, strict=True), strict=True):
        found[name] = statistics.mean(values)
        found[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
    return found


def cached(teacher: Forward, rows: pa.Table, signal: str, temperature: float) -> tuple[Targets, float]:
    """Targets as they come back from compact shards, and their bytes per token."""
    form = cache.manifest(signal, "compact", (temperature,), teacher.model.config.vocab_size)
    forward = Forward(teacher.model)
    if signal == "sampled":
        form = replace(form, threshold=threshold.fit_teacher(forward, rows.slice(0, 64), form, cache.BUDGET))
    size, file = threshold.file_size(rows, forward.signal(rows, form), form)
    found = shards.read(file, form, temperature)
    return lambda wanted: joined([found.part(row) for row in wanted]), size


def live(teacher: Forward, rows: pa.Table, temperature: float) -> Targets:
    """The teacher's whole distribution, asked again at every step."""
    ids_BL = tokens(rows)

    def targets(wanted: list[int]) -> Target:
        return whole(torch.cat(list(teacher.logits(ids_BL[wanted]))).float().clone(), temperature)

    return targets


def train(
    student: Any, ids_BL: torch.Tensor, targets: Targets, seed: int, steps: int, temperature: float
) -> None:
    optimizer = torch.optim.AdamW(student.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(step, steps, LR, WARMUP)
        wanted = [row for _, row in schedule.batch_at(step, BATCH, (len(ids_BL),), seed)]
        hidden_BLD = head.hidden_states(student, ids_BL[wanted])[:, :-1]
        hidden_ND, head_VD = hidden_BLD.flatten(0, 1), head.weight(student)
        labels_N = ids_BL[wanted][:, 1:].flatten()
        weight = 1 / len(labels_N)
        loss, _, _ = kd_loss(
            hidden_ND,
            head_VD,
            labels_N,
            targets(wanted),
            temperature=temperature,
            kl_weight=weight,
            ce_weight=0.0,
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.inference_mode()
def judge(student: Any, teacher: Forward, held_out: dict[str, Any]) -> tuple[float, float]:
    """Perplexity and KL(teacher ‖ student) over all positions of windows of 128 tokens."""
    nll = kl = count = 0.0
    ours = Forward(student)
    for stream in held_out.values():
        ids = torch.from_numpy(stream[: len(stream) // 128 * 128].astype("int64")).view(-1, 128)
        for part in ids.split(16):
            labels = part[:, 1:].flatten().split(ROWS_PER_CHUNK)
            for mine, theirs, label in zip(ours.logits(part), teacher.logits(part), labels, strict=True):
                log_q, log_p = mine.float().log_softmax(-1), theirs.float().log_softmax(-1)
                nll -= float(log_q.gather(1, label[:, None]).sum())
                kl += float((log_p.exp() * (log_p - log_q)).sum())
                count += len(label)
    return float(torch.tensor(nll / count).exp()), kl / count
