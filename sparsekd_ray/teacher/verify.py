"""Checks a cache against its teacher: every file, row and id, and a seeded sample that the teacher computes again.

This module needs torch and transformers, but no Ray. Shapes: N positions, V vocabulary, K kept ids.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
import pyarrow as pa
import torch

from sparsekd_ray import corpus
from sparsekd_ray.errors import ConfigError, IntegrityError
from sparsekd_ray.model import loading
from sparsekd_ray.model.head import ROWS_PER_CHUNK
from sparsekd_ray.store import Ref, Store
from sparsekd_ray.teacher import shards
from sparsekd_ray.teacher.forward import Forward, bucket, draws_of, lengths, longest_first, tokens
from sparsekd_ray.teacher.manifest import CacheManifest, read_manifest
from sparsekd_ray.teacher.signal import NOTHING, Target, joined, sampled

logger = logging.getLogger(__name__)

ALLOWED = {"plain": 1e-5, "compact": 2e-3, "sampled": 2e-2}
"""Mean distance between teacher and cache, beyond ten times what two passes of the teacher differ by: KL in nat for
top-k; total variation for a sample, whose exact probabilities are off by up to 1/64."""
NOISE = 1e-2  # no more is forgiven, however unsteady the teacher is


class Distance(NamedTuple):
    """How far the cache is from the teacher, and the teacher from itself, over the positions that were recomputed."""

    distance: float
    noise: float
    positions: int
    sequences: int


class Verification(TypedDict):
    """The measurements of `verify`."""

    distance: float
    noise: float
    allowed: float
    positions: int
    sequences: int
    shards: int
    rows: int


def parents(store: Store, ref: Ref) -> dict[str, Ref]:
    """The teacher and the text of a finished cache, from its record."""
    if ref.kind != "cache":
        raise ConfigError(
            f"{store.url(ref.key)} is a {ref.kind}: give a cache, a directory of artifacts/cache/"
        )
    record = store.record(ref)
    if record is None:
        raise IntegrityError(
            f"{store.url(ref.key)} has no record: it is not finished. Submit its cascade again."
        )
    return {role: Ref.from_key(key) for role, key in record.inputs.items()}


def verify(store: Store, ref: Ref, sequences: int, seed: int) -> Verification:
    """Checks all of a cache and returns the measurements; IntegrityError at the first fault.

    `distance` is a mean over all positions of `sequences` sequences and over the stored temperatures. For top-k it is
    KL(teacher now ‖ cache), with the rest of the vocabulary as one. For a sample it is the total variation between it
    and the sample drawn again. `noise` is the same distance between the teacher now, in batches, and the teacher
    now, one sequence at a time.
    """
    inputs = parents(store, ref)
    folder, texts = store.fetch(ref), store.fetch(inputs["texts"])
    manifest = read_manifest(folder)
    _require_inputs(manifest, inputs, corpus.read_manifest(texts)["tokenizer_hash"])
    logger.info(f"{len(manifest.shard_rows)} shards: every checksum is that of the record")
    rows = _count(folder, texts, manifest)
    logger.info(f"{rows:,} rows, every one in its place, with its tokens, ids and probabilities in range")
    measured = _recompute(store.fetch(inputs["teacher"]), folder, texts, manifest, sequences, seed)
    allowed = _judge(measured, folder, manifest)
    return {
        "distance": measured.distance,
        "noise": measured.noise,
        "allowed": allowed,
        "positions": measured.positions,
        "sequences": measured.sequences,
        "shards": len(manifest.shard_rows),
        "rows": rows,
    }


def _judge(measured: Distance, folder: Path, manifest: CacheManifest) -> float:
    """The distance that is allowed; IntegrityError beyond it."""
    form = "sampled" if manifest.signal == "sampled" else manifest.codec
    allowed = ALLOWED[form] + min(10 * measured.noise, NOISE)
    name = "total variation" if form == "sampled" else "KL"
    logger.info(
        f"teacher now against cache, {measured.positions:,} positions: {name} {measured.distance:.2e} (the "
        f"teacher against itself {measured.noise:.1e}, allowed {allowed:.1e})"
    )
    if not measured.distance <= allowed:
        raise IntegrityError(
            f"{folder} does not hold the probabilities of its teacher: mean {name} {measured.distance:.3g}, allowed "
            f"{allowed:.3g}. Remove it to have it captured again."
        )
    return allowed


def _count(folder: Path, texts: Path, manifest: CacheManifest) -> int:
    """Rows of all shards, each checked; IntegrityError unless rows and tokens are as many as the manifest says."""
    counts = [_checked(folder, texts, index, manifest) for index in range(len(manifest.shard_rows))]
    rows, total = [count for count, _ in counts], sum(count for _, count in counts)
    if tuple(rows) != manifest.shard_rows or (sum(rows), total) != (manifest.rows, manifest.tokens):
        raise IntegrityError(
            f"{folder}: {sum(rows)} rows of {total} tokens found, the manifest says {manifest.rows} of "
            f"{manifest.tokens}"
        )
    return sum(rows)


def _require_inputs(manifest: CacheManifest, inputs: dict[str, Ref], tokenizer_hash: str) -> None:
    manifest.require(
        tokenizer_hash=tokenizer_hash,
        vocab_size=manifest.vocab_size,
        teacher=inputs["teacher"].fingerprint,
        corpus=inputs["texts"].fingerprint,
    )


def _checked(folder: Path, texts: Path, index: int, manifest: CacheManifest) -> tuple[int, int]:
    """Rows and tokens of one shard. IntegrityError if its rows are not the corpus's or its numbers are impossible."""
    name = shards.shard_name(index)
    source = corpus.read_shard(texts / "train" / name)
    for temperature in manifest.readable_temperatures:
        rows = shards.read(folder / name, manifest, temperature)
        target = rows.target
        mass_N = target.logprobs_NK.exp().sum(-1) + target.tail_N
        faults = {
            "sample ids": rows.sample_ids != source["sample_id"].to_pylist(),
            "domains": rows.domains != source["domain"].to_pylist(),
            "lengths": not np.array_equal(np.diff(rows.first_B1), lengths(source)),
            "input ids": not np.array_equal(rows.input_ids, source["input_ids"].combine_chunks().flatten()),
            "ids": bool((target.ids_NK < 0).any() or (target.ids_NK >= manifest.vocab_size).any()),
            "probabilities": not bool(torch.isfinite(target.logprobs_NK).all() and (mass_N > 0).all()),
            "repeated ids": _repeats(target),
            "sums": manifest.signal == "topk" and bool(((mass_N - 1).abs() > 1e-3).any()),
        }
        for column, is_wrong in faults.items():
            if is_wrong:
                raise IntegrityError(
                    f"{folder / name}: its {column} are not those of the corpus, or impossible"
                )
    return len(source), int(lengths(source).sum())


def _repeats(target: Target) -> bool:
    """Whether a position keeps an id twice; padding does not count."""
    kept_NK = target.logprobs_NK > NOTHING
    ids_NK = torch.where(kept_NK, target.ids_NK, -1 - torch.arange(target.ids_NK.shape[1])).sort(-1).values
    return bool((ids_NK.diff(dim=-1) == 0).any())


def _recompute(
    teacher: Path, folder: Path, texts: Path, manifest: CacheManifest, sequences: int, seed: int
) -> Distance:
    """Means over the positions of `sequences` rows and over temperatures, as `verify` defines them."""
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, manifest.dtype)
    forward = Forward(loading.load(teacher, dtype=dtype, device=device))
    places = [(i, row) for i, count in enumerate(manifest.shard_rows) for row in range(count)]
    rows, chosen = _rows(texts, sorted(random.Random(seed).sample(places, min(sequences, len(places)))))
    draw_N, gaps = _draws(rows), torch.zeros(2, dtype=torch.float64)
    for temperature in manifest.readable_temperatures:
        chunks = zip(
            _logprobs(forward, rows, forward.sequences, temperature),
            _logprobs(forward, rows, 1, temperature),
            _chunks(_cached(folder, chosen, manifest, temperature)),
            draw_N.split(ROWS_PER_CHUNK),
            strict=True,
        )
        gaps += sum(_gaps(*chunk, manifest) for chunk in chunks)
    distance, noise = (gaps / (len(draw_N) * len(manifest.readable_temperatures))).tolist()
    return Distance(distance, noise, len(draw_N), len(chosen))


def _gaps(
    live_nV: torch.Tensor,
    again_nV: torch.Tensor,
    target: Target,
    draw_n: torch.Tensor,
    manifest: CacheManifest,
) -> torch.Tensor:
    """Σ over positions of the distance between teacher and cache, and between teacher and teacher [2]."""
    if manifest.signal == "sampled":
        now_nV, then_nV = (_drawn(x, manifest, draw_n) for x in (live_nV, again_nV))
        distances = [
            (now_nV - other_nV).abs().sum() / 2 for other_nV in (estimate(target, now_nV.shape[1]), then_nV)
        ]
    else:
        noise_n = (live_nV.exp() * (live_nV - again_nV)).sum(-1).clamp(min=0)
        distances = [divergence(live_nV, target).sum(), noise_n.sum()]
    return torch.stack(distances).double()


def divergence(live_nV: torch.Tensor, target: Target) -> torch.Tensor:
    """KL(teacher ‖ cache) of each position, over the kept ids and the rest as one id."""
    kept_nK = live_nV.gather(1, target.ids_NK.long())
    rest_n = (1 - kept_nK.exp().sum(-1)).clamp(min=1e-9)
    gap_nK = kept_nK.exp() * (kept_nK - target.logprobs_NK)
    return gap_nK.sum(-1) + rest_n * (rest_n.log() - target.tail_N.clamp(min=1e-9).log())


def _drawn(live_nV: torch.Tensor, manifest: CacheManifest, draw_n: torch.Tensor) -> torch.Tensor:
    """The sample drawn again, as an estimate over the vocabulary."""
    again = sampled(live_nV, 1.0, manifest.drawn_weight, draw_n)  # log p_T are logits at temperature 1
    return estimate(Target(again.ids_NK, again.logprobs_NK, torch.zeros(len(live_nV))), live_nV.shape[1])


def estimate(target: Target, vocabulary: int) -> torch.Tensor:
    """The probabilities over the vocabulary that a sample estimates [n, V]."""
    weights_nK = target.logprobs_NK.exp()
    return torch.zeros(len(weights_nK), vocabulary).scatter_add_(1, target.ids_NK.long(), weights_nK)


def _logprobs(forward: Forward, rows: pa.Table, sequences: int, temperature: float) -> Iterator[torch.Tensor]:
    """log p_T in chunks of ROWS_PER_CHUNK positions. The cuts do not depend on `sequences`."""
    pending_nV = torch.empty(0)
    for batch in _batches(rows, sequences):
        for logits_nV in forward.logits(tokens(batch)):
            pending_nV = torch.cat([pending_nV, logits_nV]) if len(pending_nV) else logits_nV
            while len(pending_nV) >= ROWS_PER_CHUNK:
                yield (pending_nV[:ROWS_PER_CHUNK].float() / temperature).log_softmax(-1).cpu()
                pending_nV = pending_nV[ROWS_PER_CHUNK:]
    if len(pending_nV):
        yield (pending_nV.float() / temperature).log_softmax(-1).cpu()


def _chunks(target: Target) -> Iterator[Target]:
    for columns in zip(*(column.split(ROWS_PER_CHUNK) for column in target), strict=True):
        yield Target(*columns)


def _batches(rows: pa.Table, sequences: int) -> Iterator[pa.Table]:
    """`sequences` rows of one length at a time, of rows that stand longest first."""
    lengths_B, left_B = lengths(rows), np.arange(len(rows))
    while len(left_B):
        batch_b = bucket(left_B, lengths_B, sequences)
        yield rows.take(batch_b)
        left_B = left_B[len(batch_b) :]


def _rows(texts: Path, chosen: list[tuple[int, int]]) -> tuple[pa.Table, list[tuple[int, int]]]:
    """The corpus's rows at these places, longest first, and the places in that order."""
    read = {i: corpus.read_shard(texts / "train" / shards.shard_name(i)) for i, _ in chosen}
    rows = pa.concat_tables([read[i].slice(row, 1) for i, row in chosen]).combine_chunks()
    order_B = longest_first(lengths(rows))
    return rows.take(order_B), [chosen[place] for place in order_B]


def _draws(rows: pa.Table) -> torch.Tensor:
    """The sampler's number for every position of every row."""
    pairs = zip(rows["sample_id"].to_pylist(), lengths(rows).tolist(), strict=True)
    return torch.cat([draws_of([sample], length - 1) for sample, length in pairs])


def _cached(
    folder: Path, chosen: list[tuple[int, int]], manifest: CacheManifest, temperature: float
) -> Target:
    read = {i: shards.read(folder / shards.shard_name(i), manifest, temperature) for i, _ in chosen}
    return joined([read[i].part(row) for i, row in chosen])
