"""One picture and one table of a finished run, for a README or a model card.

    python -m sparsekd_ray.report.picture store/runs/laptop/summary.json docs/demo.svg

writes the drawing and, beside it, `demo.json` with the figures it was drawn from; prints the table as Markdown.
The command also takes a file that it wrote itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsekd_ray.report.charts import scale
from sparsekd_ray.report.formatting import number, percent, signed

Row = Mapping[str, Any]
DRAWN = ("stage", "kind", "params", "sparsity", "oneshot_ppl", "pre_ppl", "ppl", "std", "vs_dense")
# key of a row, its words, colour, line, marker
LINES = (
    ("oneshot_ppl", "plain SVD at once, untrained", "#c02f2f", "--", "X"),
    ("pre_ppl", "rounds, before distillation", "#b35900", ":", "o"),
    ("ppl", "rounds, after distillation", "#0b62b8", "-", "o"),
)
BASELINE = "#00727f"


def figures(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What the picture shows of a summary: no settings, no paths, no machine."""
    rows = [{key: row[key] for key in DRAWN if key in row} for row in summary["rows"]]
    return {key: summary[key] for key in ("run", "protocol", "seeds")} | {"rows": rows}


def table(rows: Sequence[Row]) -> str:
    """Markdown: one line per model."""
    head = "| model | MLP removed | before distillation | after | against dense |"
    lines = [head, "| --- |" + " ---: |" * 4]
    for row in rows:
        dense = row["kind"] == "dense"
        removed = percent(row["sparsity"], 0) if row["sparsity"] else "–"
        cells = (row["stage"], removed, number(row["pre_ppl"]), f"**{number(row['ppl'])}**")
        lines.append(f"| {' | '.join(cells)} | {'–' if dense else signed(row['vs_dense'])} |")
    return "\n".join(lines)


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """Perplexity against the share of MLP parameters removed; the same figures give the same bytes."""
    from matplotlib import style
    from matplotlib.figure import Figure

    rows = summary["rows"]
    settings = {"svg.hashsalt": summary["run"], "svg.fonttype": "path", "font.size": 10.5, "axes.grid": True}
    looks = {"grid.color": "#dfe2e6", "axes.spines.top": False, "axes.spines.right": False}
    with style.context(["default", {**settings, **looks}]):
        figure = Figure(figsize=(7.6, 3.9), layout="constrained")
        _paint(figure.add_subplot(), rows)
        figure.savefig(path, format="svg", metadata=dict.fromkeys(("Creator", "Date")))


def _paint(axes: Any, rows: Sequence[Row]) -> None:
    rounds = [row for row in rows if row["kind"] == "round"]
    levels = [rows[0], *(row for row in rows if row["stage"] == "Dense + KD")]
    for row, line in zip(levels, ("-", "--"), strict=False):
        label = f"{row['stage']} {number(row['ppl'])}"
        axes.axhline(row["ppl"], color="#1a1d21", ls=line, lw=1.1, label=label)
    for key, words, colour, line, marker in LINES:
        points = [(100 * row["sparsity"], row[key]) for row in rounds if row[key] is not None]
        axes.plot(*zip(*points, strict=True), ls=line, marker=marker, color=colour, lw=1.8, label=words)
        for x, y in points if key != "pre_ppl" else ():  # the table has these; here they would lie on others
            offset = (0, -14 if key == "ppl" else 7)
            axes.annotate(number(y), (x, y), offset, textcoords="offset points", ha="center")
    for row in rows:
        if row["kind"] == "baseline":
            place = (100 * row["sparsity"], row["ppl"])
            label = f"{row['stage']} at once, distilled {number(row['ppl'])}"
            axes.plot(*place, "D", color=BASELINE, label=label)
    scale(axes, [row[key] for row in rows for key, *_ in LINES])
    axes.margins(0.09, 0.14)
    axes.set_xlabel("MLP parameters removed, %")
    axes.set_ylabel("held-out perplexity")
    axes.legend(frameon=False, loc="upper left", fontsize=9.5)


def main(summary: Path, out: Path) -> None:
    """Draws a run's summary.json.

    Args:
        summary: The run's summary.json.
        out: The SVG to write; a .json of the figures is written beside it.
    """
    shown = figures(json.loads(summary.read_text()))
    draw(shown, out)
    out.with_suffix(".json").write_text(json.dumps(shown, indent=1) + "\n")
    print(table(shown["rows"]))


if __name__ == "__main__":
    import tyro

    tyro.cli(main, config=(tyro.conf.PositionalRequiredArgs,))
