"""How two models of a run are compared: by perplexity, with a margin for noise."""

from __future__ import annotations

from sparsekd_ray.report.document import Kind, Row, Summary
from sparsekd_ray.report.formatting import percent, signed

TIE = 0.01  # with one seed, smaller relative differences are called ties


def change(row: Row, base: Row) -> float:
    """Relative difference in perplexity; below 0, `row` is better."""
    return row["ppl"] / base["ppl"] - 1


def verdict(row: Row, base: Row) -> str:
    """Better, worse or a tie: within 1 % with one seed, within both standard deviations with several."""
    margin = ((row["std"] or 0) + (base["std"] or 0)) / base["ppl"] or TIE
    return "a tie" if abs(change(row, base)) < margin else "better" if row["ppl"] < base["ppl"] else "worse"


def compared(row: Row, base: Row) -> str:
    return f"{signed(change(row, base))}, {verdict(row, base)}"


def excess(row: Row, base: Row) -> float | None:
    """Perplexity just after pruning minus that of `base`; None for a tie, since it leaves nothing to recover."""
    pre = row["pre_ppl"]
    return pre - base["ppl"] if pre is not None and pre > base["ppl"] * (1 + TIE) else None


def of_kind(summary: Summary, kind: Kind) -> list[Row]:
    """The rows of a kind, by growing sparsity."""
    return sorted((row for row in summary["rows"] if row["kind"] == kind), key=lambda row: row["sparsity"])


def students(summary: Summary) -> list[Row]:
    """The rounds, then the baselines."""
    return of_kind(summary, "round") + of_kind(summary, "baseline")


def with_size(row: Row) -> str:
    """A student's name with its sparsity. A baseline's name states it already."""
    return row["stage"] if row["kind"] == "baseline" else f"{row['stage']} ({percent(row['sparsity'], 0)})"
