"""The name of an artifact, and its record: what the artifact holds and what it was made of."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import PurePosixPath
from typing import Any

from sparsekd_ray.errors import ConfigError

PACKAGES = ("sparsekd-ray", "torch", "transformers", "ray", "deepspeed")


@dataclass(frozen=True)
class Ref:
    """Names one artifact by its kind, a readable name, and the fingerprint of everything that determines it."""

    kind: str
    name: str
    fingerprint: str

    def __post_init__(self) -> None:
        for part in (self.kind, self.name, self.fingerprint):
            if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", part):
                raise ConfigError(
                    f"{part!r} cannot be part of an artifact's path. Allowed are letters, digits and _ . + - "
                    f"(the last three not first). Choose another name."
                )

    @property
    def key(self) -> str:
        return f"artifacts/{self.kind}/{self.name}-{self.fingerprint}"

    @classmethod
    def from_key(cls, key: str) -> Ref:
        """The Ref with this key. Raises ConfigError if the key names no artifact."""
        parts = re.fullmatch(r"artifacts/([^/]+)/([^/]+)-([^/-]+)/?", key)
        if parts is None:
            raise ConfigError(f"{key!r} is no artifact: expected artifacts/<kind>/<name>-<fingerprint>")
        return cls(*parts.groups())


@dataclass(frozen=True)
class StoredFile:
    """The expected size of a file in bytes, and the sha256 of its contents in hex."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Record:
    """The record of an artifact: what it is, what it was made of, and what was measured."""

    ref: Ref
    identity: dict[str, Any]
    """The settings that bear on its numbers."""
    inputs: dict[str, str]
    """Role of every input → key of the artifact."""
    metrics: dict[str, Any]
    files: dict[str, StoredFile]
    """Path below the artifact's directory → expected size and sha256."""
    versions: dict[str, str | None]
    created: str
    """UTC, as 2026-01-31T23:59:59Z."""
    seconds: float
    """How long the artifact took to make."""

    def to_json(self) -> str:
        """The stored form. It has a seal (a checksum), so that a changed figure is found like a changed weight."""
        content = asdict(self)
        content |= content.pop("ref")
        return json.dumps(content | {"seal": _seal(content)}, indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes, ref: Ref) -> Record:
        """The record of `ref`. ValueError, in words, if `text` is not a record of this artifact."""
        content = parse_object(text)
        if content.pop("seal", None) != _seal(content) or not asdict(ref).items() <= content.items():
            raise ValueError("it is not the record of this artifact")
        try:
            files = {path: stored_file(path, described) for path, described in content.pop("files").items()}
            return cls(ref=ref, files=files, **{k: v for k, v in content.items() if k not in asdict(ref)})
        except (KeyError, AttributeError, TypeError):  # sealed by another version
            raise ValueError("it is not the record of this artifact") from None


def stored_file(path: str, described: dict[str, Any]) -> StoredFile:
    """Raises ValueError if `path` leaves its directory: other people may write to a shared bucket."""
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or set(described) != {"size", "sha256"}:
        raise ValueError(f"it lists {path!r}, which no record of this package does")
    return StoredFile(**described)


def parse_object(text: str | bytes) -> dict[str, Any]:
    """A JSON object; empty if the text is anything else."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def installed_versions() -> dict[str, str | None]:
    """Versions of the packages that compute figures, without importing them; None for one that is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        versions[package.replace("-", "_")] = None
        with suppress(metadata.PackageNotFoundError):
            versions[package.replace("-", "_")] = metadata.version(package)
    return versions


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
