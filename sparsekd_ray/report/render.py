"""What a cascade run shows, for people and for machines, from one plain dict.

`render` writes `report.html` (one self-contained file), `report.md` and `summary.json`: the dict with two keys
more, "findings" (the figures in sentences) and "fields", the meaning of each field as the glossary below lists it.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparsekd_ray.report import charts
from sparsekd_ray.report.charts import Row, count, number, percent, signed
from sparsekd_ray.report.findings import change, expectations, findings, has_excess, headline, of_kind

# section | field: meaning; … where [] is each item of a list and * each key of a mapping; not finite is null
GLOSSARY = """
| run: its name; created: ISO 8601; command: repeats the run; seconds: wall-clock time
| seeds[]: of the distillations; settings.*: every setting; versions.*: of the software; hardware: it ran on
| findings[]: the figures in words
protocol | window: tokens in a window; stride: tokens to the next one; sentence: the protocol in words
corpus | artifact: store key; train_tokens: in the mix; warning: test text that is also in the mix, or null
corpus.domains.* | train_tokens: in the mix; test_tokens: in the test split
corpus.domains.* | in_dense_training: whether the dense model was trained on it, null if not known
dense | artifact: store key; params: parameters; mlp_params: those in MLP matrices; note: about it, or null
rows[] | stage: name of the model
rows[] | kind: dense, control (full size, trained), round (pruned, distilled), baseline (dense pruned once, distilled)
rows[] | method: of pruning and, of an SVD, how it shares the budget out, null for dense and controls
rows[] | sparsity_requested: fraction of MLP parameters to remove; sparsity: fraction removed, counted
rows[] | params: parameters, zeros of a mask included; mlp_params: those in MLP matrices, zeros of a mask left out
rows[] | artifact: store key; lr: learning rate
rows[] | teacher: dense, dense+kd, previous or null; teacher_ppl: its perplexity
rows[] | oneshot_ppl: plain SVD of dense to a round's requested size, all matrices alike, untrained
rows[] | pre_ppl: just after pruning, untrained
rows[] | ppl: perplexity (test split, protocol paper), mean over seeds; std: its standard deviation, or null
rows[] | per_seed.*: perplexity by seed; domains.*: by domain
rows[] | gptq_ppl: perplexity by protocol gptq, or null; words_ppl: by protocol words, or null
rows[] | vs_dense: ppl / dense ppl - 1; recovered: (pre - post) / (pre - dense), null for dense and controls
rows[] | trained_tokens: since dense, cumulative over rounds; stopped: by budget, minimum or saturation
rows[] | export: directory that Transformers loads, or null
curves[] | stage: that was trained; seed: of this training; best_step: the step that was kept
curves[].points[] | step: optimiser steps done, 0 before distillation; tokens: trained on so far
curves[].points[] | valid_ppl: perplexity on the validation split; valid_domains.*: the same by domain
steps[] | name: of the step; kind: of work; artifact: store key of its result; inputs[]: the steps it reads
steps[] | seconds: it took when it was done; reused: found done by this run; figure: the figure that matters
commands[] | what: it is for; command: the command itself
"""
FIELDS = {
    f"{section.strip()}.{name}".lstrip("."): meaning
    for section, entries in (line.split("| ") for line in GLOSSARY.strip().splitlines())
    for name, meaning in (entry.split(": ", 1) for entry in entries.split("; "))
}


def flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every setting as (dotted name, JSON value), the names being those of the command line."""
    items: dict[Any, Any] = {}
    if isinstance(value, Mapping):
        items = dict(value)
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        items = dict(enumerate(value))
    for key, item in items.items():
        yield from flat(item, f"{path}.{key}".lstrip("."))
    if not items:
        yield path, json.dumps(value, ensure_ascii=False)


def strict(value: Any) -> Any:
    """`value` as JSON can hold it: a figure that is not finite becomes null."""
    if isinstance(value, Mapping):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def dense_valid(summary: Row) -> float | None:
    """The dense model's validation perplexity: where a control starts from."""
    controls = {row["stage"] for row in of_kind(summary, "control")}
    starts = (c["points"][0] for c in summary["curves"] if c["stage"] in controls and c["points"])
    return next((start["valid_ppl"] for start in starts if start["step"] == 0), None)


def escape_markdown(text: Any) -> str:
    """Text that cannot become markup, nor break out of a cell of a table."""
    line = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*\[\]|])", r"\\\1", line)


def fenced(text: Any) -> str:
    """A code block whose fence is longer than any run of backticks inside it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", str(text))), default=0))
    return f"{fence}\n{text}\n{fence}"


def render(summary: Row, out: Path) -> None:
    """Writes `report.html`, `report.md` and `summary.json` into `out`; the same dict gives the same bytes."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (number, percent, signed, count, charts.duration, charts.colour, fenced)
    env.filters |= {function.__name__: function for function in filters} | {"md": escape_markdown}
    env.globals |= {"change": change, "has_excess": has_excess, "charts": charts, "log": math.log}
    document = {**summary, "findings": findings(summary), "fields": FIELDS}
    view = document | {
        "headline": headline(summary),
        "checks": expectations(summary),
        "dense_valid": dense_valid(summary),
        "flat_settings": list(flat(summary["settings"])),
        "domains": list(summary["rows"][0]["domains"]),
    }
    pages = {name: env.get_template(f"{name}.j2").render(view) for name in ("report.html", "report.md")}
    pages["summary.json"] = json.dumps(strict(document), indent=1, ensure_ascii=False, allow_nan=False)
    out.mkdir(parents=True, exist_ok=True)
    for name, text in pages.items():
        (out / name).write_text(text + "\n", encoding="utf-8", errors="replace")
