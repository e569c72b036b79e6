"""The corpus stage: documents → splits → packed rows of tokens.

Inside one domain and split, documents are joined, each followed by the end-of-text token, and cut into rows
of `seq_len` tokens. Training takes whole documents, and so does a test set from elsewhere (`source.test`), in
its own order. A document held out here gives at most a quarter of its split's rows, from its middle: no long
one is a domain's whole test. What fills no row is dropped, and counted.
"""

from __future__ import annotations

import itertools
import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from sparsekd_ray.config import Corpus, Source
from sparsekd_ray.corpus.shards import MANIFEST, domain_table, tokenizer_hash, write_shards
from sparsekd_ray.corpus.sources import documents, test_source
from sparsekd_ray.corpus.splits import SPLITS, digest, quotas, with_split
from sparsekd_ray.corpus.test_text import Document, write_test_text
from sparsekd_ray.errors import CorpusError, ModelError
from sparsekd_ray.model import tokenizer as model_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

PASSAGE = 0.25  # of a held-out split's rows, from one document
BATCH = 64  # documents tokenised together
SAY_SECONDS = 5.0
Encode = Callable[[list[str]], list[np.ndarray]]


@dataclass
class Packer:
    """The rows of one domain and split: documents are taken in until `quota` rows are full."""

    quota: int
    seq_len: int
    longest: int
    """Tokens that one document may give."""
    keep_text: bool = False
    tokens: int = 0
    left_out: int = 0
    documents: int = 0
    pieces: list[np.ndarray] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    @property
    def full(self) -> bool:
        return self.tokens >= self.quota * self.seq_len

    @property
    def count(self) -> int:
        return min(self.quota, self.tokens // self.seq_len)

    @property
    def dropped(self) -> int:
        return self.left_out + self.tokens - self.count * self.seq_len

    def add(self, text: str, ids: np.ndarray) -> None:
        """Takes in one document, which ends with the end-of-text token."""
        if self.full:
            return
        kept = _passage(ids, self.longest)
        self.pieces.append(kept)
        self.tokens += len(kept)
        self.left_out += len(ids) - len(kept)
        self.documents += 1
        if self.keep_text:
            self.texts.append(text)

    def rows(self) -> np.ndarray:
        """int32 [count, seq_len]."""
        kept = np.concatenate(self.pieces)[: self.count * self.seq_len]
        return kept.reshape(self.count, self.seq_len)


def build(corpus: Corpus, tokenizer_dir: Path, out: Path, *, seed: int) -> dict[str, Any]:
    """Writes the corpus artifact into `out` and returns its manifest (rows, tokens, documents, and so on).

    Each source gives its share of `samples`, `valid_samples` and `test_samples`, by weight. `CorpusError`
    where a source gives too little for training, or nothing for validation or test.
    """
    shares, tokenizer = quotas(corpus), _tokenizer(tokenizer_dir)
    encode = _encoder(tokenizer)
    packed = {s.name: _pack(s, shares[s.name], encode, corpus, seed) for s in corpus.sources}
    for split in SPLITS:
        tables = [domain_table(name, split, packers[split].rows()) for name, packers in packed.items()]
        table = pa.concat_tables(tables).combine_chunks()
        if split == "train":
            table = table.take(np.random.default_rng(seed).permutation(table.num_rows))
        write_shards(table, out / split, corpus.shard_rows)
    for name, packers in packed.items():
        write_test_text(out, name, (Document((text,), text) for text in packers["test"].texts))
    model_tokenizer.save(tokenizer_dir, out / "tokenizer")
    manifest = _manifest(corpus, tokenizer, packed)
    (out / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def _pack(
    source: Source, quota: dict[str, int], encode: Encode, corpus: Corpus, seed: int
) -> dict[str, Packer]:
    """Reads one source until every split has its rows, or the source ends."""
    others = test_source(source)
    whole = {"train", "test"} if others else {"train"}
    packers = {split: _packer(rows, corpus.seq_len, split in whole) for split, rows in quota.items()}
    packers["test"].keep_text = True
    test, train = packers["test"], packers["train"]
    here, tell, tests = packers, _teller(source.name, packers), frozenset[bytes]()
    if others:
        seen: list[bytes] = []
        _fill({"test": test}, _noted(documents(others, None), seen), encode, tell)
        here, tests = {"train": train, "valid": packers["valid"]}, frozenset(seen[: test.documents])
    _fill(here, with_split(source, seed, corpus.held_out, tests), encode, tell)
    while source.repeat and train.count and not train.full:
        _fill({"train": train}, with_split(source, seed, corpus.held_out, tests), encode, tell)
    _check(source, packers)
    return packers


def _packer(rows: int, seq_len: int, whole: bool) -> Packer:
    return Packer(rows, seq_len, longest=sys.maxsize if whole else max(1, int(rows * PASSAGE)) * seq_len)


def _passage(ids: np.ndarray, longest: int) -> np.ndarray:
    """The middle of a document that is too long, with its end-of-text token."""
    if len(ids) <= longest:
        return ids
    start = (len(ids) - longest) // 2
    return np.append(ids[start : start + longest - 1], ids[-1])


def _fill(
    packers: dict[str, Packer], stream: Iterator[tuple[str, str]], encode: Encode, tell: Callable[[], None]
) -> None:
    """Tokenises (split, document) into `packers` until all are full or the stream ends."""
    while not all(packer.full for packer in packers.values()):
        batch = list(itertools.islice(stream, BATCH))
        if not batch:
            return
        wanted = [(packers[s], text) for s, text in batch if s in packers and not packers[s].full]
        for (packer, text), ids in zip(wanted, encode([text for _, text in wanted]), strict=True):
            packer.add(text, ids)
        tell()


def _noted(texts: Iterable[str], seen: list[bytes]) -> Iterator[tuple[str, str]]:
    """Test documents from elsewhere, remembered so that training leaves them out."""
    for text in texts:
        seen.append(digest(text))
        yield "test", text


def _check(source: Source, packers: dict[str, Packer]) -> None:
    where, train = f"corpus source {source.name} ({source.path})", packers["train"]
    if not any(packer.documents for packer in packers.values()):
        raise CorpusError(f"{where} is empty: it holds no document with text")
    if train.count < train.quota:
        again = ", or set repeat: true" if train.count and not source.repeat else ""
        raise CorpusError(
            f"{where} is too small: found {train.tokens} training tokens, {train.count} sequences of "
            f"{train.seq_len}, but {train.quota} asked for. Lower corpus.samples or its weight{again}"
        )
    if empty := [split for split in ("valid", "test") if not packers[split].count]:
        instead = "" if source.test else ", or give test documents (source.test)"
        raise CorpusError(
            f"{where}: the documents held out for {' and '.join(empty)} fill no sequence of {train.seq_len} "
            f"tokens. Raise corpus.held_out{instead}"
        )


def _teller(name: str, packers: dict[str, Packer]) -> Callable[[], None]:
    """Says how far a source is, every few seconds at most."""
    last = time.monotonic()

    def tell() -> None:
        nonlocal last
        if time.monotonic() - last >= SAY_SECONDS:
            last = time.monotonic()
            counts = ", ".join(f"{split} {packer.count}/{packer.quota}" for split, packer in packers.items())
            logger.info(f"corpus {name}: {counts} sequences")

    return tell


def _tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    tokenizer = model_tokenizer.load(directory)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{directory}: the tokenizer has no end-of-text token to separate documents with")
    return tokenizer


def _encoder(tokenizer: Any) -> Encode:
    """Texts → int32 tokens of each, followed by the end-of-text token."""
    end = [tokenizer.eos_token_id]

    def encode(texts: list[str]) -> list[np.ndarray]:
        if not texts:
            return []
        tokens = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [np.array(ids + end, dtype=np.int32) for ids in tokens["input_ids"]]

    return encode


def _manifest(corpus: Corpus, tokenizer: Any, packed: dict[str, dict[str, Packer]]) -> dict[str, Any]:
    def by_split(figure: Callable[[Packer], int]) -> dict[str, dict[str, int]]:
        return {s: {name: figure(packers[s]) for name, packers in packed.items()} for s in SPLITS}

    return {
        "seq_len": corpus.seq_len,
        "vocab_size": len(tokenizer),
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "shard_rows": corpus.shard_rows,
        "rows": by_split(lambda packer: packer.count),
        "tokens": by_split(lambda packer: packer.count * packer.seq_len),
        "dropped_tokens": by_split(lambda packer: packer.dropped),
        "documents": by_split(lambda packer: packer.documents),
    }
