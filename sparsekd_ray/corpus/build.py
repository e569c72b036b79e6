"""The corpus stage: documents → splits → packed rows of tokens.

The test documents of all sources are set aside first. Training and validation then take the documents that do not
repeat them (`overlap`). Inside one domain and split, documents are joined, each followed by the separator, and cut into
rows of `seq_len` tokens. Training takes whole documents. A separate test set (`source.test`) is also taken in whole
documents, in its own order. A document that was held out here gives at most a quarter of its split's rows, from its
middle, so that one long document is not a domain's whole test. Tokens that fill no row are dropped and counted.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from sparsekd_ray.config import Corpus, Source
from sparsekd_ray.corpus.held_out import LeftOut, SetAside, longest, set_aside, split_documents, test_index
from sparsekd_ray.corpus.overlap import TestIndex
from sparsekd_ray.corpus.packing import Packer, fill
from sparsekd_ray.corpus.shards import MANIFEST, Manifest, domain_table, write_shards
from sparsekd_ray.corpus.sources import Tally
from sparsekd_ray.corpus.splits import SPLITS, quotas
from sparsekd_ray.corpus.test_text import write_test_text
from sparsekd_ray.corpus.tokens import Encoder, check_context, load_encoder, tokenizer_hash
from sparsekd_ray.errors import CorpusError
from sparsekd_ray.model import tokenizer as model_tokenizer

logger = logging.getLogger(__name__)

FEW = 5  # so few documents cannot be dealt to three splits
MUCH = 0.25  # a warning is logged if a larger share of a source's text was left out


@dataclass
class Domain:
    """One source, and the packers that turn its documents into rows."""

    source: Source
    packers: dict[str, Packer]
    test: SetAside
    left_out: LeftOut = field(default_factory=LeftOut)
    tally: Tally = field(default_factory=Tally)


def build(corpus: Corpus, tokenizer_dir: Path, out: Path, *, seed: int) -> Manifest:
    """Writes the corpus artifact into `out` and returns its manifest (rows, tokens, documents, and so on).

    Each source gives its share of `samples`, `valid_samples` and `test_samples`, by weight. Raises CorpusError if a
    source gives too little text for training, or none for validation or test.
    """
    rows = quotas(corpus)
    check_context(tokenizer_dir, corpus.seq_len)
    encoder = load_encoder(tokenizer_dir, corpus.separator)
    tests = set_aside(corpus, seed)
    index = test_index(corpus, tests, seed)
    domains = [
        _domain(source, rows[source.name], corpus.seq_len, tests[source.name]) for source in corpus.sources
    ]
    for domain in domains:
        _pack(domain, encoder, corpus, index, seed)
    _write_rows(domains, out, corpus.shard_rows, seed)
    for domain in domains:
        _write_test_text(domain, out)
    model_tokenizer.save(tokenizer_dir, out / "tokenizer")
    manifest = _manifest(corpus, encoder, domains)
    (out / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def _domain(source: Source, quota: dict[str, int], seq_len: int, test: SetAside) -> Domain:
    uncut_splits = {"train", "test"} if source.test is not None else {"train"}
    packers = {
        split: Packer(rows, seq_len, sys.maxsize if split in uncut_splits else longest(rows, seq_len))
        for split, rows in quota.items()
    }
    return Domain(source, packers, test)


def _pack(domain: Domain, encoder: Encoder, corpus: Corpus, index: TestIndex, seed: int) -> None:
    """Reads one source until every split has its rows, or the source ends."""
    source, packers = domain.source, domain.packers
    train = packers["train"]
    test = (("test", document) for document in domain.test.documents)
    fill(source.name, {"test": packers["test"]}, test, encoder)
    train_and_valid = {"train": train, "valid": packers["valid"]}
    stream = split_documents(source, corpus, seed, index, domain.left_out, domain.tally)
    fill(source.name, train_and_valid, stream, encoder)
    while source.repeat and train.count and not train.full:
        fill(source.name, {"train": train}, split_documents(source, corpus, seed, index), encoder)
    _check(domain)
    _warn(domain)


def _check(domain: Domain) -> None:
    source, packers, train = domain.source, domain.packers, domain.packers["train"]
    where = f"corpus source {source.name} ({source.path})"
    if not domain.left_out.read_characters and not domain.test.documents:
        raise CorpusError(f"{where} is empty: it holds no document with text{_empty_rows(domain)}")
    if train.count < train.quota:
        again = ", or set repeat: true" if train.count and not source.repeat else ""
        raise CorpusError(
            f"{where} is too small: found {train.tokens} training tokens, {train.count} sequences of "
            f"{train.seq_len}, but {train.quota} asked for{_cause(domain)}. Lower corpus.samples or its weight{again}"
        )
    if empty := [split for split in ("valid", "test") if not packers[split].count]:
        instead = "" if source.test else ", or give test documents (source.test)"
        raise CorpusError(
            f"{where}: the documents held out for {' and '.join(empty)} fill no sequence of {train.seq_len} "
            f"tokens{_cause(domain)}. Raise corpus.held_out{instead}"
        )


def _cause(domain: Domain) -> str:
    """Reasons, in words, why a source may be smaller than its user thinks."""
    left_out = domain.left_out
    causes = [_few_documents(domain), _empty_rows(domain).removeprefix(", ")]
    if left_out.documents:
        causes.append(f"{left_out.documents} documents repeat test text and were left out")
    reasons = "; ".join(filter(None, causes))
    return f" ({reasons})" if reasons else ""


def _few_documents(domain: Domain) -> str:
    """A note for a source of few documents. A text without blank lines is one document, so it cannot be split."""
    read = sum(packer.documents for packer in domain.packers.values()) + domain.left_out.documents
    if read > FEW:
        return ""
    count = "one document" if read == 1 else f"only {read} documents"
    if domain.source.path.endswith(".txt") and domain.source.join is not False:
        return (
            f"it is {count}, since a .txt is cut at its blank lines: put blank lines between documents, or set "
            "join: false if each line is a document"
        )
    return f"it is {count}"


def _empty_rows(domain: Domain) -> str:
    count = domain.tally.empty_rows
    return f", {count} rows have nothing in a column of source.text" if count else ""


def _warn(domain: Domain) -> None:
    left_out, name = domain.left_out, domain.source.name
    if left_out.characters > MUCH * left_out.read_characters:
        logger.warning(
            f"corpus {name}: {left_out.documents} documents, {_share(left_out):.0%} of its text, repeat test text and "
            "were kept out of training. Is the test text a part of the training text?"
        )
    if domain.tally.empty_rows:
        logger.info(f"corpus {name}: left out{_empty_rows(domain).removeprefix(',')}")


def _share(left_out: LeftOut) -> float:
    return left_out.characters / max(1, left_out.read_characters)


def _write_rows(domains: list[Domain], out: Path, shard_rows: int, seed: int) -> None:
    for split in SPLITS:
        tables = [domain_table(d.source.name, split, d.packers[split].rows()) for d in domains]
        table = pa.concat_tables(tables).combine_chunks()
        if split == "train":
            table = table.take(np.random.default_rng(seed).permutation(table.num_rows))
        write_shards(table, out / split, shard_rows)


def _write_test_text(domain: Domain, out: Path) -> None:
    """Writes all documents of a complete test set; otherwise only those that the test rows are made of."""
    test = domain.test
    documents = test.documents if test.complete else test.documents[: domain.packers["test"].documents]
    write_test_text(out, domain.source.name, documents)


def _manifest(corpus: Corpus, encoder: Encoder, domains: list[Domain]) -> Manifest:
    def by_split(figure: Callable[[Packer], int]) -> dict[str, dict[str, int]]:
        return {s: {d.source.name: figure(d.packers[s]) for d in domains} for s in SPLITS}

    return {
        "seq_len": corpus.seq_len,
        "vocab_size": len(encoder.tokenizer),
        "tokenizer_hash": tokenizer_hash(encoder.tokenizer),
        "separator": encoder.token(encoder.separator),
        "beginning": encoder.token(encoder.beginning),
        "shard_rows": corpus.shard_rows,
        "rows": by_split(lambda packer: packer.count),
        "tokens": by_split(lambda packer: packer.count * packer.seq_len),
        "dropped_tokens": by_split(lambda packer: packer.dropped),
        "documents": by_split(lambda packer: packer.documents),
        "whole_test": {d.source.name: d.test.complete for d in domains},
        "repeats_test": {
            d.source.name: {"documents": d.left_out.documents, "share": round(_share(d.left_out), 6)}
            for d in domains
        },
        "commits": {d.source.name: d.tally.commit for d in domains},
        "empty_rows": {d.source.name: d.tally.empty_rows for d in domains},
    }
