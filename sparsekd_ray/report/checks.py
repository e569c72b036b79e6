"""Compares a run with the results that a reproduction of SparseKD is expected to show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sparsekd_ray.report.comparing import compared, excess, of_kind, with_size
from sparsekd_ray.report.document import Row, Summary
from sparsekd_ray.report.formatting import number, percent

COLLAPSE, RECOVERED, PARITY = 5.0, 0.90, 1.05


class Measured(NamedTuple):
    figure: str
    met: bool | None
    """None if it was not measured."""
    sentence: str


class Check(NamedTuple):
    name: str
    expected: str
    figure: str
    met: bool | None
    sentence: str


def checks(summary: Summary) -> list[Check]:
    """The three expectations. The sentence of one that is not met says so."""
    dense, rounds = summary["rows"][0], of_kind(summary, "round")
    return [
        _check("Collapse without training", f"at least {COLLAPSE:g} × dense", _collapse(dense, rounds)),
        _check("Least recovered in a round", f"at least {percent(RECOVERED, 0)}", _recovery(dense, rounds)),
        _check("At the smallest sparsity", f"at most {PARITY:g} × dense", _parity(dense, rounds)),
    ]


def _check(name: str, expected: str, measured: Measured) -> Check:
    missed = f"Not as expected ({expected}): " if measured.met is False else ""
    return Check(name, expected, measured.figure, measured.met, missed + measured.sentence)


def _collapse(dense: Row, rounds: Sequence[Row]) -> Measured:
    measured = [(row, row["oneshot_ppl"]) for row in rounds if row["oneshot_ppl"] is not None]
    if not measured:
        return Measured("–", None, "The collapse of plain SVD without training was not measured.")
    row, ppl = measured[-1]
    ratio = ppl / dense["ppl"]
    sentence = (
        f"Plain SVD at {percent(row['sparsity_requested'], 0)} sparsity, without training, has perplexity "
        f"{number(ppl)}: {number(ratio)} × dense ({number(dense['ppl'])})."
    )
    return Measured(f"{number(ratio)} ×", ratio >= COLLAPSE, sentence)


def _recovery(dense: Row, rounds: Sequence[Row]) -> Measured:
    pruned = [row for row in rounds if row["pre_ppl"] is not None]
    shares = sorted(
        (row["recovered"], row["stage"])
        for row in pruned
        if row["recovered"] is not None and excess(row, dense) is not None
    )
    idle = [row for row in pruned if excess(row, dense) is None]
    moves = ", ".join(f"{row['stage']} ({number(row['pre_ppl'])} → {number(row['ppl'])})" for row in idle)
    note = f" Pruning left these at most 1 % above dense, with nothing to recover: {moves}." if idle else ""
    if not shares:
        return Measured("–", None, f"No round had a measured excess over dense to recover.{note}")
    listed = ", ".join(f"{stage} {percent(share)}" for share, stage in shares)
    beyond = " (above 100 %: better than dense)" if shares[-1][0] > 1 else ""
    sentence = (
        f"Distillation recovered this share of the excess over dense, least first: {listed}{beyond}.{note}"
    )
    return Measured(percent(shares[0][0]), shares[0][0] >= RECOVERED, sentence)


def _parity(dense: Row, rounds: Sequence[Row]) -> Measured:
    if not rounds:
        return Measured("–", None, "There was no round of pruning.")
    row, ratio = rounds[0], rounds[0]["ppl"] / dense["ppl"]
    sentence = (
        f"{with_size(row)}, the smallest sparsity, ends at perplexity {number(row['ppl'])}: "
        f"{number(ratio)} × dense ({compared(row, dense)})."
    )
    return Measured(f"{number(ratio)} ×", ratio <= PARITY, sentence)
