"""Bytes and errors of a cached token (`cache-size`), and the speed of reading a cache (`cache-read`)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from benchmarks import synthetic
from benchmarks.gradient import Chunks, Gradient, angles, kl_gradient, samples
from sparsekd_ray.model import head
from sparsekd_ray.runtime.logging import headline
from sparsekd_ray.teacher import shards
from sparsekd_ray.teacher.forward import Forward, joined_signals, tokens
from sparsekd_ray.teacher.manifest import CacheManifest
from sparsekd_ray.teacher.signal import Target, TopK, tempered, topk
from sparsekd_ray.teacher.threshold import file_size, fit

VOCABULARY, K, LENGTH = 200_064, 32, 128
TEMPERATURES = (1.0, 2.0, 4.0)
BUDGET = 15.75
"""Bytes per token of a sample: a quarter below what it may take, since its threshold is set on a pilot."""
CHUNK = 4  # sequences of the trained teacher at once


def manifest(signal: Any, codec: Any, temperatures: tuple[float, ...], vocabulary: int) -> CacheManifest:
    """A cache of rows of `LENGTH` tokens that belongs to no teacher and no corpus."""
    return CacheManifest(
        signal=signal, codec=codec, k=K, temperatures=temperatures, vocab_size=vocabulary, seq_len=LENGTH,
        tokenizer_hash="", teacher="", corpus="", shard_rows=(), rows=0, tokens=0, dtype="float32",
    )  # fmt: skip


def synthetic_chunks(sequences: int) -> Chunks:
    def chunks() -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(sequences):
            yield synthetic.logits(LENGTH - 1, VOCABULARY, generator)

    return chunks


def topk_figures(chunks: Chunks, rows: pa.Table, vocabulary: int) -> dict[str, float]:
    """Bytes per token of the compact top-k codec, KL(decoded ‖ raw) at T = 1 and the largest error of a tail."""
    form = manifest("topk", "compact", TEMPERATURES, vocabulary)
    parts = [topk(logits_nV, K, TEMPERATURES) for logits_nV in chunks()]
    raw = TopK(*(torch.cat(column) for column in zip(*parts, strict=True)))
    size, path = file_size(rows, raw, form)
    kl, tails = [], 0.0
    for place, temperature in enumerate(TEMPERATURES):
        found = shards.read(path, form, temperature).target
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


def sampled_threshold(chunks: Chunks, pilot: int, rows: pa.Table, form: CacheManifest) -> tuple[float, float]:
    """The smallest threshold within `BUDGET` on the first `pilot` chunks, and the bytes per token of all of them."""

    def size(threshold: float, most: int | None) -> float:
        drawn = islice(samples(chunks, threshold, form.temperatures[0]), most)
        signal = joined_signals([sample for _, sample in drawn])
        return file_size(rows.slice(0, len(signal.ids_NK) // (LENGTH - 1)), signal, form)[0]

    found = fit(lambda threshold: size(threshold, pilot), BUDGET)
    return found, size(found, None)


def of_synthetic(sequences: int) -> dict[str, float]:
    """Both signals of synthetic logits at V = 200,064; the student of the gradient knows the prior, not the context."""
    chunks, rows = synthetic_chunks(sequences), synthetic.rows(sequences, LENGTH, VOCABULARY)
    figures = topk_figures(chunks, rows, VOCABULARY)
    headline(f"synthetic, V = {VOCABULARY:,}: top-k {figures['topk_bytes_per_token']:.1f} bytes per token")
    form = manifest("sampled", "compact", (1.0,), VOCABULARY)
    threshold, size = sampled_threshold(chunks, 4, rows, form)
    headline(f"synthetic: sample of {size:.1f} bytes per token at threshold {threshold:.3f}")
    head_VD, student = _synthetic_student(sequences)
    gradient = kl_gradient(student, head_VD, [head_VD], 1.0)
    (measured,) = angles(chunks, threshold, 1.0, gradient, (sequences,))
    headline(f"synthetic, {sequences * (LENGTH - 1):,} positions: {measured['angle_deg']:.2f}°")
    return figures | {f"sampled_{k}": v for k, v in measured.items()} | {"sampled_bytes_per_token": size}


def _synthetic_student(sequences: int) -> tuple[torch.nn.Parameter, Callable[[int], torch.Tensor]]:
    """A head whose first column is the prior, and hidden states of chunk i that say nothing of the teacher's."""
    generator = torch.Generator().manual_seed(2)
    prior_V1 = -torch.log(torch.arange(VOCABULARY) + 2.7)[:, None]
    noise_VD = 0.25 * torch.randn(VOCABULARY, 15, generator=generator)
    features = torch.randn(sequences, LENGTH - 1, 15, generator=generator)

    def student(index: int) -> torch.Tensor:
        return torch.cat([torch.ones(LENGTH - 1, 1), features[index]], 1).requires_grad_()

    return torch.nn.Parameter(torch.cat([prior_V1, noise_VD], 1)), student


def of_model(
    teacher: Any, students: dict[str, Any], rows: pa.Table, batch: int
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Both signals of a trained teacher on real text; a sample's gradient for every student, at batches of `batch`
    sequences and of an eighth of it. The main figures are those of the first student at T = 1, at the larger one."""
    forward, chunks_bL = Forward(teacher), tokens(rows).split(CHUNK)

    def chunks() -> Iterator[torch.Tensor]:
        for ids_bL in chunks_bL:
            yield torch.cat([logits.float() for logits in forward.logits(ids_bL)]).clone()

    vocabulary, table = teacher.config.vocab_size, list[dict[str, Any]]()
    figures = topk_figures(chunks, rows, vocabulary)
    headline(
        f"trained teacher, V = {vocabulary:,}: top-k {figures['topk_bytes_per_token']:.1f} bytes per token"
    )
    for temperature in (1.0, 2.0):
        form = manifest("sampled", "compact", (temperature,), vocabulary)
        threshold, size = sampled_threshold(chunks, len(chunks_bL) // 4, rows, form)
        for name, model in students.items():
            gradient = _model_gradient(model, chunks_bL, temperature)
            sizes = (batch // CHUNK, batch // CHUNK // 8)
            for many, measured in zip(
                sizes, angles(chunks, threshold, temperature, gradient, sizes), strict=True
            ):
                positions = many * CHUNK * (LENGTH - 1)
                table.append({"student": name, "temperature": temperature, "positions": positions,
                              "sampled_bytes_per_token": size, **measured})  # fmt: skip
                headline(
                    f"  T = {temperature:g}, {name}, {positions:,} positions: {measured['angle_deg']:.2f}°"
                )
    main = {f"sampled_{key}": table[0][key] for key in ("angle_deg", "norm_ratio")}
    return figures | main | {"sampled_bytes_per_token": table[0]["sampled_bytes_per_token"]}, table


def _model_gradient(model: Any, chunks_bL: Sequence[torch.Tensor], temperature: float) -> Gradient:
    """To all weights of a student that reads the same chunks of tokens."""

    def student(index: int) -> torch.Tensor:
        hidden_bLD = head.hidden_states(model, chunks_bL[index])
        return hidden_bLD[:, :-1].flatten(0, 1)

    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return kl_gradient(student, head.weight(model), weights, temperature)


def read_speed(sequences: int, repeats: int, folder: Path) -> dict[str, float]:
    """Tokens per second of reading and decoding a shard on one core, the file in the page cache."""
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    parts = [topk(logits, K, (1.5, 2.0, 4.0)) for logits in synthetic_chunks(sequences)()]
    signal = TopK(*(torch.cat(column) for column in zip(*parts, strict=True)))
    rows, result = synthetic.rows(sequences, LENGTH, VOCABULARY), {}
    for codec in ("plain", "compact"):
        form, path = manifest("topk", codec, (1.5, 2.0, 4.0), VOCABULARY), folder / f"{codec}.parquet"
        shards.write(path, rows, signal, form)
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            shards.read(path, form, 2.0)
            seconds.append(time.perf_counter() - started)
        result[f"{codec}_tokens_per_s"] = sequences * LENGTH / statistics.median(seconds)
        result[f"{codec}_bytes_per_token"] = path.stat().st_size / (sequences * LENGTH)
    return result
