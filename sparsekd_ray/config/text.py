"""Settings of the text: sources, their mix, and what is held out."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from sparsekd_ray.config.base import Fraction, Positive, Settings

RESERVED = (
    "all",
    "train",
    "valid",
    "test",
)  # the names that reports use for all domains together and for the splits


class Source(Settings):
    """One stream of documents of one domain."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_+-]*$")
    """The domain's name in reports. `all`, `train`, `valid` and `test` are reserved."""
    path: str
    """`embedded:docstrings|manual|code|arithmetic`, `hf://owner/dataset[/config]` (streamed from the hub), or any
    fsspec URL or local path of .parquet, .jsonl or .txt files. A glob draws from all files that it matches, in
    proportion to their sizes; a wildcard matches no hidden file."""
    weight: float = Field(1.0, gt=0)
    """Share of the training samples, relative to the other sources."""
    text: str = "{text}"
    """Template that makes a document of a row. Its columns hold text or numbers."""
    join: bool | None = None
    """Whether the rows are lines of one text (WikiText on the hub): they are joined in their order, and the text is cut
    into documents at its top-level headings, or else at blank lines. False: every row is a document. Unset: true for
    .txt files, false for others. Sources with a fifth of blank rows are then refused."""
    split: str = "train"
    """Split of a hub data set that training documents come from."""
    test: str | None = None
    """Separate test documents: a path like `path`, or for the hub a split's name. Without it, documents of `path` are
    held out by a hash of their text. In both cases, no training text repeats them (see `corpus.exclude`)."""
    revision: str | None = None
    """Hub data set revision (commit). It is part of the source's identity."""
    repeat: bool = False
    """Read the documents again from the start if the source is smaller than its share. Otherwise that is an error."""

    @field_validator("name")
    @classmethod
    def _free(cls, name: str) -> str:
        if name in RESERVED:
            raise ValueError(
                f"{name!r} is a word of the reports ({', '.join(RESERVED)} are); choose another name"
            )
        return name


class Corpus(Settings):
    """The calibration mix: the text that the teacher is run on, and the text that is held out for evaluation."""

    sources: tuple[Source, ...] = Field(min_length=1)
    samples: Positive = 1024
    """Training sequences over all sources."""
    valid_samples: Positive = 96
    """Largest number of held-out sequences for choosing and stopping, over all sources."""
    test_samples: Positive = 256
    """Largest number of held-out sequences for the reported figures, over all sources."""
    seq_len: int = Field(128, ge=2)
    """Tokens per sequence, at most the model's context. Documents of one domain are joined by the separator and cut."""
    separator: str | None = None
    """Token after each document, for example `<|endoftext|>`. Unset: the tokenizer's end token, or its end-of-text
    token if the end token ends a chat turn (`<|im_end|>`)."""
    held_out: Fraction = 0.06
    """Share of each source's documents that is held out from training: half for validation, half for test."""
    exclude: tuple[Source, ...] = ()
    """More sources whose test documents no training text may repeat, besides those of `sources`: a benchmark to be
    run later (`{name: bench, path: bench.jsonl, test: bench.jsonl}`)."""
    shard_rows: Positive = 128
    """Sequences per Parquet shard: the unit of capture and of resumption."""

    @model_validator(mode="after")
    def _distinct(self) -> Corpus:
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"corpus sources need distinct names, found {names}")
        return self
