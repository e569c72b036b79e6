"""Test text in training text: what counts as a repetition, against a definition word by word, and what is left out."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from corpora import WORDS, small_corpus, word_tokenizer

from sparsekd_ray.cascade.plan import plan
from sparsekd_ray.config import Source, parse
from sparsekd_ray.corpus import build, domain_streams, identify, read_manifest, train_documents
from sparsekd_ray.corpus.overlap import COMMON, COMMON_LEAST, RUN, SHORTEST, TestIndex


def sentence(seed: int, words: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def runs(words: list[str], length: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def repeats_by_definition(text: str, tests: list[str]) -> bool:
    words = re.findall(r"\w+", text.lower())
    others = [re.findall(r"\w+", test.lower()) for test in dict.fromkeys(tests)]
    if words in others:
        return True
    known: set[tuple[str, ...]] = set()
    for other in others:
        for run in runs(other, RUN):
            documents = sum(run in runs(another, RUN) for another in others)
            if documents <= max(COMMON_LEAST, COMMON * len(others)):
                known.add(run)
        if SHORTEST <= len(other) < RUN and runs(words, len(other)) & {tuple(other)}:
            return True
    passages = set().union(*(runs(other, SHORTEST) for other in others))
    inside = SHORTEST <= len(words) < RUN and runs(words, SHORTEST) <= passages
    return inside or bool(runs(words, RUN) & known)


@pytest.mark.parametrize("seed", range(4))
def test_repetition_is_that_of_the_definition(seed):
    rng = random.Random(seed)
    tests = [sentence(1000 * seed + n, rng.choice([3, 9, 15, 25, 60])) for n in range(12)]
    tests += [f"{sentence(99, 30)} {sentence(500 + n, 10)}" for n in range(4)]  # the frame of a prompt
    index = TestIndex([tests])
    pieces = [sentence(77 + n, 30) for n in range(5)]
    outcomes = set()
    for _ in range(150):
        words = rng.choice(tests).split()
        start = rng.randrange(len(words))
        quoted = words[start : start + rng.choice([5, 8, 12, 19, 20, 21, 60])]
        text = " ".join([rng.choice([*pieces, ""]), *quoted, rng.choice([*pieces, ""])]).strip()
        outcomes.add(repeats_by_definition(text, tests))
        assert index.repeats(text) == repeats_by_definition(text, tests), text
    assert outcomes == {True, False}


def test_case_punctuation_and_line_breaks_hide_nothing():
    test = sentence(5, 40)
    index = TestIndex([[test, "短い文章ですが二十文字より長いので見つかるはずの試験用の文です"]])
    words = test.split()
    assert index.repeats("Before: " + ",\n".join(word.upper() for word in words[7:30]) + ". After")
    assert not index.repeats(" ".join(reversed(words)))
    assert index.repeats("前に。短い文章ですが二十文字より長いので見つかるはずの、後ろに")
    assert not TestIndex([]).repeats(test) and not index.repeats("")


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_one_sources_test_text_is_in_no_sources_training_text(tmp_path):
    """As a passage of a longer text, and as a document of another source."""
    judged = [f"<{n}> {sentence(n, 30)}" for n in range(40)]
    own = [f"<{100 + n}> {sentence(100 + n, 30)}" for n in range(300)]
    longer = [" ".join([f"<{500 + n}>", *own[2 * n].split(), *judged[n].split()]) for n in range(40)]
    paths = {
        "path": write(tmp_path / "a.jsonl", own + longer),
        "test": write(tmp_path / "t.jsonl", judged),
    }
    others = write(tmp_path / "b.jsonl", [sentence(n + 900, 30) for n in range(200)] + judged)
    sources = Source(name="first", repeat=True, **paths), Source(name="second", repeat=True, path=others)
    corpus = small_corpus(sources, samples=2000, valid_samples=500, test_samples=300)
    tokenizer = word_tokenizer(tmp_path / "tokenizer")
    manifest = build(corpus, tokenizer, tmp_path / "out", seed=1)
    assert manifest["repeats_test"]["first"]["documents"] == 40
    assert manifest["repeats_test"]["second"]["documents"] >= 35  # the others are held out here as well
    from transformers import AutoTokenizer

    decode = AutoTokenizer.from_pretrained(tokenizer).decode
    for split in ("train", "valid"):
        text = " ".join(decode(ids) for ids in domain_streams(tmp_path / "out", split).values())
        assert not [n for n in range(40) if f"< {n} >" in text or f"<{n}>" in text]
    texts = list(train_documents(corpus, 1))
    assert len(texts) > 300 and not any(test in text for text in texts for test in judged)


def test_the_stand_in_learns_nothing_that_it_is_judged_by(tmp_path):
    judged = [f"Note {n}: {sentence(n, 30)}" for n in range(120)]
    path = write(
        tmp_path / "all.jsonl", [f"Note {500 + n}: {sentence(500 + n, 30)}" for n in range(400)] + judged
    )
    source = {"name": "a", "path": path, "test": write(tmp_path / "test.jsonl", judged)}
    corpus = {"samples": 64, "valid_samples": 8, "test_samples": 150, "seq_len": 16, "held_out": 0.2}
    standin = {"steps": 20, "batch": 8}
    config = parse(
        {"name": "x", "model": {"standin": standin}, "corpus": corpus | {"sources": [source]}}, "here"
    )
    steps = {step.name: step for step in plan(config, identify, {})}
    for text in train_documents(steps["tokenizer"].settings.texts, config.seed):
        assert int(text.split(":")[0].split()[1]) >= 500
    build(
        steps["pretraining text"].settings, word_tokenizer(tmp_path / "t"), tmp_path / "out", seed=config.seed
    )
    assert read_manifest(tmp_path / "out")["repeats_test"]["a"]["documents"] > 20
