"""How figures are written for readers. A figure that does not exist is –."""

from __future__ import annotations

import math


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
