"""Drawings of a report, as inline SVG that needs nothing else.

matplotlib draws in stand-in colours that become CSS variables, so that one drawing serves a light and a dark page. Text
stays text, in the page's font. The same figures give the same bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Literal

from markupsafe import Markup

from sparsekd_ray.report.document import Curve, Row
from sparsekd_ray.report.formatting import count, number, percent, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Perplexity = Literal["ppl", "pre_ppl", "oneshot_ppl"]

INK, MUTED, GRID = "#0000f0", "#0000f1", "#0000f2"
SERIES = tuple(f"#0000a{i}" for i in range(8))
CSS_NAMES = {"f0": "ink", "f1": "muted", "f2": "line"} | {f"a{i}": f"s{i}" for i in range(8)}
BASELINE = SERIES[5]  # after the controls' colours
MARKERS, GLYPHS = "os^DvPX*", "●■▲◆▼✚✖★"
STYLE = {
    **{"svg.fonttype": "none", "font.family": "DejaVu Sans", "font.size": 10.5, "text.parse_math": False},
    **{"text.color": INK, "axes.edgecolor": MUTED, "axes.labelcolor": INK, "xtick.color": MUTED},
    **{"ytick.color": MUTED, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.grid": True},
    **{"grid.color": GRID, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True},
}
RATIOS = {  # ticks of a relative axis, for a spread of up to this factor
    4: (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.7, 2, 2.5, 3),
    100: (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50),
    math.inf: tuple(10.0**power for power in range(-9, 10)),
}


def colour(i: int) -> str:
    return f"var(--s{i % 8})"


def finite(value: float | None) -> float:
    """`value`, or NaN, which matplotlib leaves out."""
    return float(value) if value is not None and math.isfinite(value) else math.nan


def draw(label: str, paint: Callable[[Axes], None], width: float = 4.5, height: float = 3) -> Markup:
    """One chart, in inches, as an `<svg>` that fills its container; a screen reader says `label`."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", {**STYLE, "svg.hashsalt": label}]), StringIO() as buffer:
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure.add_subplot())
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
        svg = buffer.getvalue()
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r'<g id="[^"]*">', "<g>", body)  # only clip paths and markers are referred to
    body = re.sub(r"#0000(f[0-2]|a[0-7])\b", lambda match: f"var(--{CSS_NAMES[match[1]]})", body)
    box = f"0 0 {width * 72:g} {height * 72:g}"
    return Markup('<svg viewBox="{}" role="img" aria-label="{}">').format(box, label) + Markup(body)


def scale(axes: Axes, values: Sequence[float | None]) -> None:
    """A y axis of perplexities in plain figures; logarithmic where they spread over a factor of 3."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    known = [value for value in map(finite, values) if value > 0]
    spread = max(known) / min(known) if known else 1.0
    if spread > 3:
        axes.set_yscale("log")
        marks = (1, 1.5, 2, 3, 5, 7) if spread < 20 else (1, 2, 5) if spread < 100 else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=marks, numticks=8))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")


def size_chart(rows: Sequence[Row], collapse: bool) -> Markup:
    """Perplexity against parameters: with the collapse before distillation, or only what is left after it.

    The rounds are lines. Students beside them are diamonds, with their names where the collapse is not shown.
    """
    from matplotlib.ticker import MaxNLocator

    dense, rounds = rows[0], [row for row in rows if row["kind"] == "round"]
    others = [row for row in rows if row["kind"] == "baseline"]
    lines = [dense] if collapse else [dense, *(row for row in rows if row["kind"] == "control")]
    looks: dict[Perplexity, tuple[str, str]] = {
        "ppl": (SERIES[0], "o-"),
        "pre_ppl": (SERIES[1], "o:"),
        "oneshot_ppl": (SERIES[4], "X--"),
    }
    keys: list[Perplexity] = list(looks) if collapse else ["ppl"]

    def at(row: Row, key: Perplexity) -> float:
        """Parameters. Plain SVD has the requested size, also where a round's method met it only roughly."""
        removed = row["sparsity_requested"] * dense["mlp_params"]
        return dense["params"] - removed if key == "oneshot_ppl" else row["params"]

    def paint(axes: Axes) -> None:
        for i, row in enumerate(lines):
            hue = SERIES[(i + 1) % 8] if i else INK
            axes.axhline(finite(row["ppl"]), color=hue, ls=(i * 2, (5, 2 + i)), lw=1.3)
        for key in keys:
            hue, look = looks[key]
            ys, face = [finite(row[key]) for row in rounds], "none" if key == "pre_ppl" else hue
            axes.plot([at(row, key) for row in rounds], ys, look, color=hue, mfc=face, lw=1.6, ms=6)
        for row in rounds:
            if row["std"] and not collapse:
                axes.errorbar(row["params"], finite(row["ppl"]), row["std"], color=SERIES[0], capsize=4)
            if math.isfinite(y := finite(row[keys[-1]])):
                text = number(y) if collapse else percent(row["sparsity"], 0)
                axes.annotate(text, (at(row, keys[-1]), y), (5, 5), textcoords="offset points")
        for row in others:
            _diamonds(axes, row, collapse)
        axes.plot(dense["params"], finite(dense["ppl"]), "s", color=INK, ms=7)
        axes.margins(0.1, 0.16)
        axes.set_xlabel("parameters")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(lambda value, _: count(value))
        scale(axes, [row["ppl"] for row in lines] + [row[key] for row in rounds + others for key in keys])

    points = "; ".join(f"{row['stage']} {percent(row['sparsity'])}: {number(row['ppl'])}" for row in rows)
    return draw(f"Perplexity against size{', with the collapse' if collapse else ''}. {points}", paint)


def _diamonds(axes: Axes, row: Row, collapse: bool) -> None:
    """A student beside the rounds: hollow just after pruning, full and with its spread after distillation."""
    x, y = row["params"], finite(row["ppl"])
    axes.plot(x, y, "D", color=BASELINE, ms=6.5)
    if collapse:
        axes.plot(x, finite(row["pre_ppl"]), "D", color=BASELINE, mfc="none", ms=6.5)
        return
    axes.annotate(short(row["stage"]), (x, y), (6, -13), textcoords="offset points")
    if row["std"]:
        axes.errorbar(x, y, row["std"], color=BASELINE, capsize=4)


def recovery_chart(stage: str, curves: Sequence[Curve], dense: float | None) -> Markup:
    """Validation perplexity by step, a line per seed. Ring: before distillation; star: the step kept."""

    def paint(axes: Axes) -> None:
        axes.axhline(finite(dense), color=INK, lw=1.1, ls=(0, (5, 2)))
        values = [dense]
        for i, curve in enumerate(curves):
            points = {point["step"]: finite(point["valid_ppl"]) for point in curve["points"]}
            start, best, hue = min(points), curve["best_step"], SERIES[i % 8]
            axes.plot(list(points), list(points.values()), ".-", color=hue, lw=1.6, ms=4)
            axes.plot(start, points[start], "o", color=hue, mfc="none", ms=8)
            axes.plot(best, points.get(best, math.nan), "*", color=hue, ms=13)
            values += points.values()
        axes.margins(0.05, 0.12)
        axes.set_xlabel("optimiser step")
        scale(axes, values)

    return draw(f"Validation perplexity of {stage} by step; its ends are in the caption.", paint, 4, 2.3)


def domain_chart(rows: Sequence[Row], domains: Sequence[str]) -> Markup:
    """A row a stage, a mark a domain: perplexity relative to dense. A wide row is drift."""
    from matplotlib.ticker import FixedLocator, NullLocator

    base = rows[0]["domains"]
    ratios = [[finite(row["domains"].get(d)) / finite(base.get(d)) for d in domains] for row in rows[1:]]
    known = [ratio for line in ratios for ratio in line if math.isfinite(ratio)]
    low, high = min(0.95, *known, 1) / 1.05, max(1.05, *known, 1) * 1.05
    marks = next(marks for spread, marks in RATIOS.items() if high / low <= spread)
    ticks = [tick for tick in marks if low <= tick <= high]
    every = -(-len(ticks) // 6)

    def paint(axes: Axes) -> None:
        axes.axvline(1.0, color=INK, lw=1.1)
        for y, line in enumerate(ratios):
            for i, ratio in enumerate(line):
                axes.plot(ratio, y, MARKERS[i % 8], color=SERIES[i % 8], ms=7, clip_on=False)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(ticks[ticks.index(1) % every :: every]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda ratio, _: f"{ratio:,g} ×")
        axes.set_xlim(low, high)
        axes.set_ylim(len(ratios) - 0.5, -0.5)
        axes.set_yticks(range(len(ratios)), [short(row["stage"]) for row in rows[1:]])
        axes.set_xlabel("perplexity relative to dense")

    label = "Perplexity by domain relative to dense; figures in the table below."
    return draw(label, paint, height=0.7 + 0.3 * len(rows))
