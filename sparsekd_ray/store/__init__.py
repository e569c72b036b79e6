"""Artifacts on local disk or S3, shared by every run that sees the same root."""

from sparsekd_ray.store.artifacts import Store, locate
from sparsekd_ray.store.record import Record, Ref

__all__ = ["Record", "Ref", "Store", "locate"]
