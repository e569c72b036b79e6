"""The graph of a run's steps, one row for each step.

A result's line runs down a lane of its own to the last step that reads it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from sparsekd_ray.report.charts import colour
from sparsekd_ray.report.document import StepRow

ROW_PX = 46  # height of a row; the page's CSS says the same
LANE_PX = 16  # distance between lanes


def drawn_inputs(steps: Sequence[StepRow]) -> list[list[int]]:
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


def graph(steps: Sequence[StepRow]) -> tuple[Markup, int]:
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
