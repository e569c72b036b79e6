"""The corpus: reading documents from anywhere, splitting by document, packing, and what is refused."""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import END, WORDS

from sparsekd_ray.config import Corpus, Source
from sparsekd_ray.corpus import (
    build,
    documents,
    domain_streams,
    embedded,
    identify,
    read_rows,
    read_test_text,
    side,
    tokenizer_hash,
    train_documents,
)
from sparsekd_ray.corpus.held_out import PASSAGE
from sparsekd_ray.corpus.splits import quotas, shares
from sparsekd_ray.errors import CorpusError, ModelError

SHARED = Path(__file__).parents[2] / "../shared/data"


def make_documents(count: int, start: int = 0) -> list[str]:
    """Different documents of uneven length that say their own number."""
    rng = random.Random(start)
    return [f"<{start + n}> " + " ".join(rng.choices(WORDS, k=rng.randint(3, 100))) for n in range(count)]


def numbers(text: str) -> set[str]:
    return set(re.findall(r"< ?(\d+) ?>", text))


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(make_documents(50), trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_dir)


def write_jsonl(path: Path, texts: list[str], **more: object) -> str:
    path.write_text("".join(json.dumps({"text": text, **more}) + "\n" for text in texts))
    return str(path)


def two_domains(tmp_path: Path) -> tuple[Source, Source]:
    first = write_jsonl(tmp_path / "first.jsonl", make_documents(300))
    second = write_jsonl(tmp_path / "second.jsonl", make_documents(400, start=1000))
    return Source(name="first", path=first, weight=2), Source(name="second", path=second, weight=1)


def small_corpus(sources: tuple[Source, ...], **settings: object) -> Corpus:
    defaults = {"samples": 50, "valid_samples": 8, "test_samples": 8, "seq_len": 16, "held_out": 0.3}
    return Corpus(sources=sources, **{**defaults, "shard_rows": 8, **settings})


def build_in(out: Path, corpus: Corpus, tokenizer_dir: Path, seed: int = 1) -> dict:
    return build(corpus, tokenizer_dir, out, seed=seed)


def fingerprint(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- packing ---


def naive_rows(
    source: Source, split: str, rows: int, corpus: Corpus, seed: int, tokenizer
) -> list[list[int]]:
    """The definition, a document and a token at a time."""
    stream: list[int] = []
    for text in documents(source, seed):
        if len(stream) >= rows * corpus.seq_len:
            break
        if side(text, corpus.held_out) != split:
            continue
        ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        longest = max(1, int(rows * PASSAGE)) * corpus.seq_len
        if split != "train" and len(ids) > longest:
            first = (len(ids) - longest) // 2
            ids = [*ids[first : first + longest - 1], tokenizer.eos_token_id]
        stream += ids
    whole = [stream[i : i + corpus.seq_len] for i in range(0, len(stream), corpus.seq_len)]
    return [row for row in whole if len(row) == corpus.seq_len][:rows]


@pytest.mark.parametrize("seq_len, test_samples", [(16, 8), (7, 2), (131, 5), (2, 3)])
def test_rows_are_those_of_the_definition(tmp_path, tokenizer_dir, tokenizer, seq_len, test_samples):
    corpus = small_corpus(two_domains(tmp_path), seq_len=seq_len, test_samples=test_samples)
    manifest = build_in(tmp_path / "out", corpus, tokenizer_dir, seed=3)
    for split in ("train", "valid", "test"):
        rows = read_rows(tmp_path / "out", split)
        found = dict(zip(rows["sample_id"].to_pylist(), rows["input_ids"].to_pylist(), strict=True))
        expected = {
            f"{source.name}-{split}-{index:06d}": row
            for source in corpus.sources
            for index, row in enumerate(
                naive_rows(source, split, quotas(corpus)[source.name][split], corpus, 3, tokenizer)
            )
        }
        assert found == expected
        assert manifest["rows"][split] == Counter(rows["domain"].to_pylist())
        assert manifest["tokens"][split] == {name: n * seq_len for name, n in manifest["rows"][split].items()}


def test_every_token_is_kept_or_counted_as_dropped(tmp_path, tokenizer_dir, tokenizer):
    corpus = small_corpus(two_domains(tmp_path)[:1], samples=100, valid_samples=5, test_samples=5)
    manifest = build_in(tmp_path / "out", corpus, tokenizer_dir, seed=3)
    (source,) = corpus.sources
    for split in ("train", "valid", "test"):
        mine = (text for text in documents(source, 3) if side(text, corpus.held_out) == split)
        taken = itertools.islice(mine, manifest["documents"][split]["first"])
        tokens = sum(len(tokenizer.encode(text, add_special_tokens=False)) + 1 for text in taken)
        assert tokens == manifest["tokens"][split]["first"] + manifest["dropped_tokens"][split]["first"]


def test_train_rows_of_all_domains_are_mixed_and_cut_into_shards(tmp_path, tokenizer_dir):
    build_in(tmp_path / "out", small_corpus(two_domains(tmp_path)), tokenizer_dir)
    shards = sorted((tmp_path / "out/train").iterdir())
    assert [pq.read_metadata(shard).num_rows for shard in shards] == [8, 8, 8, 8, 8, 8, 2]
    assert [shard.name for shard in shards] == [f"{n:05d}.parquet" for n in range(7)]
    assert all(len(set(pq.read_table(shard)["domain"].to_pylist())) == 2 for shard in shards[:6])
    assert read_rows(tmp_path / "out", "test")["sample_id"].to_pylist() == [
        *(f"first-test-{n:06d}" for n in range(5)),
        *(f"second-test-{n:06d}" for n in range(3)),
    ]


def test_domain_streams_are_consecutive_text(tmp_path, tokenizer_dir, tokenizer):
    corpus = small_corpus(two_domains(tmp_path))
    build_in(tmp_path / "out", corpus, tokenizer_dir, seed=5)
    streams = domain_streams(tmp_path / "out", "train")
    assert set(streams) == {"first", "second"} and streams["first"].dtype == np.int32
    for source in corpus.sources:
        train = [text for text in documents(source, 5) if side(text, corpus.held_out) == "train"]
        joined = "".join(text + END for text in train)
        text = tokenizer.decode(streams[source.name], clean_up_tokenization_spaces=False)
        assert len(streams[source.name]) == quotas(corpus)[source.name]["train"] * 16
        assert joined.startswith(text)


def test_the_raw_test_text_is_kept_in_order(tmp_path, tokenizer_dir):
    corpus = small_corpus(two_domains(tmp_path))
    manifest = build_in(tmp_path / "out", corpus, tokenizer_dir, seed=5)
    for source in corpus.sources:
        held_out = [text for text in documents(source, 5) if side(text, corpus.held_out) == "test"]
        found = read_test_text(tmp_path / "out", source.name)
        assert [document.text for document in found] == held_out[: manifest["documents"]["test"][source.name]]
        assert all(document.rows == (document.text,) for document in found)
    with pytest.raises(CorpusError, match="no test text of 'third'"):
        read_test_text(tmp_path / "out", "third")


def test_equal_settings_give_equal_bytes(tmp_path, tokenizer_dir):
    corpus = small_corpus(two_domains(tmp_path))
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        build_in(tmp_path / out, corpus, tokenizer_dir, seed)
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    other = fingerprint(tmp_path / "c")
    assert all(
        other[name] != digest for name, digest in fingerprint(tmp_path / "a").items() if "train/" in name
    )


def test_the_manifest_names_the_tokenizer_that_is_kept_beside_it(tmp_path, tokenizer_dir, tokenizer):
    from transformers import AutoTokenizer

    manifest = build_in(tmp_path / "out", small_corpus(two_domains(tmp_path)), tokenizer_dir)
    kept = AutoTokenizer.from_pretrained(tmp_path / "out/tokenizer")
    assert manifest == json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["tokenizer_hash"] == tokenizer_hash(kept) == tokenizer_hash(tokenizer)
    assert (manifest["vocab_size"], manifest["seq_len"]) == (len(tokenizer), 16)
    kept.add_tokens(["new"])
    assert tokenizer_hash(kept) != manifest["tokenizer_hash"]


def test_lines_in_many_small_files_are_refused_as_in_one(tmp_path):
    for number in range(10):
        write_jsonl(
            tmp_path / f"{number}.jsonl", ["A line of a text that goes on.", "", "And on it goes."] * 3
        )
    with pytest.raises(CorpusError, match="of its rows are blank"):
        list(documents(Source(name="lines", path=str(tmp_path / "*.jsonl")), 1))


def test_a_tokenizer_without_an_end_is_refused(tmp_path, tokenizer_dir):
    from transformers import PreTrainedTokenizerFast

    (tmp_path / "plain.json").write_text(
        (tokenizer_dir / "tokenizer.json").read_text().replace(END, "<none>")
    )
    PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "plain.json")).save_pretrained(tmp_path / "t")
    with pytest.raises(ModelError, match=r"no end-of-text token .* corpus\.separator"):
        build_in(tmp_path / "out", small_corpus(two_domains(tmp_path)), tmp_path / "t")


# --- splits and shares ---


def test_a_repeated_document_is_on_one_side_only(tmp_path, tokenizer_dir, tokenizer):
    path = write_jsonl(tmp_path / "twice.jsonl", make_documents(200) * 2)
    corpus = small_corpus((Source(name="twice", path=path),), samples=400, valid_samples=50, test_samples=50)
    build_in(tmp_path / "out", corpus, tokenizer_dir)
    streams = {s: domain_streams(tmp_path / "out", s)["twice"] for s in ("train", "valid", "test")}
    seen = {split: numbers(tokenizer.decode(ids)) for split, ids in streams.items()}
    assert all(len(found) > 10 for found in seen.values())
    assert not seen["train"] & seen["valid"] and not seen["train"] & seen["test"]
    assert not seen["valid"] & seen["test"]


def test_test_documents_from_elsewhere_are_all_of_the_test_split_and_never_trained_on(
    tmp_path, tokenizer_dir, tokenizer
):
    here, there = make_documents(200), make_documents(40, start=5000)
    path = write_jsonl(tmp_path / "here.jsonl", here + there[:20])
    test = write_jsonl(tmp_path / "there.jsonl", there + here[:20])
    corpus = small_corpus(
        (Source(name="a", path=path, test=test),), samples=300, valid_samples=40, test_samples=9999
    )
    build_in(tmp_path / "out", corpus, tokenizer_dir)
    text = {s: tokenizer.decode(domain_streams(tmp_path / "out", s)["a"]) for s in ("train", "valid", "test")}
    assert text["test"] == END.join(there + here[:20])[: len(text["test"])]  # in the order of the file
    in_test = numbers(text["test"])
    assert in_test == {str(n) for n in (*range(5000, 5040), *range(20))}
    assert not in_test & (numbers(text["train"]) | numbers(text["valid"]))
    assert not numbers(text["train"]) & numbers(text["valid"])


def test_held_out_shares_are_those_asked_for():
    sides = Counter(side(text, 0.2) for text in make_documents(5000))
    assert sides["test"] / 5000 == pytest.approx(0.1, abs=0.015)
    assert sides["valid"] / 5000 == pytest.approx(0.1, abs=0.015)
    stays = [text for text in make_documents(500) if side(text, 0.2) == "test"]
    assert all(side(text, 0.4) == "test" for text in stays)


@pytest.mark.parametrize(
    "total, weights, expected",
    [
        (10, [1, 1, 1], [4, 3, 3]),
        (1024, [0.35, 0.25, 0.25, 0.15], [358, 256, 256, 154]),
        (50_000, [30, 25, 25, 20], [15_000, 12_500, 12_500, 10_000]),
        (7, [5.0], [7]),
        (1, [1, 3], [0, 1]),
    ],
)
def test_shares_keep_to_the_weights_and_to_the_sum(total, weights, expected):
    assert shares(total, weights) == expected and sum(expected) == total


def test_held_out_quotas_are_caps_and_training_quotas_are_met(tmp_path, tokenizer_dir):
    manifest = build_in(tmp_path / "out", small_corpus(two_domains(tmp_path), samples=100), tokenizer_dir)
    assert manifest["rows"]["train"] == {"first": 67, "second": 33}
    assert manifest["rows"]["test"] == {"first": 5, "second": 3}
    capped = small_corpus(two_domains(tmp_path), test_samples=100_000)
    rows = build_in(tmp_path / "all", capped, tokenizer_dir)["rows"]["test"]
    assert 5 < rows["first"] < 66_667


def test_reading_stops_once_the_rows_are_there(tmp_path, tokenizer_dir):
    endless = Source(name="sums", path="embedded:arithmetic")
    manifest = build_in(tmp_path / "out", small_corpus((endless,)), tokenizer_dir)
    assert manifest["rows"] == {"train": {"sums": 50}, "valid": {"sums": 8}, "test": {"sums": 8}}


def test_repeat_starts_again_with_the_training_documents_only(tmp_path, tokenizer_dir):
    path = write_jsonl(tmp_path / "few.jsonl", make_documents(30))
    corpus = small_corpus((Source(name="few", path=path, repeat=True),), samples=300)
    build_in(tmp_path / "out", corpus, tokenizer_dir)
    once = small_corpus((Source(name="few", path=path),), samples=30)
    train = domain_streams(tmp_path / "out", "train")["few"]
    build_in(tmp_path / "once", once, tokenizer_dir)
    assert len(train) == 300 * 16
    assert np.array_equal(train[: 30 * 16], domain_streams(tmp_path / "once", "train")["few"])
    period = next(p for p in range(16, len(train)) if np.array_equal(train[p:], train[:-p]))
    assert train[period - 1] == 0 and period > 30 * 16  # a whole pass, up to its last end-of-text token
    assert fingerprint(tmp_path / "out/test") == fingerprint(tmp_path / "once/test")


def test_tokenizer_text_is_training_text_in_proportion(tmp_path):
    sources = two_domains(tmp_path)
    texts = list(train_documents(small_corpus(sources), 1))
    everything = [text for source in sources for text in documents(source, 1)]
    assert sorted(texts) == sorted(text for text in everything if side(text, 0.3) == "train")
    characters = Counter()
    for text in texts[:150]:
        characters["second" if int(text[1:].split(">")[0]) >= 1000 else "first"] += len(text)
    assert characters["first"] / characters["second"] == pytest.approx(2, rel=0.1)


# --- reading ---


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_text_file_is_cut_at_blank_lines_and_loses_nothing(tmp_path, newline):
    rng = random.Random(4)
    blocks = [newline.join(make_documents(rng.randint(1, 12), start=n)) for n in range(60)]
    gaps = [newline * rng.randint(2, 4), f"{newline} \t{newline}"]
    text = newline + "".join(block + rng.choice(gaps) for block in blocks) + "the end, without a newline"
    (tmp_path / "a.txt").write_bytes(text.encode())
    found = list(documents(Source(name="a", path=str(tmp_path / "a.txt")), None))
    assert "".join(found) == text
    assert len(found) > 10 and all(len(part) >= 2000 for part in found[:-1])
    for before, after in itertools.pairwise(found):
        assert (
            before.endswith(newline) and not before.splitlines()[-1].strip() and after.splitlines()[0].strip()
        )
        assert len(before.rstrip().rpartition(newline * 2)[0]) < 2000 + 100  # no longer than it has to be


def write_everywhere(tmp_path: Path, texts: list[str]) -> dict[str, str]:
    """The same documents in each form: {form: path of a source}."""
    half = len(texts) // 2
    folder = tmp_path / "hub"
    folder.mkdir()
    pq.write_table(
        pa.table({"n": range(half), "text": texts[:half]}), tmp_path / "0.parquet", row_group_size=7
    )
    pq.write_table(pa.table({"text": texts[half:]}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"text": texts}), folder / "train.parquet")
    pq.write_table(pa.table({"text": ["held out"]}), folder / "test.parquet")
    write_jsonl(tmp_path / "all.jsonl", texts)
    with fsspec.open("memory://corpus/all.jsonl", "w") as file:
        file.write((tmp_path / "all.jsonl").read_text())
    return {
        "glob": f"{tmp_path}/*.parquet",
        "jsonl": f"{tmp_path}/all.jsonl",
        "file": f"file://{tmp_path}/all.jsonl",
        "memory": "memory://corpus/*.jsonl",
        "hub": f"hf://{folder}",
    }


def test_every_form_of_storage_gives_the_same_documents(tmp_path):
    texts = make_documents(50)
    paths = write_everywhere(tmp_path, [*texts, "", " \n"])  # documents without text are none
    for form, path in paths.items():
        source = Source(name="a", path=path)
        assert list(documents(source, None)) == texts, form
        shuffled = list(documents(source, 1))
        assert shuffled == list(documents(source, 1)) and sorted(shuffled) == sorted(texts), form
        assert shuffled != texts, form


def test_a_hub_source_takes_its_test_documents_from_another_split(tmp_path, tokenizer_dir, tokenizer):
    paths = write_everywhere(tmp_path, make_documents(100))
    source = Source(name="a", path=paths["hub"], test="test")
    corpus = small_corpus((source,), seq_len=4, test_samples=9)
    build_in(tmp_path / "out", corpus, tokenizer_dir)
    text = tokenizer.decode(domain_streams(tmp_path / "out", "test")["a"])
    assert len(text) > 4 and f"held out{END}".startswith(text)


def test_a_relative_path_starts_at_the_working_directory(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "here.jsonl", ["text"])
    monkeypatch.chdir(tmp_path)
    assert list(documents(Source(name="a", path="here.jsonl"), None)) == ["text"]


def test_the_template_makes_documents_of_columns_and_leaves_out_nulls(tmp_path):
    rows = [
        {"q": "1 + 1?", "a": 2},
        {"q": None, "a": "3"},
        {"a": "4"},
        {"q": "{x}", "a": "{}"},
        {"q": "", "a": 0.5},
    ]
    rows += [{"q": "6", "a": float("nan")}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = Source(name="a", path=str(tmp_path / "a.jsonl"), text="{{q}} {q}\n{a}")
    assert list(documents(source, None)) == ["{q} 1 + 1?\n2", "{q} {x}\n{}", "{q} \n0.5"]


def test_a_missing_column_is_named_with_those_there_are(tmp_path):
    for path in write_everywhere(tmp_path, make_documents(4)).values():
        with pytest.raises(CorpusError, match=r"no column \['answer'\], only \[('n', )?'text'\]"):
            list(documents(Source(name="a", path=path, text="{text} {answer}"), None))


def bad_files(tmp_path: Path) -> dict[str, tuple[str, str]]:
    """{case: (path, what the message says)}."""
    pq.write_table(pa.table({"text": ["x" * 5000]}), tmp_path / "cut.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "cut.parquet").read_bytes()[:-20])
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "list.jsonl").write_text("[1, 2]\n")
    (tmp_path / "half.jsonl").write_text('{"text": "\\ud83d"}\n')
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "a.csv").write_text("text\n")
    return {
        "cut": ("cut.parquet", "cannot read .*cut.parquet"),
        "json": ("bad.jsonl", "bad.jsonl, line 2: not JSON"),
        "list": ("list.jsonl", "found a list; a .jsonl file holds one object per line"),
        "surrogate": ("half.jsonl", "half.jsonl, line 1: column 'text' holds half of a surrogate pair"),
        "encoding": ("latin.txt", "latin.txt: byte 3 is not UTF-8"),
        "kind": ("a.csv", "known kinds of file are .parquet, .jsonl, .txt"),
        "nothing": ("none*.parquet", "no such file"),
        "directory": ("", "is a directory"),
    }


def test_bad_files_end_in_one_clear_message(tmp_path):
    for case, (name, message) in bad_files(tmp_path).items():
        with pytest.raises(CorpusError, match=message):
            print(case, list(documents(Source(name="a", path=f"{tmp_path}/{name}"), None)))


@pytest.mark.parametrize(
    "source, message",
    [
        ({"path": "embedded:poems"}, "there are arithmetic, code, docstrings, manual"),
        ({"path": "hf://c4"}, "write hf://owner/dataset"),
        ({"path": "nowhere://bucket/a.jsonl"}, "cannot read nowhere://"),
        ({"path": "embedded:manual", "text": "{question"}, "is not a template"),
        ({"path": "embedded:manual", "text": "no column"}, "must name columns"),
        ({"path": "embedded:manual", "test": "missing.jsonl"}, "no such file"),
    ],
)
def test_identify_refuses_what_cannot_work(source, message):
    with pytest.raises(CorpusError, match=message):
        identify(Source(name="a", **source))


def test_a_hub_that_does_not_answer_is_told_at_once(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    source = Source(name="c4", path="hf://allenai/c4/en")
    assert identify(source)["content"]["hub"] == "allenai/c4"  # the plan needs no network
    start = time.monotonic()
    with pytest.raises(CorpusError, match=r"cannot read hf://allenai/c4/en \(ConnectError"):
        next(documents(source, 1))
    assert time.monotonic() - start < 10


# --- what is too little ---


@pytest.mark.parametrize(
    "texts, settings, message",
    [
        ([], {}, "is empty"),
        (["", "  \n "], {}, "is empty"),
        (["alpha beta"], {"held_out": 0.001}, r"found \d training tokens, 0 sequences of 16, but 50 asked"),
        (make_documents(20), {}, r"found \d+ training tokens, \d+ sequences .* or set repeat: true"),
        (
            make_documents(300),
            {"held_out": 1e-9},
            "held out for valid and test .* Raise corpus.held_out, or give",
        ),
    ],
)
def test_too_little_text_is_refused(tmp_path, tokenizer_dir, texts, settings, message):
    source = Source(name="a", path=write_jsonl(tmp_path / "a.jsonl", texts))
    with pytest.raises(CorpusError, match=message):
        build_in(tmp_path / "out", small_corpus((source,), **settings), tokenizer_dir)
    assert not (tmp_path / "out").exists()


def test_a_corpus_too_small_for_its_sources_is_refused_before_any_work(tmp_path):
    corpus = small_corpus(two_domains(tmp_path), valid_samples=1)
    with pytest.raises(CorpusError, match=r"corpus\.valid_samples is 1, too few for one sequence of second"):
        build_in(tmp_path / "out", corpus, tmp_path / "no tokenizer")


# --- identity ---


def test_identity_follows_contents_and_not_places(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    (tmp_path / "moved").mkdir()
    write_jsonl(tmp_path / "moved/a.jsonl", ["one", "two"])
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/a.jsonl").symlink_to(tmp_path / "a.jsonl")
    here = identify(Source(name="a", path=f"{tmp_path}/*.jsonl"))
    assert here["content"]["files"] == [
        {
            "name": "a.jsonl",
            "size": (tmp_path / "a.jsonl").stat().st_size,
            "sha256": hashlib.sha256((tmp_path / "a.jsonl").read_bytes()).hexdigest(),
        }
    ]
    assert identify(Source(name="a", path=f"{tmp_path}/moved/a.jsonl")) == here
    assert identify(Source(name="a", path=f"{tmp_path}/linked/a.jsonl")) == here
    write_jsonl(tmp_path / "moved/a.jsonl", ["one", "owt"])
    assert identify(Source(name="a", path=f"{tmp_path}/moved/a.jsonl")) != here


def test_identity_follows_the_settings_that_decide_the_tokens(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["one"])
    other = write_jsonl(tmp_path / "b.jsonl", ["two"])
    variants = [{}, {"weight": 2.0}, {"text": "{text}!"}, {"repeat": True}, {"test": other}, {"name": "b"}]
    found = [json.dumps(identify(Source(**{"name": "a", "path": path, **more}))) for more in variants]
    assert len(set(found)) == len(found)
    hub = {"path": "hf://owner/set/config"}
    variants = [{}, {"revision": "abc"}, {"split": "other"}, {"test": "test"}, {"path": "hf://owner/set"}]
    found = [json.dumps(identify(Source(**{"name": "a", **hub, **more}))) for more in variants]
    assert len(set(found)) == len(found)


def test_identity_of_remote_files_and_of_embedded_text(tmp_path):
    with fsspec.open("memory://identity/a.jsonl", "w") as file:
        file.write('{"text": "one"}')
    (found,) = identify(Source(name="a", path="memory://identity/a.jsonl"))["content"]["files"]
    assert (found["name"], found["size"]) == ("a.jsonl", 15) and found["checksum"]
    version = ".".join(map(str, sys.version_info[:3]))
    source = Source(name="a", path="embedded:code", test="embedded:manual")
    assert identify(source)["content"] == {"embedded": "code", "python": version}
    assert identify(source)["test"] == {"embedded": "manual", "python": version}


# --- embedded text ---


def test_embedded_sets_are_the_same_every_time_and_ordered_by_the_seed():
    for name in ("docstrings", "manual", "code", "arithmetic"):
        first = list(itertools.islice(embedded.documents(name, 1), 8))
        assert first == list(itertools.islice(embedded.documents(name, 1), 8))
        assert first != list(itertools.islice(embedded.documents(name, 2), 8))
        assert len(set(first)) == 8 and all(text.strip() for text in first)


def test_embedded_code_is_code_without_docstrings_and_comments(tmp_path, monkeypatch):
    source = '''"""Module."""  # a comment
class Empty:
    """Only a docstring."""
def f(x):
    """Function."""
    async def g():
        "Nested."
        return "# not a comment"
    return g  # another
'''
    (tmp_path / "json").mkdir()
    (tmp_path / "json/__init__.py").write_text(source)
    (tmp_path / "json/tests").mkdir()
    (tmp_path / "json/tests/__init__.py").write_text(source)
    (tmp_path / "idlelib.py").write_text(source)
    (tmp_path / "not_of_the_library.py").write_text(source)
    (tmp_path / "abc.py").write_text('"""Nothing but prose."""\n')
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    (code,) = embedded.documents("code", 1)
    expected = "class Empty: pass\ndef f(x):\n  async def g():\n    return '# not a comment'\n  return g"
    assert ast.dump(ast.parse(code)) == ast.dump(ast.parse(expected))
    prose = sorted(embedded.documents("docstrings", 1))
    assert prose == ["Module.\n\nOnly a docstring.\n\nFunction.\n\nNested.\n", "Nothing but prose.\n"]


def test_the_manual_keeps_each_section_once():
    """Topics quote sections of each other whole, which would put a test document into the training text."""
    sections = list(embedded.documents("manual", None))
    lines = [{line for line in text.splitlines() if len(line) > 50} for text in sections]
    assert len(sections) > 100
    for mine, text in zip(lines, sections, strict=True):
        others = [theirs for theirs in lines if theirs is not mine]
        shared = max(len(mine & theirs) for theirs in others)
        assert len(mine) < 10 or shared < len(mine) / 2, text[:80]


def test_embedded_arithmetic_is_right():
    texts = list(itertools.islice(embedded.documents("arithmetic", 7), 200))
    equations = re.findall(r"(\d+) ([-+*/]) (\d+) = (-?\d+)", "".join(texts))
    apply = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}
    assert len(equations) > 2000
    assert all(apply[sign](int(a), int(b)) == int(c) >= 0 for a, sign, b, c in equations)
    problems = [problem for text in texts for problem in text.split("\n\n")]
    assert len(problems) == 1600 and len(set(problems)) > 1590
    for problem in problems:
        worked, answer = re.fullmatch(
            r"Question: .+\?\nAnswer: (.+) The answer is (\d+)\.\n?", problem
        ).groups()
        assert re.findall(r"\d+", worked)[-1] == answer and "{" not in problem


def test_a_stripped_python_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    for name in ("docstrings", "code", "manual"):
        with pytest.raises(
            CorpusError, match=r"this Python installation .* lacks .* use a full installation"
        ):
            identify(Source(name="a", path=f"embedded:{name}"))


# --- real text ---


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_wikitext_and_gsm8k(tmp_path, tokenizer_dir, tokenizer):
    wiki = Source(name="wiki", path=f"{SHARED}/wikitext-2/valid.txt", test=f"{SHARED}/wikitext-2/test.txt")
    maths = Source(name="maths", path=f"{SHARED}/gsm8k/train.jsonl", text="{question}\n{answer}")
    corpus = small_corpus((wiki, maths), samples=600, test_samples=60, seq_len=64, held_out=0.1)
    manifest = build_in(tmp_path / "out", corpus, tokenizer_dir)
    assert manifest["rows"]["train"] == {"wiki": 300, "maths": 300}
    streams = domain_streams(tmp_path / "out", "test")
    wiki_text = tokenizer.decode(streams["wiki"]).replace(END, "")
    assert (SHARED / "wikitext-2/test.txt").read_text().startswith(wiki_text) and len(wiki_text) > 2000
    assert "####" in tokenizer.decode(streams["maths"])
