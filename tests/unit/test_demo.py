"""`make demo` up to the moment at which it submits the job: a stand-in for `ray` notes what it was called with."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RAY = """#!/bin/sh
case "$2" in
submit) shift; printf '%s\\n' "$@" "PYTHONUNBUFFERED=$PYTHONUNBUFFERED" "no_proxy=$no_proxy" "NO_PROXY=$NO_PROXY" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "my checkout"
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / "jobs").mkdir()
    shutil.copy(ROOT / "Makefile", folder)
    shutil.copy(ROOT / "jobs/demo.sh", folder / "jobs")
    for name in ("constraints.txt", "pyproject.toml"):
        (folder / name).touch()
        os.utime(folder / name, (0, 0))
    (folder / ".venv/.installed").touch()
    ray = folder / ".venv/bin/ray"
    ray.write_text(RAY)
    ray.chmod(0o755)
    return folder


def demo(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    unset = ("no_proxy", "NO_PROXY", "RAY_TMPDIR", "TMPDIR", "STORE", "BIN")
    plain = {name: value for name, value in os.environ.items() if name not in unset}
    known = plain | {"RAY_ADDRESS": "http://head:8265"} | environment
    return subprocess.run(["make", "-s", "demo"], cwd=checkout, env=known, capture_output=True, text=True)


def test_a_path_with_a_space_is_one_argument(checkout):
    done = demo(checkout)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[lines.index("--execution.store") + 1] == f"{checkout}/store"


def test_lines_of_the_job_are_not_held_back(checkout):
    assert "PYTHONUNBUFFERED=1" in demo(checkout).stdout


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, "127.0.0.1,localhost"),
        ({"no_proxy": "intra.net"}, "intra.net,127.0.0.1,localhost"),
        ({"NO_PROXY": "intra.net"}, "intra.net,127.0.0.1,localhost"),
    ],
)
def test_a_proxy_is_not_asked_for_this_machine(checkout, given, expected):
    lines = demo(checkout, http_proxy="http://proxy:3128", **given).stdout.splitlines()
    assert f"no_proxy={expected}" in lines and f"NO_PROXY={expected}" in lines


def test_a_temporary_directory_too_long_for_ray_is_refused_at_once(checkout):
    started = time.monotonic()
    done = demo(checkout, TMPDIR="/scratch/" + "x" * 60)
    assert done.returncode and "too long for Ray's sockets: set RAY_TMPDIR=/tmp" in done.stderr
    assert time.monotonic() - started < 5
    assert demo(checkout, TMPDIR="/scratch/" + "x" * 60, RAY_TMPDIR="/tmp").returncode == 0
