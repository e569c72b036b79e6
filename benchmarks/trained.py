"""The trained models and the text of a finished `make demo`, for measurements on something real."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from sparsekd_ray import corpus
from sparsekd_ray.cascade import job
from sparsekd_ray.cascade.steps import Step
from sparsekd_ray.config import load
from sparsekd_ray.errors import ConfigError
from sparsekd_ray.model import loading
from sparsekd_ray.store import Store


class Demo(NamedTuple):
    store: Store
    steps: dict[str, Step]

    def directory(self, name: str) -> Path:
        """What a step made. ConfigError if it is not in the store."""
        if self.store.record(self.steps[name].ref) is None:
            raise ConfigError(
                f"{self.store.root} does not hold {name!r} of the laptop's cascade: run `make demo` first, or give the "
                "store where it ran"
            )
        return self.store.fetch(self.steps[name].ref)

    def model(self, name: str) -> Any:
        return loading.load(self.directory(name)).eval()

    def rows(self, count: int) -> pa.Table:
        """The first training rows of the calibration text."""
        return corpus.read_rows(self.directory("corpus"), "train").slice(0, count).combine_chunks()


def open_store(root: str) -> Demo:
    steps = job.preflight(load("laptop"))
    return Demo(
        Store(root if "://" in root else str(Path(root).absolute())), {step.name: step for step in steps}
    )
