"""The lines of a run: its plan, a line when a step starts, and a line with the main figure when it ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from sparsekd_ray.cascade import estimate
from sparsekd_ray.cascade.steps import Step
from sparsekd_ray.config import Config
from sparsekd_ray.runtime import metrics
from sparsekd_ray.runtime.logging import headline
from sparsekd_ray.runtime.trackers import tracking
from sparsekd_ray.store import Record, Store

Records = Mapping[str, Record]


def begins(step: Step) -> None:
    headline(f"  ▶ {step.name:<24} {step.ref.name}")


def ends(step: Step, store: Store) -> None:
    record = store.record(step.ref)
    assert record is not None, f"{step.name} has just been made"
    headline(f"  ✓ {step.name:<24} {figure(step.kind, record):<42} {record.seconds:6.1f} s")
    log_figures(step, record)


def log_figures(step: Step, record: Record) -> None:
    """Logs the metrics of a finished step as a row of the run's live figures."""
    measured = {"artifact": step.ref.key, "seconds": record.seconds, "metrics": record.metrics}
    metrics.log(step.name, step.kind, time=record.created, **measured)


@contextmanager
def live_figures(config: Config, steps: Sequence[Step], store: Store) -> Iterator[None]:
    """Writes live figures to the run's `metrics.jsonl`, and to its tracker if it has one, while the block runs."""
    folder = f"runs/{config.name}"
    with (
        tracking(config.execution.tracker, config.name, str(store.local(folder))) as tracker,
        metrics.recording(store, f"{folder}/metrics.jsonl", tracker),
    ):
        for step in steps:
            if record := store.record(step.ref):
                log_figures(step, record)
        yield


def figure(kind: str, record: Record) -> str:
    """The main figure of a finished step, in words."""
    measured = record.metrics
    match kind:
        case "tokenizer":
            return f"{measured['vocab_size']:,} tokens in the vocabulary"
        case "corpus":
            return f"{sum(measured['tokens']['train'].values()):,} training tokens"
        case "dense":
            return f"{measured['params']:,} parameters, {measured['mlp_params'] / measured['params']:.0%} MLP"
        case "cache":
            stored = sum(file.size for file in record.files.values())
            return f"{measured['tokens']:,} tokens, {stored / measured['tokens']:.0f} B/token"
        case "statistics":
            return f"{measured['layers']} layers, {measured['tokens']:,} tokens"
        case "prune":
            return f"−{100 * measured['sparsity']:.2f} % of MLP, {measured['params']:,} parameters"
        case "distill":
            return f"validation PPL {measured['valid_ppl']:.2f} ({measured['stopped']})"
        case "evaluate":
            return f"PPL {measured['paper']['ppl']:.2f}"
    forms = [name for name, values in measured.items() if "params" in values]
    return f"{measured[forms[0]]['params']:,} parameters; {' and '.join(forms)}"


def plan_text(config: Config, steps: list[Step], records: Records) -> str:
    """The plan as text: every step, and whether it is done or will run."""
    done = sum(step.name in records for step in steps)
    lines = [f"plan  {len(steps)} steps, {done} done, {len(steps) - done} to run"]
    names, artifacts = (
        max(map(len, column)) for column in zip(*((s.name, s.ref.key) for s in steps), strict=True)
    )
    for step in steps:
        record = records.get(step.name)
        mark, note = ("✓", figure(step.kind, record)) if record else ("·", "to run")
        lines.append(
            f"  {mark} {step.name:<{names}}  {step.ref.key.removeprefix('artifacts/'):<{artifacts - 10}}  {note}"
        )
    return "\n".join([*lines, *_estimates(config)])


def _estimates(config: Config) -> list[str]:
    """Lines on model size, cache size and memory per GPU, if the configuration states the model's shape."""
    shape = config.model.shape
    if shape is None:
        return []
    counts = estimate.parameters(shape)
    samples, length = config.corpus.samples, config.corpus.seq_len
    gb = estimate.cache_bytes(config) / estimate.GB
    signal = f"top-{config.teacher.k}" if config.teacher.signal == "topk" else "sampled"
    lines = [
        f"model   {counts.total / 1e9:.3f} B parameters: {counts.mlp / 1e9:.3f} MLP, "
        f"{counts.attention / 1e9:.3f} attention, {counts.embedding / 1e9:.3f} embedding",
        f"corpus  {samples:,} sequences of {length} tokens, {samples * length / 1e6:.1f} M tokens",
        f"cache   about {gb:.1f} GB per teacher ({signal}, {config.teacher.codec})",
        f"memory per GPU (estimated): capture {estimate.capture_gb(shape):.1f} GB; training on "
        f"{config.execution.workers} workers, ZeRO-{config.execution.zero_stage}"
        f"{', optimiser offloaded' if config.execution.offload else ''}:",
    ]
    sizes = [0.0, *(r.sparsity for r in config.cascade.rounds)]
    needs = {sparsity: estimate.training_gb(config, shape, sparsity) for sparsity in sizes}
    for card in config.execution.cards:
        fits = "  ".join(
            f"−{100 * sparsity:g}% {need:.1f}{'' if need < 0.92 * card.memory_gb else ' too much'}"
            for sparsity, need in needs.items()
        )
        lines.append(f"  {card.name:<14} {card.memory_gb:g} GB   {fits}")
    return lines
