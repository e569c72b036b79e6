"""The picture and the table of a run: what is shown, what is left out, the same bytes twice."""

import json
import re
from pathlib import Path

from sparsekd_ray.report import picture

ROWS = [
    {"stage": "Dense", "kind": "dense", "sparsity": 0.0, "oneshot_ppl": None, "pre_ppl": None, "ppl": 46.1},
    {"stage": "Dense + KD", "kind": "control", "sparsity": 0.0, "oneshot_ppl": None, "pre_ppl": None, "ppl": 42.4},
    {"stage": "Round 1", "kind": "round", "sparsity": 0.15, "oneshot_ppl": 52.3, "pre_ppl": 50.1, "ppl": 43.5},
    {"stage": "Round 2", "kind": "round", "sparsity": 0.65, "oneshot_ppl": None, "pre_ppl": 93.1, "ppl": 46.2},
    {"stage": "neurons 65%", "kind": "baseline", "sparsity": 0.65, "oneshot_ppl": None, "pre_ppl": 62.0, "ppl": 45.9},
]  # fmt: skip
SUMMARY = {
    "run": "laptop",
    "protocol": {"window": 128, "stride": 64},
    "seeds": [42],
    "settings": {"execution": {"store": "/home/somebody"}},
    "rows": [row | {"vs_dense": row["ppl"] / 46.1 - 1, "artifact": "a/b"} for row in ROWS],
}


def test_the_same_figures_give_the_same_drawing_and_no_path_of_a_machine_is_kept(
    tmp_path: Path, capsys
) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    picture.main(tmp_path / "summary.json", tmp_path / "first.svg")
    picture.main(tmp_path / "first.json", tmp_path / "second.svg")
    for kind in ("svg", "json"):
        assert (tmp_path / f"first.{kind}").read_bytes() == (tmp_path / f"second.{kind}").read_bytes()
    kept = json.loads((tmp_path / "first.json").read_text())
    assert set(kept) == {"run", "protocol", "seeds", "rows"} and "artifact" not in kept["rows"][0]
    assert "| Round 1 | 15 % | 50.10 | **43.50** | −5.6 % |" in capsys.readouterr().out


def test_the_table_has_a_line_for_every_model_and_no_difference_of_dense_to_itself() -> None:
    lines = picture.table(SUMMARY["rows"]).splitlines()
    assert len(lines) == 2 + len(ROWS) and len({len(re.findall(r"\|", line)) for line in lines}) == 1
    assert lines[2] == "| Dense | – | – | **46.10** | – |"


def test_the_picture_of_the_readme_is_drawn_from_the_figures_beside_it(tmp_path: Path) -> None:
    docs = Path(__file__).parents[2] / "docs"
    figures = json.loads((docs / "demo.json").read_text())
    table = picture.table(figures["rows"])
    assert table in (docs.parent / "README.md").read_text()
    assert (docs / "demo.svg").read_text().startswith("<?xml")
