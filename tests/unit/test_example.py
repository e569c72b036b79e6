"""The example runs as it is printed: one process, no Ray, a directory or nothing at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from models import dense_directory

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("given", [False, True], ids=["bare machine", "directory"])
def test_the_method_in_one_process(given: bool, tmp_path: Path) -> None:
    model = ["--model", str(dense_directory(tmp_path / "model", "qwen3", True))] if given else []
    command = [
        sys.executable,
        "-X",
        "importtime",
        "examples/kd_loop.py",
        "--steps",
        "4",
        "--sequences",
        "80",
        *model,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    names = [line.split("  ")[0] for line in done.stdout.splitlines()]
    assert names == ["dense", "pruned", "pruned, distilled"]
    assert not any(line.rpartition("|")[2].strip() == "ray" for line in done.stderr.splitlines())


def test_it_is_short() -> None:
    assert len((ROOT / "examples" / "kd_loop.py").read_text().splitlines()) <= 120
