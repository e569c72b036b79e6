"""The command as a user types it: help is fast, bad input ends in one clear message and a status that is not 0."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparsekd_ray import cli

ROOT = Path(__file__).parents[2]


def run(*arguments: str, job: str = "cascade", **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"jobs/{job}.py", *arguments]
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


@pytest.mark.parametrize(
    "arguments", [["--help"], [], ["run", "--help"], ["compare", "--help"]], ids=" ".join
)
def test_pruning_tells_how_it_is_called(arguments):
    found = run(*arguments, job="prune")
    assert found.returncode == 0 and "--methods M" in found.stdout and "--sparsity S" in found.stdout
    assert ("--prune.storage" in found.stdout) == (len(arguments) == 2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["walk"], "found 'walk' where `run` or `compare` belongs"),
        (["run"], "run prunes to one size: give one --sparsity S"),
        (["run", "--sparsity", "0.3", "0.5"], "run prunes to one size"),
        (["run", "--sparsity", "1.5"], "--sparsity 1.5: a share between 0 and 1"),
        (["run", "--sparsity", "half"], "invalid float value: 'half'"),
        (["run", "--sparsity", "0.3", "--methods", "svd"], "belong to compare"),
        (["run", "--sparsity", "0.3", "--prune.method", "svdd"], "svdd"),
        (["run", "--sparsity", "0.9999", "--dry-run"], "can remove at most"),
        (["compare", "--draws", "0"], "--draws 0: one sample"),
        (["compare", "--methods", "svd", "magic"], "no pruning method 'magic'"),
        (
            ["compare", "--methods", "sdm", "--sparsity", "0.5", "--teacher.temperatures", "1.5", "2"],
            "add it to teacher.temperatures",
        ),
        (["run", "--energy", "0.9", "--prune.method", "neurons"], "neurons has none: give --sparsity"),
        (["run", "--energy", "0.9", "--sparsity", "0.5"], "in place of --sparsity"),
        (["compare", "--methods", "svd", "--sparsity", "0"], "a share between 0 and 1"),
    ],
)
def test_bad_input_of_a_pruning_is_explained_before_any_work(arguments, message):
    found = run(*arguments, "--execution.store", "/proc/nope", job="prune")
    assert found.returncode == 2
    assert message in found.stdout + found.stderr and "Traceback" not in found.stderr


def test_a_dry_run_of_a_comparison_prints_the_plan_and_writes_nothing(tmp_path):
    options = [
        "--methods",
        "svd",
        "neurons",
        "--sparsity",
        "0.3",
        "0.5",
        "--draws",
        "2",
        "--distill",
        "--dry-run",
    ]
    found = run("compare", *options, "--execution.store", str(tmp_path / "store"), job="prune")
    assert found.returncode == 0 and "0 done" in found.stdout
    assert "neurons 50% draw 1" in found.stdout and "svd 30% draw 0 distilled" in found.stdout
    assert "svd 30% draw 1" not in found.stdout, "no draw changes plain SVD"
    assert not (tmp_path / "store").exists()


def test_a_table_has_a_column_for_each_name_and_a_dash_for_what_is_missing(capsys):
    cli.table([{"a": 1234567, "b": 0.123456}, {"a": None, "c": "text"}])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["a", "b", "c"], ["1,234,567", "0.1235", "–"], ["–", "–", "text"]]
