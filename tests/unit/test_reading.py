"""Reading text: which files, which encoding, which spelling, where a text is cut, and which token ends it."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import END, word_tokenizer
from lines import recorded
from pydantic import ValidationError

from sparsekd_ray.config import Source
from sparsekd_ray.corpus import documents, identify
from sparsekd_ray.corpus.documents import joined
from sparsekd_ray.corpus.sources import read
from sparsekd_ray.corpus.tokens import check_context, load_encoder
from sparsekd_ray.errors import CorpusError


def texts(path: Path | str, **settings: object) -> list[str]:
    return list(documents(Source(name="a", path=str(path), **settings), None))


def test_bytes_are_text_and_other_values_are_refused_by_row(tmp_path):
    pq.write_table(pa.table({"text": pa.array(["é".encode(), b"\xff"], pa.binary())}), tmp_path / "a.parquet")
    assert list(islice(documents(Source(name="a", path=f"{tmp_path}/a.parquet"), None), 1)) == ["é"]
    with pytest.raises(CorpusError, match=r"a.parquet, row 2: column 'text' holds bytes that are not UTF-8"):
        texts(tmp_path / "a.parquet")
    chat = [{"role": "user", "content": "x"}]
    for value, message in (
        (chat, "a list of chat messages.*apply_chat_template"),
        (True, "a bool"),
        ({}, "a dict"),
    ):
        (tmp_path / "b.jsonl").write_text(json.dumps({"text": "x"}) + "\n" + json.dumps({"text": value}))
        with pytest.raises(CorpusError, match=f"line 2: column 'text' holds {message}"):
            texts(tmp_path / "b.jsonl")


@pytest.mark.parametrize("template", ["{text.title}", "{text[0]}", "{text!r}", "{text:>9}"])
def test_templates_do_not_look_inside_columns(tmp_path, template):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    with pytest.raises(CorpusError, match=r"whole columns|formats a column"):
        identify(Source(name="a", path=f"{tmp_path}/a.jsonl", text=template))


def test_wildcards_match_no_hidden_files(tmp_path):
    (tmp_path / ".old").mkdir()
    for name in ("a.txt", ".b.txt", ".old/a.txt"):
        (tmp_path / name).write_text(name)
    assert texts(f"{tmp_path}/*.txt") == texts(f"{tmp_path}/**/*.txt") == ["a.txt"]
    assert texts(f"{tmp_path}/.*.txt") == texts(f"{tmp_path}/.b.txt") == [".b.txt"]
    with pytest.raises(CorpusError, match="only hidden files match"):
        texts(f"{tmp_path}/*/*.txt")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_marked_encodings_are_read(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("é\r\nx\n".encode(encoding))
    (tmp_path / "a.jsonl").write_bytes('{"text": "é"}\n'.encode(encoding))
    assert texts(tmp_path / "a.txt") == ["é\r\nx\n"] and texts(tmp_path / "a.jsonl") == ["é"]


def test_unmarked_utf16_is_refused_with_its_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes("ab".encode("utf-16-le"))
    with pytest.raises(CorpusError, match=r"a.txt: byte 1 is zero.*UTF-16"):
        identify(Source(name="a", path=f"{tmp_path}/a.txt"))


def test_a_glob_draws_from_all_files_in_proportion(tmp_path):
    for name, count in (("a", 12_000), ("b", 6_000)):
        lines = (
            json.dumps({"text": f"{name} {n:06d} and some more words to be a row"}) for n in range(count)
        )
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    source = Source(name="a", path=f"{tmp_path}/*.jsonl")
    first = [document.text for document in islice(read(source, 1), 900)]
    counts = Counter(text[0] for text in first)
    assert 500 < counts["a"] < 700 and counts["a"] + counts["b"] == 900
    assert first == [document.text for document in islice(read(source, 1), 900)]


ROWS = [
    "",
    " = One = \n",
    "",
    " Text of one . \n",
    "",
    " = = Part = = \n",
    "",
    " x = 1 = \n",
    " = Two = \n",
    "",
]
ROWS += [" More . \n", "", " = Three = \n", "", " Last . \n"]


def test_lines_are_joined_and_cut_at_headings(tmp_path):
    """` = Two = ` follows a line of text: no heading, as in WikiText's formulas."""
    found = list(joined(ROWS))
    assert [document.rows for document in found] == [tuple(ROWS[:12]), tuple(ROWS[12:])]
    assert found[1].text == " = Three = \n\n Last . \n"
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in ROWS * 5))
    with pytest.raises(CorpusError, match=r"of its rows are blank.*Set join: true"):
        identify(Source(name="a", path=f"{tmp_path}/a.jsonl"))
    assert len(texts(tmp_path / "a.jsonl", join=False)) == 8 * 5
    assert len(texts(tmp_path / "a.jsonl", join=True)) == 2 * 5
    with recorded() as lines:
        (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": "short"}) for _ in range(60)))
        texts(tmp_path / "b.jsonl")
    assert any("half of its rows have at most 5 characters" in line for line in lines)


def test_lines_of_a_text_file_are_documents_where_join_is_false(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree")
    assert texts(tmp_path / "a.txt", join=False) == ["one", "two", "three"]


@pytest.mark.parametrize("name", ["all", "train", "valid", "test"])
def test_reserved_names_are_refused(name):
    with pytest.raises(ValidationError, match="choose another name"):
        Source(name=name, path="a.txt")


def test_the_separator_ends_a_text_and_not_a_turn(tmp_path):
    chat = word_tokenizer(tmp_path / "chat", "<|im_end|>", eos="<|im_end|>")
    encoder = load_encoder(chat, None)
    assert encoder.token(encoder.separator) == END and encoder.beginning is None
    chosen = load_encoder(chat, "<|im_end|>")
    assert chosen.token(chosen.separator) == "<|im_end|>"
    (ids,) = encoder([f"alpha {END} <|im_end|>"])
    assert list(ids).count(encoder.separator) == 1 and chosen.separator not in ids
    with pytest.raises(CorpusError, match=r"corpus.separator is 'nothing'"):
        load_encoder(chat, "nothing")


def test_sequences_beyond_the_context_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 64}')
    check_context(tmp_path, 64)
    with pytest.raises(CorpusError, match=r"corpus.seq_len is 65, the model's context 64"):
        check_context(tmp_path, 65)
