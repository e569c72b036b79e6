"""Settings of the method: the teacher's cache, pruning, distillation, the cascade, evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sparsekd_ray.config.base import (
    PROTOCOL_NAMES,
    Allocation,
    Control,
    Fraction,
    Method,
    Positive,
    ProtocolName,
    Settings,
    TeacherPolicy,
)
from sparsekd_ray.prune import methods


class Teacher(Settings):
    """The teacher's cache: what it holds at each position, and in which form."""

    signal: Literal["topk", "sampled"] = "topk"
    """topk: the k likeliest ids with exact log-normalisers, readable at each stored temperature. sampled: an unbiased
    sample, in fewer bytes and readable at one temperature."""
    codec: Literal["plain", "compact"] = "plain"
    """plain: columns of numbers that any program reads. compact: about a quarter of the bytes, with a mean KL to plain
    below 1e-3 nat."""
    k: Positive = 32
    """topk: ids kept per position."""
    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = (1.5, 2.0, 4.0)
    """topk: temperatures whose log-normaliser over the whole vocabulary is stored; 1 needs none. sampled: the one
    temperature of the sample."""
    bytes_per_token: float = Field(16.0, gt=2)
    """sampled: target size. It decides the threshold above which probabilities are kept exactly."""

    @model_validator(mode="after")
    def _one_temperature(self) -> Teacher:
        if self.signal == "sampled" and len(self.temperatures) != 1:
            raise ValueError(
                f"a sample is drawn at one temperature, found temperatures {list(self.temperatures)}: give one"
            )
        if len(set(self.temperatures)) != len(self.temperatures):
            raise ValueError(f"temperatures {list(self.temperatures)} repeat a value")
        return self


class Calibrate(Settings):
    """Statistics that pruning measures on the training text: Gram matrices, Fisher scalars, hidden-state angles."""

    samples: Positive = 64
    """Training sequences to measure on, from all domains. Their tokens should be at least four times the inputs of the
    widest matrix."""
    seed: int = 0
    """Decides which sequences are drawn."""


class Prune(Settings):
    """How a model is pruned to an exact budget of MLP parameters."""

    method: Method = Field("svd", description=methods.in_words())
    allocation: Allocation = "tiered"
    """How the svd methods divide the budget between matrices. uniform: the same share for all. tiered: SparseKD's
    shares. energy: one threshold of energy for all. optimal: the ranks of the smallest predicted loss, solved exactly.
    The other methods treat all layers alike."""
    align: Positive = 1
    """Ranks and widths are multiples of this: 64 on GPUs, 1 for a small model."""
    storage: Literal["factors", "gauge"] = "factors"
    """Form of a low-rank matrix. factors: two factors, with r (m + n) parameters. gauge: a pivoted form, with
    r (m + n − r)."""
    bias: bool = False
    """svd-whitened: give each matrix a bias, the mean output that its factors miss."""
    score: Literal["elimination", "leverage"] = "elimination"
    """neurons: how they are chosen. elimination: one by one, each time the one that costs least once the others are
    refitted. leverage: all at once."""
    drop: Literal["block", "influence"] = "block"
    """depth: which layers are dropped. block: the consecutive layers that turn the residual stream least. influence:
    the single layers of least influence."""
    alpha: float = Field(0.4, ge=0, le=1)
    """sdm: weight of self-distillation against cross-entropy in the second phase (SDMPrune: 0.4 at 20 %)."""
    temperature: float = Field(0.5, gt=0, le=1)
    """sdm: temperature of the teacher. The cache must hold it."""


class Distill(Settings):
    """How a student learns: α · T² · KL(teacher ‖ student) + (1 − α) · CE."""

    temperature: float = Field(2.0, gt=0)
    """T, of teacher and student. The cache must hold it."""
    alpha: float = Field(0.5, ge=0, le=1)
    """α, the weight of the teacher against cross-entropy."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    batch: Positive = 8
    """Sequences per optimiser step, over all workers."""
    epochs: float = Field(1.0, gt=0)
    """Largest number of passes over the training samples."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the steps over which the learning rate rises linearly. It then falls to a tenth along a cosine."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's weight decay."""
    grad_clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient; a longer gradient is scaled down to it."""
    validate_every: Positive = 32
    """Steps between validations. Each validation writes a checkpoint."""
    patience: Positive = 3
    """Stop after this many validations without a new minimum, or with gains below `min_gain`."""
    min_gain: float = Field(1e-3, ge=0)
    """Relative gain in validation perplexity below which a validation counts as saturated."""
    train_embeddings: bool = True
    """Also train the embedding and the head. False saves a third of the loss's work, and their Adam state."""


class Round(Settings):
    """One round: prune the current student to a size, then distill it."""

    sparsity: Fraction
    """Share of the dense model's MLP parameters that is removed after this round."""
    teacher: TeacherPolicy = "dense"
    """Teacher of the student: the dense model, Dense+KD, or the student of the previous round."""
    lr: float | None = Field(None, gt=0)
    """Peak learning rate of this round, if it differs from `distill.lr`."""


class Baseline(Settings):
    """A student by another method, to compare the rounds with: the dense model pruned once and distilled once."""

    method: Method
    """Pruning method, as in `prune.method`."""
    sparsity: Fraction
    """Share of the dense model's MLP parameters that is removed."""
    allocation: Allocation = "optimal"
    """How the svd methods divide the budget between matrices. The other methods do not read it."""
    teacher: Literal["dense", "dense+kd"] = "dense"
    """Teacher of the student: the dense model or Dense+KD."""
    lr: float | None = Field(None, gt=0)
    """Peak learning rate, if it differs from `distill.lr`."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the training samples, if they differ from `distill.epochs`."""

    @model_validator(mode="after")
    def _allocation_is_read(self) -> Baseline:
        default = Baseline.model_fields["allocation"].default
        if self.allocation != default and "allocation" not in methods.METHODS[self.method].settings:
            raise ValueError(
                f"allocation is {self.allocation}, and {self.method} does not read it: leave it out"
            )
        return self

    @property
    def title(self) -> str:
        return f"{self.method} {100 * self.sparsity:g}%"


class Cascade(Settings):
    """Which models are made: rounds, baselines and controls."""

    rounds: tuple[Round, ...] = (Round(sparsity=0.15), Round(sparsity=0.35), Round(sparsity=0.65))
    """The rounds, each on top of the one before."""
    baselines: tuple[Baseline, ...] = ()
    """Students by other methods, for comparison."""
    controls: tuple[Control, ...] = ("dense+kd", "ce-only", "kl-only")
    """Models that train without pruning on the same data, steps and learning rate. They tell where a gain comes
    from."""
    seeds: tuple[int, ...] = Field((42,), min_length=1)
    """Seeds of the order of samples. Several seeds give means and standard deviations."""

    @model_validator(mode="after")
    def _increasing(self) -> Cascade:
        sizes = [r.sparsity for r in self.rounds]
        if sizes != sorted(set(sizes)):
            raise ValueError(f"cascade.rounds must remove more and more, found sparsities {sizes}")
        teachers = {r.teacher for r in self.rounds} | {baseline.teacher for baseline in self.baselines}
        if "dense+kd" in teachers and "dense+kd" not in self.controls:
            raise ValueError("a student has the teacher dense+kd: keep dense+kd in cascade.controls")
        titles = [baseline.title for baseline in self.baselines]
        if len(set(titles)) != len(titles):
            raise ValueError(f"cascade.baselines repeats a method at one sparsity: {titles}")
        return self


class Evaluate(Settings):
    """Perplexity on the held-out text."""

    protocols: tuple[ProtocolName, ...] = PROTOCOL_NAMES
    """`paper`: windows of 512 tokens, stride 256, every prediction counted (SparseKD); `gptq`: the raw text in
    windows of 2,048 that do not overlap (GPTQ, SparseGPT, Wanda); `words`: word perplexity as lm-eval counts it.
    Windows are cut to the model's context, and every figure says so. Students are compared by `paper`, which is
    always measured."""

    @model_validator(mode="after")
    def _paper_first(self) -> Evaluate:
        if "paper" not in self.protocols or len(set(self.protocols)) != len(self.protocols):
            raise ValueError(
                f"evaluate.protocols is {self.protocols}: name each protocol once, and paper among them, by which "
                "students are compared"
            )
        return self
