"""Fingerprints of steps: a digest of what bears on an artifact's numbers.

It covers the kind of step and the version of its code, its own settings and its inputs' fingerprints. Nothing of
`execution` enters it, so another store, another number of GPUs or a second machine finds the same artifacts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

# raised when a stage's code changes what it computes, so that older artifacts are not taken for new ones
VERSIONS = {
    "tokenizer": 2,
    "corpus": 4,
    "dense": 3,
    "cache": 2,
    "statistics": 2,
    "prune": 2,
    "distill": 2,
    "evaluate": 4,
    "export": 2,
}


def of_step(kind: str, identity: Mapping[str, object], inputs: Mapping[str, str]) -> str:
    """The fingerprint of a step. `inputs`: the fingerprint of the artifact in each role."""
    parts = {"kind": kind, "version": VERSIONS[kind], "identity": identity, "inputs": inputs}
    return fingerprint(parts)


def fingerprint(value: object) -> str:
    """First 12 hex digits of the SHA-256 of `value` as canonical JSON. ValueError for NaN and infinity."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()[:12]
