"""The command that a run prints for loading its model: it runs as printed, from any place."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
from models import dense_directory, sparse_directory
from records import record

from sparsekd_ray.cascade.job import load_command
from sparsekd_ray.cascade.steps import ExportSettings, Step
from sparsekd_ray.store import Ref, Store

REF = Ref("export", "student", "0123abcd")
METRICS: dict[str, dict[str, Any]] = {"low-rank": {"params": 1}, "stock": {"params": 1}}


def step() -> Step:
    return Step("export round 1", "export", REF, {}, {}, ExportSettings(0.3, "svd"))


@pytest.mark.parametrize("form", ["low-rank", "stock"])
def test_a_local_model_is_loaded_from_a_store_of_any_name(form: str, tmp_path: Path) -> None:
    store = Store(str(tmp_path / """it's "my" store (v2) $HOME""" / "é"))
    folder = Path(store.root, REF.key, form)
    folder.parent.mkdir(parents=True)
    (sparse_directory if form == "low-rank" else dense_directory)(folder, "phi3", True)
    command = load_command(store, step(), record(REF, {form: METRICS[form]}, 1.0))
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "ForCausalLM(" in done.stdout, done.stderr


def test_a_model_on_s3_is_copied_with_what_is_installed(s3_server: Any, tmp_path: Path) -> None:
    store = Store(f"s3://{s3_server.bucket}/commands", str(tmp_path / "scratch"))
    source = dense_directory(tmp_path / "stock", "phi3", True)
    for file in source.iterdir():
        store.write_bytes(f"{REF.key}/stock/{file.name}", file.read_bytes())
    command = load_command(store, step(), record(REF, {"stock": METRICS["stock"]}, 1.0))
    for _ in range(2):  # a copy that is there already is no obstacle
        done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and "ForCausalLM(" in done.stdout, done.stderr
