"""The command as a user types it: help is fast, bad input ends in one clear message and a status that is not 0."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import models
import pytest

from sparsekd_ray import cli
from sparsekd_ray.commands import COMMANDS
from sparsekd_ray.config import load

ROOT = Path(__file__).parents[2]


JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py"))
STAGES = ("corpus", "capture", "prune", "distill", "evaluate", "export")


def run(*arguments: str, job: str = "cascade", **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"jobs/{job}.py", *arguments]
    known = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=ROOT, env=known | environment, capture_output=True, text=True, timeout=100
    )


def result(found: subprocess.CompletedProcess[str]) -> Any:
    """What the last line of a command's output holds."""
    last = found.stdout.splitlines()[-1]
    assert last.startswith("RESULT "), last
    return json.loads(last.removeprefix("RESULT "))


def test_there_is_a_job_for_every_stage_and_every_job_is_a_command():
    assert set(STAGES) | {"cascade", "cache"} == set(JOBS)
    assert set(JOBS) | {"configs"} == set(COMMANDS)


@pytest.mark.parametrize("job", JOBS)
def test_help_is_fast_and_imports_nothing_heavy(job):
    code = (
        "import sys, runpy, time; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print(time.process_time(), {'torch', 'ray', 'transformers', 'pyarrow', 'numpy'} & set(sys.modules))"
    )
    path = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, f"jobs/{job}.py", *(["run"] if job == "prune" else []), "--help"]
    found = subprocess.run(command, cwd=ROOT, env=path, capture_output=True, text=True, check=True)
    seconds, heavy = found.stdout.splitlines()[-1].split(maxsplit=1)
    assert heavy == "set()" and float(seconds) < 1.5
    assert ("--distill.temperature" in found.stdout and "--dry-run" in found.stdout) == (job != "cache")


@pytest.mark.parametrize("job", JOBS)
def test_a_job_leaves_the_module_path_alone(job):
    text = (ROOT / "jobs" / f"{job}.py").read_text()
    assert "sys.path" not in text and len(text.splitlines()) <= 40


def test_the_shipped_configurations_are_listed_and_found_by_name():
    found = subprocess.run(
        [sys.executable, "-c", "from sparsekd_ray.cli import main; main(['configs'])"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(result(found)) == {"laptop", "phi4_mini", "qwen3_0_6b"}
    assert load("laptop") == load(ROOT / "jobs" / "configs" / "laptop.yaml")


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
    assert found.returncode == 1 and "GPT2" in found.stderr and "phi3" in found.stderr


def test_a_cluster_that_does_not_answer_is_said_within_seconds(tmp_path):
    started = time.monotonic()
    found = run("--execution.store", str(tmp_path / "store"), RAY_ADDRESS="127.0.0.1:1")
    assert found.returncode == 1 and "RAY_ADDRESS=127.0.0.1:1" in found.stderr
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    "job, arguments, last",
    [
        ("cascade", [], "export svd-whitened 65%"),
        ("corpus", [], "corpus"),
        ("capture", [], "cache dense"),
        ("prune", ["run", "--sparsity", "0.3"], "export pruned"),
        ("distill", ["--sparsity", "0.3"], "export student"),
        ("evaluate", [str(ROOT / "model")], "evaluate model"),
    ],
)
def test_a_dry_run_prints_the_plan_and_writes_nothing(job, arguments, last, tmp_path):
    if job == "evaluate":
        folder = models.dense_directory(tmp_path / "model", "qwen3", True)
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "w6"}))
        arguments = [str(folder)]
    found = run(*arguments, "--execution.store", str(tmp_path / "store"), "--dry-run", job=job)
    assert found.returncode == 0 and "0 done" in found.stdout, found.stderr
    assert result(found)["dry_run"] is True and result(found)["missing"][-1] == last
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("job, commands", [("prune", ["run", "compare"]), ("cache", ["verify", "show"])])
@pytest.mark.parametrize("arguments", [["--help"], []], ids=" ".join)
def test_a_job_of_several_commands_lists_them(job, commands, arguments):
    found = run(*arguments, job=job)
    assert found.returncode == 0 and all(command in found.stdout for command in commands)


@pytest.mark.parametrize(
    "job, arguments, message",
    [
        ("distill", ["--sparsity", "1"], "--sparsity 1: give a share between 0 and 1"),
        ("distill", [], "--sparsity"),
        ("distill", ["--sparsity", "0.9999"], "can remove at most"),
        ("evaluate", ["/no/such/model"], "'/no/such/model' is no directory"),
        ("evaluate", ["/elsewhere/artifacts/distill/a-0123456789ab"], "give --execution.store /elsewhere"),
        ("export", ["store/model"], "is no artifact"),
        (
            "export",
            ["store/artifacts/cache/top32-0123456789ab"],
            "is of the kind cache; allowed: prune, distill",
        ),
        ("export", ["store/artifacts/prune/svd-0123456789ab"], "is no finished artifact"),
    ],
)
def test_bad_input_of_a_stage_is_explained_before_any_work(job, arguments, message):
    found = run(*arguments, job=job)
    assert found.returncode != 0
    assert message in found.stdout + found.stderr and "Traceback" not in found.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["walk"], "walk"),
        (["run"], "a pruning has one size"),
        (["run", "--sparsity", "0.3", "0.5"], "Unrecognized options: 0.5"),
        (["run", "--sparsity", "1.5"], "--sparsity 1.5: give a share between 0 and 1"),
        (["run", "--sparsity", "half"], "half"),
        (["run", "--sparsity", "0.3", "--methods", "svd"], "--methods"),
        (["run", "--sparsity", "0.3", "--prune.method", "svdd"], "svdd"),
        (["run", "--sparsity", "0.9999", "--dry-run"], "can remove at most"),
        (["compare", "--draws", "0"], "--draws 0: one sample"),
        (["compare", "--methods", "svd", "magic"], "no pruning method 'magic'"),
        (
            ["compare", "--methods", "sdm", "--sparsity", "0.5", "--teacher.temperatures", "1.5", "2"],
            "add it to teacher.temperatures",
        ),
        (["run", "--energy", "0.9", "--prune.method", "neurons"], "neurons has none: give --sparsity"),
        (["run", "--energy", "0.9", "--sparsity", "0.5"], "a pruning has one size"),
        (["compare", "--methods", "svd", "--sparsity", "0"], "give a share between 0 and 1"),
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


def test_a_store_of_the_first_version_is_refused_before_any_work(tmp_path):
    record = tmp_path / "artifacts/corpus/old-0123456789ab/record.json"
    record.parent.mkdir(parents=True)
    record.write_text("{}")
    for more in ([], ["--dry-run"]):
        found = run("--execution.store", str(tmp_path), *more)
        assert found.returncode == 1 and "has format 1" in found.stderr and "Traceback" not in found.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [record]


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--dry-run"], ["--distill.alpha", "3"], ["--config", "é.yaml"]], ids=" ".join
)
def test_output_that_takes_only_ascii_ends_no_command(arguments, tmp_path):
    found = run(*arguments, "--execution.store", str(tmp_path), PYTHONIOENCODING="ascii")
    assert "Traceback" not in found.stderr and (found.stdout + found.stderr).isascii()
    assert (found.returncode == 0) == (arguments[0] in ("--help", "--dry-run"))
