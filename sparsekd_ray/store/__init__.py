"""Artifacts on local disk or S3, shared by every run that sees the same root."""

from sparsekd_ray.store.artifacts import Ref, Store, locate

__all__ = ["Ref", "Store", "locate"]
