"""Writes a run's report: `report.html` (one self-contained file), `report.md`, and `summary.json` for programs.

`summary.json` holds the document of `document.py`, the findings in sentences, and under "fields" the meaning of each
field.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparsekd_ray.report import charts, comparing, formatting, graph
from sparsekd_ray.report.checks import checks
from sparsekd_ray.report.comparing import of_kind
from sparsekd_ray.report.document import FIELDS, Summary
from sparsekd_ray.report.findings import findings, headline


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


def dense_valid(summary: Summary) -> float | None:
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


def render(summary: Summary, out: Path) -> None:
    """Writes `report.html`, `report.md` and `summary.json` into `out`; the same dict gives the same bytes."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    numbers = (
        formatting.number,
        formatting.percent,
        formatting.signed,
        formatting.count,
        formatting.duration,
    )
    filters = (*numbers, charts.colour, fenced)
    env.filters |= {function.__name__: function for function in filters} | {"md": escape_markdown}
    functions = {
        "change": comparing.change,
        "excess": comparing.excess,
        "graph": graph.graph,
        "log": math.log,
    }
    env.globals |= functions | {"charts": charts}
    document = {**summary, "findings": findings(summary), "fields": FIELDS}
    view = document | {
        "headline": headline(summary),
        "checks": checks(summary),
        "dense_valid": dense_valid(summary),
        "flat_settings": list(flat(summary["settings"])),
        "domains": list(summary["rows"][0]["domains"]),
    }
    pages = {name: env.get_template(f"{name}.j2").render(view) for name in ("report.html", "report.md")}
    pages["summary.json"] = json.dumps(strict(document), indent=1, ensure_ascii=False, allow_nan=False)
    out.mkdir(parents=True, exist_ok=True)
    for name, text in pages.items():
        (out / name).write_text(text + "\n", encoding="utf-8", errors="replace")
