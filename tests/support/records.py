"""Records of artifacts that were never made."""

from typing import Any

from sparsekd_ray.store import Record, Ref


def record(ref: Ref, metrics: dict[str, Any], seconds: float) -> Record:
    return Record(
        ref=ref, identity={}, inputs={}, metrics=metrics, files={}, versions={}, created="", seconds=seconds
    )
