"""Manifests of caches that no capture made."""

from typing import Any

from sparsekd_ray.teacher.manifest import CacheManifest


def cache_manifest(**values: Any) -> CacheManifest:
    """A manifest of a plain top-8 cache, with these values in place of the defaults."""
    defaults: dict[str, Any] = {
        "signal": "topk",
        "codec": "plain",
        "k": 8,
        "temperatures": (2.0,),
        "vocab_size": 512,
        "tokenizer_hash": "dd44",
        "teacher": "aa11",
        "corpus": "bb22",
        "shard_rows": (8,),
        "rows": 8,
        "tokens": 0,
        "dtype": "float32",
    }
    return CacheManifest(**defaults | values)
