"""Fingerprints of steps: digests of everything that decides an artifact's numbers.

A fingerprint covers the kind of step, the version of its code, its settings and its inputs' fingerprints. Nothing of
`execution` enters it, so a run with another store, number of GPUs or machine has the same fingerprints.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

# A version is raised when a stage's code changes its results, so that older artifacts are not used as new ones.
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
