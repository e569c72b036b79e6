"""Reads settings from a YAML file. Errors name the file, the key, and the nearest known key."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from sparsekd_ray.config.base import Settings
from sparsekd_ray.config.tree import Config
from sparsekd_ray.errors import ConfigError

SHIPPED = Path(__file__).parent.parent / "configs"


def shipped() -> dict[str, Path]:
    """The configurations that come with the package, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def load(path: Path | str) -> Config:
    """Reads a YAML file, or the shipped configuration of that name. A ConfigError names the file and all wrong keys."""
    path = shipped().get(str(path), Path(path))
    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file. Shipped configurations, which need no path: {', '.join(shipped())}"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} is not a YAML file: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: expected a YAML mapping of settings, as in {SHIPPED / 'laptop.yaml'}, found {type(tree).__name__}"
        )
    return parse(tree, str(path))


def parse(tree: dict[str, Any], origin: str) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{origin}: {explain(e)}" for e in error.errors())) from None


def explain(error: Any) -> str:
    """One line for one pydantic error: the key, the value found, what is allowed, the nearest known key."""
    where = ".".join(str(part) for part in error["loc"]) or "settings"
    if error["type"] != "extra_forbidden":
        value = "" if isinstance(error["input"], dict) else f" (found {error['input']!r})"
        return f"{where}: {error['msg'].removeprefix('Value error, ')}{value}"
    known = _known_keys(error["loc"][:-1])
    close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
    return f"{where}: unknown setting; {hint}"


def _known_keys(path: tuple[Any, ...]) -> list[str]:
    """Field names of the settings class found by walking `path` from the root."""
    model: Any = Config
    for part in path:
        if isinstance(part, str):
            model = _settings_class(model.model_fields[part].annotation)
    return list(model.model_fields)


def _settings_class(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    return next(
        (inner for arg in getattr(annotation, "__args__", ()) if (inner := _settings_class(arg))), None
    )
