"""The manifest of a cache: the content of its shards, and the model and text they belong to.

Capture writes it as `manifest.json` once every shard is there. The trainer reads it and refuses a cache that does not
belong to its student, so nobody types these values twice.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from sparsekd_ray.errors import IntegrityError, ModelError

FORMAT = "sparsekd-signal-1"
MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class CacheManifest:
    signal: Literal["topk", "sampled"]
    codec: Literal["plain", "compact"]
    k: int
    """Ids per position of `topk`."""
    temperatures: tuple[float, ...]
    """Temperatures whose log-normaliser is stored; for a sample, the temperature at which it was drawn."""
    vocab_size: int
    """Width of the teacher's logits, which may exceed the tokenizer's vocabulary."""
    tokenizer_hash: str
    teacher: str
    """Fingerprint of the model."""
    corpus: str
    """Fingerprint of the text."""
    shard_rows: tuple[int, ...]
    """Rows of each shard."""
    rows: int
    tokens: int
    dtype: Literal["float32", "bfloat16"]
    """Type of the teacher's weights during the capture."""
    seq_len: int | None = None
    """Tokens of every row; None where rows differ in length."""
    threshold: float | None = None
    """The sampler's threshold: probabilities from this value on are kept exactly. None for `topk`."""
    format: str = FORMAT

    @property
    def drawn_weight(self) -> float:
        """Probability that each drawn id of a sample stands for: the threshold."""
        assert self.threshold is not None, "a sample has a threshold"
        return self.threshold

    @property
    def readable_temperatures(self) -> tuple[float, ...]:
        """Temperatures at which a shard can be decoded: 1 needs no normaliser, so `topk` always has it."""
        if self.signal == "sampled":
            return self.temperatures
        return (1.0, *(t for t in self.temperatures if t != 1.0))

    def normaliser_index(self, temperature: float) -> int | None:
        """Where the log-normaliser of `temperature` is stored; None at 1 for `topk`, where it is 0.

        ModelError for a temperature that the cache does not hold.
        """
        if temperature in self.temperatures:
            return self.temperatures.index(temperature)
        if temperature in self.readable_temperatures:
            return None
        readable = ", ".join(f"{t:g}" for t in self.readable_temperatures)
        raise ModelError(
            f"the cache can be read at the temperatures {readable}, not at {temperature:g}: add it to "
            "teacher.temperatures and capture again"
        )

    def require(self, *, tokenizer_hash: str, vocab_size: int, teacher: str, corpus: str) -> None:
        """ModelError unless this tokenizer, vocabulary, teacher and corpus made the cache."""
        expected = {
            "format": FORMAT,
            "tokenizer_hash": tokenizer_hash,
            "vocab_size": vocab_size,
            "teacher": teacher,
            "corpus": corpus,
        }
        for name, value in expected.items():
            if (stored := getattr(self, name)) != value:
                raise ModelError(
                    f"the teacher cache does not belong to this student: its {name} is {stored!r}, the student's is "
                    f"{value!r}. Capture the cache again from a teacher that shares it."
                )

    def write(self, directory: Path) -> None:
        values = {name: value for name, value in asdict(self).items() if value is not None}
        (directory / MANIFEST).write_text(json.dumps(values, indent=1, sort_keys=True))


def read_manifest(directory: Path) -> CacheManifest:
    """The manifest in a cache's directory. IntegrityError if it is not one of this version."""
    path = directory / MANIFEST
    try:
        values = json.loads(path.read_text())
        known = {field.name for field in fields(CacheManifest)}
        if not isinstance(values, dict) or set(values) - known:
            raise ValueError(f"unknown entries {sorted(set(values) - known)}")
        values |= {name: tuple(values[name]) for name in ("temperatures", "shard_rows")}
        return CacheManifest(**values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{path} is no manifest of format {FORMAT}: {error}. Remove the cache's directory and capture it again."
        ) from None
