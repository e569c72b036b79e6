"""The whole settings tree: what a run computes (identity) and, apart from it, where and how it runs (execution).

Everything outside `Execution` changes the numbers and is fingerprinted, stage by stage, in `cascade/steps.py`;
nothing inside `Execution` ever is. A YAML file under `jobs/configs/` holds only what differs from the defaults
written here; dotted options on the command line come last: defaults < YAML < `--distill.lr 3e-4`.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sparsekd_ray.errors import ConfigError

Fraction = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]
TeacherPolicy = Literal["dense", "dense+kd", "previous"]
Method = Literal["svd", "svd-whitened", "neurons", "sdm", "depth", "wanda", "magnitude"]
Allocation = Literal["uniform", "tiered", "energy", "optimal"]
Control = Literal["dense+kd", "ce-only", "kl-only"]


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Source(Settings):
    """One stream of documents of one domain."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_+-]*$")
    """The domain's name, as reports print it."""
    path: str
    """`embedded:docstrings|manual|code|arithmetic`, `hf://owner/dataset[/config]` (streamed from the hub), or any
    fsspec URL or local path (globs allowed) of .parquet, .jsonl or .txt files."""
    weight: float = Field(1.0, gt=0)
    """Share of the training samples, relative to the other sources."""
    text: str = "{text}"
    """How a row becomes a document: a template over the row's columns."""
    split: str = "train"
    """Split of a hub data set that training documents come from."""
    test: str | None = None
    """Held-out documents from elsewhere: a path like `path`, or for the hub a split's name. Without it, documents of
    `path` are held out by a hash of their text."""
    revision: str | None = None
    """Hub data set revision (commit); part of the identity."""
    repeat: bool = False
    """Read the documents again from the start when the source is smaller than its share; an error otherwise."""


class Corpus(Settings):
    """The calibration mix: what the teacher is asked about, and what is held out to judge the student."""

    sources: tuple[Source, ...] = Field(min_length=1)
    samples: Positive = 1024
    """Training sequences over all sources."""
    valid_samples: Positive = 96
    """Held-out sequences for choosing and stopping, over all sources (at most)."""
    test_samples: Positive = 256
    """Held-out sequences for the reported figures, over all sources (at most)."""
    seq_len: int = Field(128, ge=2)
    """Tokens per sequence; documents of one domain are joined by the end-of-text token and cut."""
    held_out: Fraction = 0.06
    """Share of the documents of each source that is kept from training, half of it for validation, half for test."""
    shard_rows: Positive = 128
    """Sequences per Parquet shard: the unit of capture and of resumption."""

    @model_validator(mode="after")
    def _distinct(self) -> Corpus:
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"corpus sources need distinct names, found {names}")
        return self


class Standin(Settings):
    """A small model of a real architecture, trained here, so that the cascade runs without a model hub."""

    family: Literal["phi3", "qwen3"] = "phi3"
    hidden: Positive = 128
    intermediate: Positive = 352
    layers: Positive = 4
    heads: Positive = 4
    kv_heads: Positive = 2
    vocab: int = Field(2048, ge=300)
    """Size of the byte-level BPE vocabulary, trained on the same text."""
    steps: Positive = 400
    batch: Positive = 8
    """Sequences per step, of `corpus.seq_len` tokens; `steps × batch` sequences are read once."""
    lr: float = Field(0.02, gt=0)
    """Peak learning rate of Muon (matrices)."""
    lr_adam: float = Field(0.03, gt=0)
    """Peak learning rate of AdamW (embedding and norms)."""
    unseen: tuple[str, ...] = ()
    """Names of corpus sources kept out of this model's training: their text is new to it in the calibration mix."""
    sources: tuple[Source, ...] = ()
    """Text to train on; without any, the corpus's own sources but the unseen ones."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Standin:
        if self.hidden % (2 * self.heads) or self.heads % self.kv_heads:
            raise ValueError(
                f"model.standin: hidden ({self.hidden}) must be an even multiple of heads ({self.heads}), and heads a "
                f"multiple of kv_heads ({self.kv_heads})"
            )
        return self


class Shape(Settings):
    """What the plan needs to know of a model before its weights are at hand; checked against the real one on load."""

    family: Literal["phi3", "qwen3"]
    hidden: Positive
    intermediate: Positive
    layers: Positive
    heads: Positive
    kv_heads: Positive
    vocab: Positive
    head_dim: int | None = None
    tied: bool = True


class Model(Settings):
    """The dense model: a hub id or local directory, or a stand-in trained here. Exactly one of the two."""

    path: str | None = None
    revision: str | None = None
    standin: Standin | None = None
    shape: Shape | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Model:
        if (self.path is None) == (self.standin is None):
            raise ValueError(
                "give either model.path (a hub id or a directory) or model.standin (train one here), not both; to "
                "replace the stand-in of the default settings, write a YAML file with `model: {path: …}`"
            )
        return self


class Teacher(Settings):
    """What is kept of the teacher at each position, and in which form."""

    signal: Literal["topk", "sampled"] = "topk"
    """The k likeliest ids with log-normalisers (exact, any stored temperature), or an unbiased sample (fewer bytes,
    one temperature)."""
    codec: Literal["plain", "compact"] = "plain"
    """Columns of numbers that any program reads, or a third of the bytes with a mean KL to them below 1e-3 nat."""
    k: Positive = 32
    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = (1.5, 2.0, 4.0)
    """Temperatures whose log-normaliser over the whole vocabulary is stored; of a sample, its one temperature."""
    bytes_per_token: float = Field(16.0, gt=2)
    """Size of a sampled cache; sets the threshold above which probabilities are kept exactly."""

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
    """What pruning measures of a model on the training text: Gram matrices, Fisher scalars, hidden-state angles."""

    samples: Positive = 64
    """Training sequences, drawn over all domains; four tokens or more for each input of the widest matrix."""
    seed: int = 0
    """Which sequences are drawn."""


class Prune(Settings):
    """How a model gets smaller, to an exact budget of MLP parameters."""

    method: Method = "svd"
    """svd, svd-whitened: low-rank factors of every matrix. neurons, sdm: fewer neurons in every layer (a stock model).
    depth: fewer layers (a stock model). wanda, magnitude: zeros held through training (no model is faster for it)."""
    allocation: Allocation = "tiered"
    """How svd methods share the budget: the same share for all, SparseKD's tiers, one energy threshold, or the
    smallest predicted loss (exact). The other methods treat all layers alike."""
    align: Positive = 1
    """Ranks and widths are multiples of this (64 on GPUs; 1 where the model is too small for it)."""
    storage: Literal["factors", "gauge"] = "factors"
    """Of a low-rank matrix: two factors, or the smaller pivoted form: r (m + n − r) parameters, not r (m + n)."""
    bias: bool = False
    """Whitened SVD: add the mean output that the factors miss, one bias per matrix."""
    score: Literal["elimination", "leverage"] = "elimination"
    """neurons: taken out one by one, each time the one that costs least after the refit, or all at once by leverage."""
    drop: Literal["block", "influence"] = "block"
    """depth: the consecutive layers that turn the residual stream least, or the single layers of least influence."""
    alpha: float = Field(0.4, ge=0, le=1)
    """sdm: weight of self-distillation in the second phase, beside cross-entropy (SDMPrune: 0.4 at 20 %)."""
    temperature: float = Field(0.5, gt=0, le=1)
    """sdm: the teacher's temperature, one that the cache holds."""


class Distill(Settings):
    """How a student learns: α · T² · KL(teacher ‖ student) + (1 − α) · CE."""

    temperature: float = Field(2.0, gt=0)
    alpha: float = Field(0.5, ge=0, le=1)
    lr: float = Field(1e-3, gt=0)
    batch: Positive = 8
    """Sequences per optimiser step, over all workers."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the training samples, at most."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the steps over which the learning rate rises linearly; it then falls to a tenth along a cosine."""
    weight_decay: float = Field(0.0, ge=0)
    grad_clip: float = Field(1.0, gt=0)
    validate_every: Positive = 32
    """Steps between validations; a checkpoint is written at each."""
    patience: Positive = 3
    """Stop after this many validations without a new minimum, or with gains below `min_gain`."""
    min_gain: float = Field(1e-3, ge=0)
    """Relative gain in validation perplexity below which a validation counts as saturated."""
    train_embeddings: bool = True
    """Train the embedding and the head too. False saves a third of the loss's work and its Adam state."""


class Round(Settings):
    """One round: prune the current student to a size, then distill it."""

    sparsity: Fraction
    """Fraction of the dense model's MLP parameters removed once the round is over."""
    teacher: TeacherPolicy = "dense"
    """Whose probabilities the student learns: the dense model's, Dense+KD's, or the previous round's student's."""
    lr: float | None = Field(None, gt=0)
    """Learning rate of this round, where it differs from `distill.lr`."""


class Beside(Settings):
    """A student by another method, to stand beside the rounds: the dense model pruned once and distilled once."""

    method: Method
    sparsity: Fraction
    allocation: Allocation = "optimal"
    teacher: Literal["dense", "dense+kd"] = "dense"
    lr: float | None = Field(None, gt=0)
    """Learning rate, where it differs from `distill.lr`."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the training samples, where they differ from `distill.epochs`."""

    @property
    def title(self) -> str:
        return f"{self.method} {100 * self.sparsity:g}%"


class Cascade(Settings):
    rounds: tuple[Round, ...] = (Round(sparsity=0.15), Round(sparsity=0.35), Round(sparsity=0.65))
    beside: tuple[Beside, ...] = ()
    """Students by other methods, for comparison."""
    controls: tuple[Control, ...] = ("dense+kd", "ce-only", "kl-only")
    """Trained from the unpruned model with the same data, steps and learning rate, to tell where a gain comes from."""
    seeds: tuple[int, ...] = Field((42,), min_length=1)
    """Seeds of the order of samples; several give means and standard deviations."""

    @model_validator(mode="after")
    def _increasing(self) -> Cascade:
        sizes = [r.sparsity for r in self.rounds]
        if sizes != sorted(set(sizes)):
            raise ValueError(f"cascade.rounds must remove more and more, found sparsities {sizes}")
        teachers = {r.teacher for r in self.rounds} | {branch.teacher for branch in self.beside}
        if "dense+kd" in teachers and "dense+kd" not in self.controls:
            raise ValueError("a student has the teacher dense+kd: keep dense+kd in cascade.controls")
        titles = [branch.title for branch in self.beside]
        if len(set(titles)) != len(titles):
            raise ValueError(f"cascade.beside repeats a method at one sparsity: {titles}")
        return self


class Evaluate(Settings):
    """Perplexity by the paper's protocol: overlapping windows, every token of every window."""

    window: int = Field(512, ge=2, multiple_of=2)
    """Tokens per window (cut to the model's context); windows overlap by half."""


class Card(Settings):
    name: str
    memory_gb: float = Field(gt=0)
    count: Positive = 1


class Execution(Settings):
    """Where and how it runs. Nothing here changes the numbers, nor any fingerprint."""

    store: str = "store"
    """Local directory or s3://bucket/prefix, shared by every node."""
    scratch: str | None = None
    """Local directory for downloads from an S3 store and for work in progress."""
    workers: Positive = 2
    """Data-parallel training workers."""
    actors: Positive = 2
    """Teacher actors of a capture, at most."""
    gpus: bool = False
    """Ask Ray for one GPU per worker and per teacher actor."""
    threads: Positive = 2
    """CPU threads (and Ray CPUs) of every stage that is one process."""
    zero_stage: Literal[1, 2] = 2
    """DeepSpeed ZeRO: partition optimiser states (1), and gradients too (2)."""
    offload: bool = False
    """Keep optimiser states in host memory (for cards of 16 GB)."""
    recompute: bool = False
    """Recompute activations in the backward pass instead of keeping them: less memory, a third more work."""
    micro_batch: Positive = 8
    """Sequences per worker and forward pass, at most."""
    max_failures: int = Field(3, ge=0)
    """Restarts of a training worker group before the run gives up."""
    cards: tuple[Card, ...] = ()
    """The GPUs meant for the run, for the plan's estimates."""


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

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        stored = self.teacher.temperatures + ((1.0,) if self.teacher.signal == "topk" else ())
        if self.distill.temperature not in stored:
            raise ValueError(
                f"distill.temperature is {self.distill.temperature}, but the cache will hold only {stored}: add it to "
                "teacher.temperatures"
            )
        methods = {self.prune.method, *(branch.method for branch in self.cascade.beside)}
        if "sdm" in methods and self.prune.temperature not in stored:
            raise ValueError(
                f"sdm reads the teacher at prune.temperature {self.prune.temperature}, but the cache will hold only "
                f"{stored}: add it to teacher.temperatures"
            )
        if self.prune.bias and self.prune.method != "svd-whitened":
            raise ValueError(
                f"prune.bias is what svd-whitened adds for a mean that it measured; {self.prune.method} has none"
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


def load(path: Path) -> Config:
    """Reads a YAML file into a `Config`; `ConfigError` names the file and every key that is wrong."""
    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. Shipped configurations: {_shipped()}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} is not a YAML file: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: expected a YAML mapping of settings, as in jobs/configs/laptop.yaml, found {type(tree).__name__}"
        )
    return parse(tree, str(path))


def parse(tree: dict[str, Any], origin: str) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{origin}: {explain(e)}" for e in error.errors())) from None


def explain(error: Any) -> str:
    """One line for one pydantic error: key, what was found, what is allowed, the nearest known key."""
    where = ".".join(str(part) for part in error["loc"]) or "settings"
    if error["type"] != "extra_forbidden":
        found = "" if isinstance(error["input"], dict) else f" (found {error['input']!r})"
        return f"{where}: {error['msg'].removeprefix('Value error, ')}{found}"
    known = _known_keys(error["loc"][:-1])
    close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
    return f"{where}: unknown setting; {hint}"


def _known_keys(path: tuple[Any, ...]) -> list[str]:
    """Field names of the settings class found by walking `path` from the root."""
    model: Any = Config
    for part in path:
        if isinstance(part, str):
            model = _settings_class(model.model_fields[part].annotation)
    return list(model.model_fields)


def _settings_class(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    return next(
        (found for arg in getattr(annotation, "__args__", ()) if (found := _settings_class(arg))), None
    )


def _shipped() -> str:
    folder = Path("jobs/configs")
    return ", ".join(str(p) for p in sorted(folder.glob("*.yaml"))) or "none found under jobs/configs"
