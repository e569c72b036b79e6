"""Help says what every setting is, and which verbs a command has."""

from collections.abc import Iterator
from typing import Any, get_args

import pytest

from sparsekd_ray import cli
from sparsekd_ray.config import Config
from sparsekd_ray.config.base import Settings


def sections(hint: Any) -> Iterator[type[Settings]]:
    """The settings classes in a field's type."""
    if isinstance(hint, type) and issubclass(hint, Settings):
        yield hint
    for inner in get_args(hint):
        yield from sections(inner)


def silent(settings: type[Settings]) -> Iterator[str]:
    for name, field in settings.model_fields.items():
        inner = list(sections(field.annotation))
        if not field.description and not any(section.__doc__ for section in inner):
            yield f"{settings.__name__}.{name}"
        for section in inner:
            yield from silent(section)


@pytest.mark.parametrize(
    "typed, program, options",
    [
        ("prune --sparsity 0.3", "sparsekd prune run", ["--sparsity", "0.3"]),
        ("prune run --sparsity 0.3", "sparsekd prune run", ["--sparsity", "0.3"]),
        ("prune preview --help", "sparsekd prune preview", ["--help"]),
        ("cascade --dry-run", "sparsekd cascade", ["--dry-run"]),
    ],
)
def test_a_pruning_needs_no_second_verb(
    typed: str, program: str, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_call", lambda command, arguments, program: {program: arguments})
    assert cli._run(typed.split()) == {program: options}


@pytest.mark.parametrize("typed", ["prune", "prune --help", "prune -h", "cache --help"])
def test_help_lists_the_verbs(typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli._run(typed.split())
    assert ("preview" if "prune" in typed else "verify") in capsys.readouterr().out


def test_every_setting_says_what_it_is() -> None:
    assert sorted(set(silent(Config))) == []
