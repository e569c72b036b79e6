"""The command as a user types it: help is fast, bad input ends in one clear message and a status that is not 0."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "jobs/cascade.py", *arguments]
    known = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return subprocess.run(
        command, cwd=ROOT, env=known | environment, capture_output=True, text=True, timeout=100
    )


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from sparsekd_ray import cli\n"
        "try: cli.parse('', ['--help'])\n"
        "except SystemExit: pass\n"
        "print({'torch', 'ray', 'transformers', 'pyarrow'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--distill.temperature" in found.stdout and found.stdout.strip().endswith("set()")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--distil.lr", "3e-4"], "--distill.lr"),
        (["--distill.alpha", "3"], "less than or equal to 1"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--cascade.rounds.2.sparsity", "0.999"], "can remove at most"),
        (["--execution.store", "/proc/nope"], "/proc/nope"),
    ],
)
def test_bad_input_is_explained_before_any_work(arguments, message):
    found = run(*arguments)
    assert found.returncode != 0
    assert message in found.stdout + found.stderr and "Traceback" not in found.stderr


def test_an_unsupported_family_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    config = tmp_path / "c.yaml"
    config.write_text(
        f"model: {{path: {tmp_path}}}\ncorpus: {{sources: [{{name: a, path: 'embedded:code'}}]}}\n"
    )
    found = run("--config", str(config), "--dry-run")
    assert found.returncode == 1 and "gpt2" in found.stderr and "phi3" in found.stderr


def test_a_cluster_that_does_not_answer_is_said_within_seconds(tmp_path):
    started = time.monotonic()
    found = run("--execution.store", str(tmp_path / "store"), RAY_ADDRESS="127.0.0.1:1")
    assert found.returncode == 1 and "RAY_ADDRESS=127.0.0.1:1" in found.stderr
    assert time.monotonic() - started < 60


def test_a_dry_run_writes_nothing(tmp_path):
    found = run("--execution.store", str(tmp_path / "store"), "--dry-run")
    assert found.returncode == 0 and "0 done" in found.stdout
    assert not (tmp_path / "store").exists()
