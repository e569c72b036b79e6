"""What a cached token costs and loses (`cache-size`), and how fast it comes back (`cache-read`)."""

from __future__ import annotations

import io
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from sparsekd_ray.benchmark import synthetic
from sparsekd_ray.distill.loss import kd_loss
from sparsekd_ray.teacher import shards
from sparsekd_ray.teacher.forward import Forward, joined_signals, tokens
from sparsekd_ray.teacher.signal import Sampled, Target, TopK, sampled, tempered, topk
from sparsekd_ray.teacher.threshold import column_sizes

VOCABULARY, K, LENGTH = 200_064, 32, 128
TEMPERATURES = (1.0, 2.0, 4.0)
BUDGET = 16.0
Say = Callable[[str], None]
Chunks = Callable[[], Iterator[torch.Tensor]]
"""The same logits at every call, a chunk of positions at a time."""


def manifest(signal: str, codec: str, temperatures: tuple[float, ...], vocabulary: int) -> dict[str, Any]:
    return {
        "format": shards.FORMAT, "signal": signal, "codec": codec, "k": K, "temperatures": list(temperatures),
        "vocab_size": vocabulary, "seq_len": LENGTH,
    }  # fmt: skip


def synthetic_chunks(sequences: int) -> Chunks:
    def chunks() -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(sequences):
            yield synthetic.logits(LENGTH - 1, VOCABULARY, generator)

    return chunks


def topk_figures(chunks: Chunks, rows: pa.Table, vocabulary: int) -> dict[str, float]:
    """Bytes per token of the compact top-k codec, KL(decoded ‖ raw) at T = 1 and the largest error of a tail."""
    about = manifest("topk", "compact", TEMPERATURES, vocabulary)
    parts = [topk(logits_nV, K, TEMPERATURES) for logits_nV in chunks()]
    raw = TopK(*(torch.cat(column) for column in zip(*parts, strict=True)))
    size, path = _written(rows, raw, about)
    kl, tails = [], 0.0
    for place, temperature in enumerate(TEMPERATURES):
        found = shards.read(path, about, temperature).target
        logprobs_NK, tail_N = tempered(raw.logprobs_NK, raw.log_z_NT[:, place], temperature)
        kl.append(bucket_kl(found, Target(found.ids_NK, logprobs_NK, tail_N)))
        tails = max(tails, float((found.tail_N - tail_N).abs().max()))
    return {
        "topk_bytes_per_token": size,
        "topk_kl_mean": float(kl[0].mean()),
        "topk_kl_p99": float(kl[0].quantile(0.99)),
        "topk_kl_mean_t2": float(kl[1].mean()),
        "topk_kl_mean_t4": float(kl[2].mean()),
        "tail_error": tails,
    }


def bucket_kl(a: Target, b: Target) -> torch.Tensor:
    """KL(a ‖ b) over the kept ids and the tail as one, per position."""
    kept_N = (a.logprobs_NK.exp() * (a.logprobs_NK - b.logprobs_NK)).double().sum(-1)
    smallest = 1e-12
    return kept_N + a.tail_N * ((a.tail_N + smallest).log() - (b.tail_N + smallest).log()).double()


def _written(rows: pa.Table, signal: TopK | Sampled, about: dict[str, Any]) -> tuple[float, io.BytesIO]:
    file = io.BytesIO()
    shards.write(file, rows, signal, about)
    file.seek(0)
    return sum(column_sizes(file).values()) / (len(rows) * LENGTH), file


def sampled_threshold(
    chunks: Chunks, rows: pa.Table, about: dict[str, Any], budget: float
) -> tuple[float, float]:
    """The smallest threshold within `budget` bytes per token, by bisection, and its bytes per token."""
    low, high, best = 1e-3, 1.0, (1.0, math.inf)
    draws_N = torch.rand(len(rows) * (LENGTH - 1), generator=torch.Generator().manual_seed(1))
    for _ in range(9):
        middle = (low * high) ** 0.5
        size = _written(rows, _sample(chunks, middle, about["temperatures"][0], draws_N), about)[0]
        low, high = (low, middle) if size <= budget else (middle, high)
        best = (middle, size) if size <= budget else best
    return best


def _sample(chunks: Chunks, threshold: float, temperature: float, draws_N: torch.Tensor) -> Sampled:
    parts, first = [], 0
    for logits_nV in chunks():
        parts.append(sampled(logits_nV, temperature, threshold, draws_N[first : first + len(logits_nV)]))
        first += len(logits_nV)
    whole = joined_signals(parts)
    assert isinstance(whole, Sampled)
    return whole


def angle(
    chunks: Chunks,
    draws_N: torch.Tensor,
    threshold: float,
    temperature: float,
    gradient: Callable[[int, Target], torch.Tensor],
    batch: int,
) -> dict[str, float]:
    """Between the gradient of a sample and that of full-vocabulary KL, both summed over batches of `batch` chunks:
    means over the batches of the angle in degrees and of the ratio of norms. `gradient(i, target)` is chunk i's."""
    found, ratios = [], []
    sparse = full = torch.zeros(())
    first = 0
    for index, logits_nV in enumerate(chunks()):
        drawn = sampled(logits_nV, temperature, threshold, draws_N[first : first + len(logits_nV)])
        first += len(logits_nV)
        none_n = torch.zeros(len(logits_nV))
        ids_nV = torch.arange(logits_nV.shape[1], dtype=torch.int32).expand(len(logits_nV), -1)
        full = full + gradient(index, Target(ids_nV, (logits_nV / temperature).log_softmax(-1), none_n))
        sparse = sparse + gradient(index, Target(drawn.ids_NK, drawn.logprobs_NK, none_n))
        if (index + 1) % batch == 0:
            cosine = torch.nn.functional.cosine_similarity(sparse, full, dim=0)
            found.append(math.degrees(math.acos(min(1.0, float(cosine)))))
            ratios.append(float(sparse.norm() / full.norm()))
            sparse = full = torch.zeros(())
    return {"angle_deg": statistics.mean(found), "norm_ratio": statistics.mean(ratios)}


def kl_gradient(
    student: Callable[[int], torch.Tensor],
    head_VD: torch.nn.Parameter,
    weights: list[Any],
    temperature: float,
) -> Callable[[int, Target], torch.Tensor]:
    """Σ KL's gradient to `weights`, of a student whose hidden states for chunk i are `student(i)`."""

    def gradient(index: int, target: Target) -> torch.Tensor:
        hidden_ND = student(index)
        labels_N = torch.zeros(len(hidden_ND), dtype=torch.long)
        loss, _, _ = kd_loss(
            hidden_ND, head_VD, labels_N, target, temperature=temperature, kl_weight=1.0, ce_weight=0.0
        )
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights)])

    return gradient


def of_synthetic(sequences: int, say: Say) -> dict[str, float]:
    """Both signals of synthetic logits at V = 200,064; the student of the gradient knows the prior, not the context."""
    chunks, rows = synthetic_chunks(sequences), synthetic.rows(sequences, LENGTH, VOCABULARY)
    figures = topk_figures(chunks, rows, VOCABULARY)
    say(f"synthetic, V = {VOCABULARY:,}: top-k {figures['topk_bytes_per_token']:.1f} bytes per token")
    about = manifest("sampled", "compact", (1.0,), VOCABULARY)
    threshold, size = sampled_threshold(chunks, rows, about, BUDGET)
    say(f"synthetic: sample of {size:.1f} bytes per token at threshold {threshold:.3f}")
    generator = torch.Generator().manual_seed(2)
    prior_V1 = -torch.log(torch.arange(VOCABULARY) + 2.7)[:, None]
    noise_VD = 0.25 * torch.randn(VOCABULARY, 15, generator=generator)
    head_VD = torch.nn.Parameter(torch.cat([prior_V1, noise_VD], 1))
    features = torch.randn(sequences, LENGTH - 1, 15, generator=generator)

    def student(index: int) -> torch.Tensor:
        return torch.cat([torch.ones(LENGTH - 1, 1), features[index]], 1).requires_grad_()

    measured = angle(
        chunks, _draws(sequences), threshold, 1.0, kl_gradient(student, head_VD, [head_VD], 1.0), sequences
    )
    return figures | {f"sampled_{k}": v for k, v in measured.items()} | {"sampled_bytes_per_token": size}


def _draws(sequences: int) -> torch.Tensor:
    return torch.rand(sequences * (LENGTH - 1), generator=torch.Generator().manual_seed(1))


def of_model(
    teacher: Any, students: dict[str, Any], rows: pa.Table, batch: int, say: Say
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Both signals of a trained teacher on real text; a sample's gradient for every student and batch."""
    forward, ids_BL = Forward(teacher, {}), tokens(rows)
    vocabulary, eight = teacher.config.vocab_size, ids_BL.split(4)

    def chunks() -> Iterator[torch.Tensor]:
        for part in eight:
            yield torch.cat([logits.float() for logits in forward.logits(part)]).clone()

    figures = topk_figures(chunks, rows, vocabulary)
    say(f"trained teacher, V = {vocabulary:,}: top-k {figures['topk_bytes_per_token']:.1f} bytes per token")
    table: list[dict[str, Any]] = []
    for temperature in (1.0, 2.0):
        about = manifest("sampled", "compact", (temperature,), vocabulary)
        threshold, size = sampled_threshold(chunks, rows, about, BUDGET)
        for name, model in students.items():

            def student(index: int, model: Any = model) -> torch.Tensor:
                return (
                    model.base_model(input_ids=eight[index], use_cache=False)
                    .last_hidden_state[:, :-1]
                    .flatten(0, 1)
                )

            weights = [p for p in model.parameters() if p.requires_grad]
            gradient = kl_gradient(student, model.get_output_embeddings().weight, weights, temperature)
            for size_of_batch in (batch // 8, batch):
                measured = angle(chunks, _draws(len(rows)), threshold, temperature, gradient, size_of_batch)
                positions = size_of_batch * 4 * (LENGTH - 1)
                table.append({"student": name, "temperature": temperature, "positions": positions,
                              "bytes_per_token": size, **measured})  # fmt: skip
                say(f"  T = {temperature:g}, {name}, {positions:,} positions: {measured['angle_deg']:.2f}°")
    first = next(r for r in table if r["temperature"] == 1.0 and r["positions"] == batch * 4 * (LENGTH - 1))
    return figures | {
        "sampled_bytes_per_token": first["bytes_per_token"],
        "sampled_angle_deg": first["angle_deg"],
        "sampled_norm_ratio": first["norm_ratio"],
    }, table


def read_speed(sequences: int, repeats: int, folder: Path) -> dict[str, float]:
    """Tokens per second of reading and decoding a shard on one core, the file in the page cache."""
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    parts = [topk(logits, K, (1.5, 2.0, 4.0)) for logits in synthetic_chunks(sequences)()]
    signal = TopK(*(torch.cat(column) for column in zip(*parts, strict=True)))
    rows, result = synthetic.rows(sequences, LENGTH, VOCABULARY), {}
    for codec in ("plain", "compact"):
        about, path = manifest("topk", codec, (1.5, 2.0, 4.0), VOCABULARY), folder / f"{codec}.parquet"
        shards.write(path, rows, signal, about)
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            shards.read(path, about, 2.0)
            seconds.append(time.perf_counter() - started)
        result[f"{codec}_tokens_per_s"] = sequences * LENGTH / statistics.median(seconds)
        result[f"{codec}_bytes_per_token"] = path.stat().st_size / (sequences * LENGTH)
    return result
