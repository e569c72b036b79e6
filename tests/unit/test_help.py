"""Help: every setting says what it is."""

from collections.abc import Iterator
from typing import Any, get_args

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


def test_every_setting_says_what_it_is() -> None:
    assert sorted(set(silent(Config))) == []
