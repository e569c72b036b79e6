"""Is a cache what its teacher says? Every file, row and id is checked; a seeded sample of sequences is asked again.

Torch and transformers alone. Shapes: N positions, V vocabulary, K kept ids.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from sparsekd_ray import corpus
from sparsekd_ray.errors import IntegrityError
from sparsekd_ray.model import checkpoint
from sparsekd_ray.store import Ref, Store
from sparsekd_ray.teacher import shards
from sparsekd_ray.teacher.forward import Forward, tokens
from sparsekd_ray.teacher.signal import ROWS_PER_CHUNK, Target, joined

ALLOWED = {"plain": 1e-5, "compact": 2e-3}
"""Mean KL in nat between teacher and cache, beyond ten times what two passes of the teacher differ by."""
Say = Callable[[str], None]


def parents(store: Store, ref: Ref) -> dict[str, Ref]:
    """The teacher and the text of a finished cache, from its record."""
    record = store.record(ref)
    if record is None:
        raise IntegrityError(
            f"{store.url(ref.key)} has no record: it is not finished. Submit its cascade again."
        )
    return {role: Ref.of(key) for role, key in record["inputs"].items()}


def verify(store: Store, ref: Ref, sequences: int, seed: int, say: Say) -> dict[str, Any]:
    """Checks all of a cache and returns what was measured; IntegrityError at the first thing that is not as it should.

    `kl` is the mean of KL(teacher now ‖ cache) over all positions of `sequences` sequences and over the stored
    temperatures; `noise` that of KL(teacher now ‖ teacher now, one sequence at a time).
    """
    of = parents(store, ref)
    folder, texts = store.fetch(ref), store.fetch(of["texts"])
    manifest = shards.read_manifest(folder)
    _belongs(manifest, of, corpus.read_manifest(texts))
    say(f"{len(manifest['shard_rows'])} shards: every checksum is that of the record")
    rows = [_checked(folder, texts, index, manifest) for index in range(len(manifest["shard_rows"]))]
    if sum(rows) != manifest["rows"] or rows != manifest["shard_rows"]:
        raise IntegrityError(f"{folder}: {sum(rows)} rows found, the manifest says {manifest['rows']}")
    say(f"{sum(rows):,} rows, every one in its place, with its tokens, ids and probabilities in range")
    measured = _live(store.fetch(of["teacher"]), folder, texts, manifest, sequences, seed)
    allowed = ALLOWED[manifest["codec"]] + 10 * measured["noise"]
    say(
        f"teacher now against cache, {measured['positions']:,} positions: KL {measured['kl']:.2e} nat (its noise "
        f"{measured['noise']:.1e}, allowed {allowed:.1e})"
    )
    if not measured["kl"] <= allowed:
        raise IntegrityError(
            f"{folder} is not what its teacher says: mean KL {measured['kl']:.3g} nat, allowed {allowed:.3g}. "
            f"Remove it to have it captured again."
        )
    return measured | {"rows": sum(rows), "shards": len(rows), "allowed": allowed}


def _belongs(manifest: dict[str, Any], of: dict[str, Ref], source: dict[str, Any]) -> None:
    shards.check(
        manifest,
        tokenizer_hash=source["tokenizer_hash"],
        vocab_size=manifest["vocab_size"],
        teacher=of["teacher"].fingerprint,
        corpus=of["texts"].fingerprint,
    )


def _checked(folder: Path, texts: Path, index: int, manifest: dict[str, Any]) -> int:
    """The rows of one shard, once each is found to be the corpus's, and every number possible."""
    name = shards.shard_name(index)
    source = corpus.read_shard(texts / "train" / name)
    for temperature in manifest["temperatures"]:
        found = shards.read(folder / name, manifest, temperature)
        target = found.target
        mass_N = target.logprobs_NK.exp().sum(-1) + target.tail_N
        wrong = {
            "sample ids": found.sample_ids != source["sample_id"].to_pylist(),
            "domains": found.domains != source["domain"].to_pylist(),
            "input ids": not np.array_equal(found.input_ids, tokens(source).numpy().reshape(-1)),
            "ids": bool((target.ids_NK < 0).any() or (target.ids_NK >= manifest["vocab_size"]).any()),
            "probabilities": not bool(torch.isfinite(target.logprobs_NK).all() and (mass_N > 0).all()),
            "sums": manifest["signal"] == "topk" and bool(((mass_N - 1).abs() > 1e-3).any()),
        }
        for what, is_wrong in wrong.items():
            if is_wrong:
                raise IntegrityError(
                    f"{folder / name}: its {what} are not those of the corpus, or impossible"
                )
    return len(source)


def _live(
    teacher: Path, folder: Path, texts: Path, manifest: dict[str, Any], sequences: int, seed: int
) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    forward = Forward(checkpoint.load(teacher, dtype=dtype, device=device), manifest)
    places = [(i, row) for i, count in enumerate(manifest["shard_rows"]) for row in range(count)]
    chosen = sorted(random.Random(seed).sample(places, min(sequences, len(places))))
    rows = _rows(texts, chosen)
    kl, noise, positions = 0.0, 0.0, 0
    for temperature in manifest["temperatures"]:
        cached = _cached(folder, chosen, manifest, temperature)
        for many_nV, one_nV, target in zip(
            _logprobs(forward, rows, forward.sequences, temperature),
            _logprobs(forward, rows, 1, temperature),
            _chunks(cached),
            strict=True,
        ):
            kl += float(divergence(many_nV, target, manifest).sum())
            noise += float((many_nV.exp() * (many_nV - one_nV)).sum(-1).clamp(min=0).sum())
            positions += len(many_nV)
    return {
        "kl": kl / positions,
        "noise": noise / positions,
        "positions": positions,
        "sequences": len(chosen),
    }


def divergence(live_nV: torch.Tensor, target: Target, manifest: dict[str, Any]) -> torch.Tensor:
    """KL(teacher ‖ cache) of each position, of the kept ids and the rest as one; of a sample, over its exact ids."""
    ids_nK = target.ids_NK.long()
    kept_nK = live_nV.gather(1, ids_nK)
    if manifest["signal"] == "sampled":
        exact_nK = target.logprobs_NK > np.log(manifest["threshold"]) + 1e-6
        gap_nK = (kept_nK - target.logprobs_NK).where(exact_nK, 0)
        return (kept_nK.exp() * gap_nK.square() / 2).sum(-1)  # KL to second order
    rest_n = (1 - kept_nK.exp().sum(-1)).clamp(min=1e-9)
    gap_nK = kept_nK.exp() * (kept_nK - target.logprobs_NK)
    return gap_nK.sum(-1) + rest_n * (rest_n.log() - target.tail_N.clamp(min=1e-9).log())


def _logprobs(forward: Forward, rows: pa.Table, sequences: int, temperature: float) -> Iterator[torch.Tensor]:
    """log p_T in chunks of at most ROWS_PER_CHUNK positions that do not depend on how many sequences run together."""
    pending: list[torch.Tensor] = []
    for start in range(0, len(rows), sequences):
        pending += list(forward.logits(tokens(rows.slice(start, sequences))))
        whole = torch.cat(pending)
        full = len(whole) - len(whole) % ROWS_PER_CHUNK
        for part in whole[:full].split(ROWS_PER_CHUNK) if full else ():
            yield (part.float() / temperature).log_softmax(-1).cpu()
        pending = [whole[full:]]
    if len(pending[0]):
        yield (pending[0].float() / temperature).log_softmax(-1).cpu()


def _chunks(target: Target) -> Iterator[Target]:
    for columns in zip(*(column.split(ROWS_PER_CHUNK) for column in target), strict=True):
        yield Target(*columns)


def _rows(texts: Path, chosen: list[tuple[int, int]]) -> pa.Table:
    read = {i: corpus.read_shard(texts / "train" / shards.shard_name(i)) for i, _ in chosen}
    return pa.concat_tables([read[i].slice(row, 1) for i, row in chosen]).combine_chunks()


def _cached(
    folder: Path, chosen: list[tuple[int, int]], manifest: dict[str, Any], temperature: float
) -> Target:
    read = {i: shards.read(folder / shards.shard_name(i), manifest, temperature) for i, _ in chosen}
    return joined([read[i].part(row) for i, row in chosen])
