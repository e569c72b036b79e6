"""Shows a cache to people: one sequence with the teacher's alternatives, and the statistics of the whole cache."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TypedDict

import torch
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from sparsekd_ray.errors import ConfigError
from sparsekd_ray.store import Ref, Store
from sparsekd_ray.teacher import shards
from sparsekd_ray.teacher.manifest import MANIFEST, read_manifest
from sparsekd_ray.teacher.threshold import column_sizes
from sparsekd_ray.teacher.verify import parents


class CacheStatistics(TypedDict):
    bytes_per_token: float
    columns: dict[str, float]
    """Bytes per token of each column."""
    temperatures: dict[str, dict[str, dict[str, float]]]
    """By temperature and domain: `kept_mass`, `top1_mass`, `entropy`."""


def all_rows(store: Store, ref: Ref, temperature: float | None = None) -> Iterator[tuple[Path, shards.Rows]]:
    """Every shard of a finished cache, verified and decoded at a temperature, by default its first, 1 for top-k."""
    folder = store.fetch(ref)
    manifest = read_manifest(folder)
    temperature = temperature or manifest.readable_temperatures[0]
    for index in range(len(manifest.shard_rows)):
        path = folder / shards.shard_name(index)
        yield path, shards.read(path, manifest, temperature)


def sequence(store: Store, ref: Ref, sample: str, temperature: float | None, top: int) -> Table:
    """One sample, a line per position: token, next token, the teacher's `top` alternatives, the tail.

    A sampled cache gives estimates that are right on average only: an id that was not drawn counts as 0, and there is
    no tail. ConfigError, with the names of some samples, if there is no such sample.
    """
    from transformers import AutoTokenizer

    manifest = read_manifest(store.fetch(ref, [MANIFEST]))
    temperature = temperature or manifest.readable_temperatures[0]
    rows = _holding(store, ref, sample, temperature)
    tokenizer = AutoTokenizer.from_pretrained(store.fetch(parents(store, ref)["texts"]) / "tokenizer")
    row = rows.sample_ids.index(sample)
    part, ids = rows.part(row), rows.tokens(row).tolist()
    drawn = manifest.signal == "sampled"
    absent = "0, not drawn" if drawn else "in the tail"
    names = (
        ("estimate of p(next)", f"the {top} largest estimates")
        if drawn
        else ("p(next)", f"the {top} likeliest")
    )
    table = Table(
        "", "token", "next", *names, *([] if drawn else ["tail"]), title=f"{sample}, T = {temperature}"
    )
    for position, pair in enumerate(pairwise(ids)):
        pairs = zip(part.ids_NK[position].tolist(), part.logprobs_NK[position].exp().tolist(), strict=True)
        probabilities = {i: p for i, p in pairs if p > 0}  # padding has probability 0
        likeliest = sorted(probabilities.items(), key=lambda pair: -pair[1])[:top]
        listed = "  ".join(f"{shown(tokenizer, i)} {p:.1%}" for i, p in likeliest)
        chance = f"{probabilities[pair[1]]:.1%}" if pair[1] in probabilities else absent
        tail = [] if drawn else [f"{float(part.tail_N[position]):.1%}"]
        table.add_row(str(position), *(shown(tokenizer, token) for token in pair), chance, listed, *tail)
    return table


def _holding(store: Store, ref: Ref, sample: str, temperature: float | None) -> shards.Rows:
    """The decoded shard that holds a sample. ConfigError if none does."""
    some: list[str] = []
    for _, rows in all_rows(store, ref, temperature):
        if sample in rows.sample_ids:
            return rows
        some += rows.sample_ids[:2]
    raise ConfigError(f"{store.url(ref.key)} holds no sample {sample!r}; it holds {', '.join(some[:5])} …")


def shown(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token as text that cannot be taken for markup or layout."""
    return repr(tokenizer.decode([token]))[1:-1].replace("[", r"\[") or "·"


def statistics(store: Store, ref: Ref) -> CacheStatistics:
    """Bytes per token by column; and by domain the mass of the kept ids, the mass of the likeliest, and entropy in nat.

    For top-k the entropy is a lower bound, with the tail counted as one id. For a sample it is that of the estimate.
    """
    folder, by_column = store.fetch(ref), dict[str, float]()
    manifest = read_manifest(folder)
    for path in sorted(folder.glob("*.parquet")):
        for name, size in column_sizes(path).items():
            by_column[name] = by_column.get(name, 0) + size / manifest.tokens
    total = sum(path.stat().st_size for path in folder.glob("*.parquet")) / manifest.tokens
    return {
        "bytes_per_token": total,
        "columns": by_column,
        "temperatures": {str(t): _by_domain(store, ref, t) for t in manifest.readable_temperatures},
    }


def _by_domain(store: Store, ref: Ref, temperature: float) -> dict[str, dict[str, float]]:
    sums: dict[str, torch.Tensor] = {}
    for _, rows in all_rows(store, ref, temperature):
        for row, domain in enumerate(rows.domains):
            part = rows.part(row)
            p_NK, tail_N = part.logprobs_NK.exp(), part.tail_N
            surprise_N = -(p_NK * part.logprobs_NK).sum(-1) - torch.xlogy(tail_N, tail_N)
            figures = (
                torch.stack([torch.ones_like(tail_N), p_NK.sum(-1), p_NK.amax(-1), surprise_N])
                .double()
                .sum(1)
            )
            sums[domain] = sums.get(domain, torch.zeros(4, dtype=torch.float64)) + figures
    names = ("kept_mass", "top1_mass", "entropy")
    return {d: dict(zip(names, (s[1:] / s[0]).tolist(), strict=True)) for d, s in sorted(sums.items())}


def plot(figures: CacheStatistics, path: Path, title: str) -> None:
    """Bytes per token by column beside kept mass and entropy by domain."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    drawing.suptitle(title)
    columns = sorted(figures["columns"].items(), key=lambda pair: pair[1])
    left.barh([name for name, _ in columns], [size for _, size in columns])
    left.set_xlabel("bytes per token")
    for temperature, domains in figures["temperatures"].items():
        for axes, name in ((middle, "kept_mass"), (right, "entropy")):
            axes.plot(
                list(domains), [domain[name] for domain in domains.values()], "o-", label=f"T = {temperature}"
            )
    middle.set_ylabel("mass of the kept ids")
    middle.set_ylim(0, 1.02)
    right.set_ylabel("entropy, nat (tail as one)")
    middle.legend()
    for axes in (middle, right):
        axes.tick_params(axis="x", rotation=30)
    drawing.savefig(path, dpi=150)
    plt.close(drawing)
