"""How a report writes a figure (`number`, `signed`, …) and draws one, as inline SVG that needs nothing else.

Charts are drawn by matplotlib in stand-in colours that become CSS variables, so that one drawing serves a
light and a dark page; text stays text, in the page's font. The graph of the steps is drawn by hand: one row a
step; each result's line runs down its own lane to the last step that reads it. Same input, same bytes.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]

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
ROW_PX, LANE_PX = (
    46,
    16,
)  # height of a row of the graph (the page's CSS says the same), distance between lanes


def number(value: float | None) -> str:
    """A perplexity in about four figures: 21.06, 681.4, 681,606, 1.25e+07; – where there is none."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    if abs(value) >= 1e7:
        return f"{value:.3g}"
    return f"{value:,.{2 if abs(value) < 100 else 1 if abs(value) < 1000 else 0}f}"


def percent(share: float | None, digits: int = 1) -> str:
    return (
        "–" if share is None or not math.isfinite(share) else f"{share * 100:,.{digits}f} %".replace("-", "−")
    )


def signed(change: float | None) -> str:
    """A relative change: +2.1 %, −15.1 %; without decimals from tenfold upwards."""
    if change is None or math.isnan(change):
        return "–"
    return f"{change * 100:+,.{1 if abs(change) < 10 else 0}f} %".replace("-", "−").replace("inf", "∞")


def count(n: float | None) -> str:
    """Parameters or tokens: 352, 98.3 k, 1.25 M, 3.84 B."""
    if n is None:
        return "–"
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{n / size:.{2 - (abs(n) >= 10 * size) - (abs(n) >= 100 * size)}f} {unit}"
    return f"{n:,.0f}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


def short(name: str, limit: int = 18) -> str:
    """A name that fits beside a chart."""
    name = " ".join(str(name).split())
    return name if len(name) <= limit else name[: limit - 1] + "…"


def colour(i: int) -> str:
    return f"var(--s{i % 8})"


def finite(value: float | None) -> float:
    """`value`, or NaN, which matplotlib leaves out."""
    return float(value) if value is not None and math.isfinite(value) else math.nan


def draw(label: str, paint: Callable[["Axes"], None], width: float = 4.5, height: float = 3) -> Markup:
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


def scale(axes: "Axes", values: Sequence[float | None]) -> None:
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
    looks = {"ppl": (SERIES[0], "o-"), "pre_ppl": (SERIES[1], "o:"), "oneshot_ppl": (SERIES[4], "X--")}
    keys = list(looks) if collapse else ["ppl"]

    def at(row: Row, key: str) -> float:
        """Parameters; of a one-shot cut those that plain SVD keeps, where a round's method keeps another number."""
        removed = row["sparsity_requested"] * dense["mlp_params"]
        return dense["params"] - removed if key == "oneshot_ppl" else row["params"]

    def paint(axes: "Axes") -> None:
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


def _diamonds(axes: "Axes", row: Row, collapse: bool) -> None:
    """A student beside the rounds: hollow just after pruning, full and with its spread after distillation."""
    x, y = row["params"], finite(row["ppl"])
    axes.plot(x, y, "D", color=BASELINE, ms=6.5)
    if collapse:
        axes.plot(x, finite(row["pre_ppl"]), "D", color=BASELINE, mfc="none", ms=6.5)
        return
    axes.annotate(short(row["stage"]), (x, y), (6, -13), textcoords="offset points")
    if row["std"]:
        axes.errorbar(x, y, row["std"], color=BASELINE, capsize=4)


def recovery_chart(stage: str, curves: Sequence[Row], dense: float | None) -> Markup:
    """Validation perplexity by step, a line per seed. Ring: before distillation; star: the step kept."""

    def paint(axes: "Axes") -> None:
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

    def paint(axes: "Axes") -> None:
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


def drawn_inputs(steps: Sequence[Row]) -> list[list[int]]:
    """For each step the earlier steps it reads, without those that another of its inputs already implies."""
    position = {step["name"]: i for i, step in reversed(list(enumerate(steps)))}
    above: list[set[int]] = []
    drawn: list[list[int]] = []
    for i, step in enumerate(steps):
        direct = {j for j in (position.get(name, i) for name in step["inputs"]) if j < i}
        implied = set().union(*(above[j] for j in direct))
        above.append(direct | implied)
        drawn.append(sorted(direct - implied))
    return drawn


def lanes(drawn: Sequence[Sequence[int]]) -> list[int]:
    """A lane for each step, its own until the last step that reads it: no line crosses another's mark."""
    last = [max((i for i, inputs in enumerate(drawn) if j in inputs), default=j) for j in range(len(drawn))]
    free_from: list[int] = []
    placed: list[int] = []
    for i, inputs in enumerate(drawn):
        home = placed[inputs[-1]] if inputs else 0
        free = [lane for lane, row in enumerate(free_from) if row <= i] or [len(free_from)]
        lane = min(free, key=lambda lane: (abs(lane - home), -lane))
        free_from += [0] * (lane + 1 - len(free_from))
        free_from[lane] = max(last[i], i + 1)
        placed.append(lane)
    return placed


def graph(steps: Sequence[Row]) -> tuple[Markup, int]:
    """The lines and marks of the cascade, top to bottom, and the width in pixels they take beside names."""
    drawn = drawn_inputs(steps)
    placed = lanes(drawn)
    hue = {kind: colour(i) for i, kind in enumerate(dict.fromkeys(step["kind"] for step in steps))}
    gap = min(LANE_PX, 128 / (max(placed, default=0) + 1))
    at = [(10 + gap * lane, ROW_PX * (i + 0.5)) for i, lane in enumerate(placed)]
    lines, marks = [], []
    for (x, y), step, inputs in zip(at, steps, drawn, strict=True):
        marks.append(
            Markup('<circle cx="{:g}" cy="{:g}" r="5.5" fill="{}"/>').format(x, y, hue[step["kind"]])
        )
        for j in inputs:
            (x0, y0), bend = at[j], math.copysign(min(gap, 10), x - at[j][0])
            path = f"V{y:g}" if x0 == x else f"V{y - 10:g}Q{x0:g} {y:g} {x0 + bend:g} {y:g}H{x:g}"
            stroke = hue[steps[j]["kind"]]
            lines.append(Markup('<path d="M{:g} {:g}{}" stroke="{}"/>').format(x0, y0, path, stroke))
    width, height = round(20 + gap * max(placed, default=0)), ROW_PX * len(steps)
    head = '<svg class="lanes" width="{0}" height="{1}" viewBox="0 0 {0} {1}" aria-hidden="true">'
    return Markup(head).format(width, height) + Markup("").join([*lines, *marks]) + Markup("</svg>"), width
