"""The root of the settings tree, and checks that concern several of its sections."""

from __future__ import annotations

from pydantic import Field, model_validator

from sparsekd_ray.config.base import Settings
from sparsekd_ray.config.execution import Execution
from sparsekd_ray.config.method import Calibrate, Cascade, Distill, Evaluate, Prune, Teacher
from sparsekd_ray.config.model import Model
from sparsekd_ray.config.text import Corpus


class Config(Settings):
    name: str = Field("laptop", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run's name: `<store>/runs/<name>/` holds its plan, metrics and report."""
    seed: int = 42
    """Seed of corpus shuffling and of the stand-in's training."""
    model: Model
    corpus: Corpus
    teacher: Teacher = Teacher()
    calibrate: Calibrate = Calibrate()
    prune: Prune = Prune()
    distill: Distill = Distill()
    cascade: Cascade = Cascade()
    evaluate: Evaluate = Evaluate()
    execution: Execution = Execution()

    def seeded(self, name: str, seed: int) -> str:
        """A step's name, with its seed where there are several."""
        return name if len(self.cascade.seeds) == 1 else f"{name} · seed {seed}"

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        stored = self.teacher.temperatures + ((1.0,) if self.teacher.signal == "topk" else ())
        if self.distill.temperature not in stored:
            raise ValueError(
                f"distill.temperature is {self.distill.temperature}, but the cache will hold only {stored}: add it to "
                "teacher.temperatures"
            )
        if self.corpus.samples < self.distill.batch:
            raise ValueError(
                f"corpus.samples ({self.corpus.samples}) is less than one batch (distill.batch {self.distill.batch})"
            )
        if self.distill.batch < self.execution.workers:
            raise ValueError(
                f"distill.batch ({self.distill.batch}) gives less than one sequence to each of "
                f"execution.workers ({self.execution.workers})"
            )
        same = {0.0: "ce-only", 1.0: "kl-only"}.get(self.distill.alpha)
        if same in self.cascade.controls and "dense+kd" in self.cascade.controls:
            raise ValueError(
                f"distill.alpha {self.distill.alpha:g} makes the controls dense+kd and {same} the same: drop {same}"
            )
        names = {source.name for source in self.corpus.sources}
        unknown = set(self.model.standin.unseen if self.model.standin else ()) - names
        if unknown:
            raise ValueError(
                f"model.standin.unseen names {sorted(unknown)}, corpus.sources has {sorted(names)}"
            )
        return self
