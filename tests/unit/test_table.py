"""Tables on the console: every value stands in them, whatever the output is."""

import pytest

from sparsekd_ray import cli


def test_a_wide_table_is_not_cut_where_the_output_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    row = {f"column {i}": f"value {i} " + "x" * 20 for i in range(12)}
    cli.table([row])
    head, line = capsys.readouterr().out.splitlines()
    assert all(name in head for name in row) and all(value in line for value in row.values())


def test_cells_are_plain_text_and_what_is_missing_is_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    cli.table(
        [{"method": "[red]svd[/red]", "params": 1003648, "ppl": 46.104999}, {"method": "depth", "ppl": None}]
    )
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["method", "params", "ppl"]
    assert first.split() == ["[red]svd[/red]", "1,003,648", "46.1"]
    assert second.split() == ["depth", "–", "–"]
    assert first.index("46.1") + 4 == second.rindex("–") + 1  # figures end at one column


def test_no_rows_are_no_table(capsys: pytest.CaptureFixture[str]) -> None:
    cli.table([])
    assert capsys.readouterr().out.strip() == ""
