"""The tokenizer that a directory carries is read alike by all readers, as the dense model's is."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from sparsekd_ray.corpus import tokenizer_hash
from sparsekd_ray.errors import ModelError
from sparsekd_ray.model import tokenizer

END, START, PAD = "<|endoftext|>", "<|user|>", "<|pad|>"
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+(?i:'s|'t)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXT = "def get_river(stone, n=20240719):\n\treturn river_stone[n] # don't lose the RIVER's stone\n"


def directory(path: Path, model_type: str | None, **settings: Any) -> Path:
    """A byte-level BPE tokenizer with a split rule of its own, as Phi-4-mini's, and what else is asked for."""
    path.mkdir()
    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated", False)
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[END, START, PAD], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([TEXT, "the river's stone 123 456 don't won't"] * 9, trainer)
    if settings.pop("bos", False):
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{END} $A", pair=f"{END} $A {END} $B", special_tokens=[(END, 0)]
        )
    if settings.pop("truncated", False):
        bpe.enable_truncation(4)
        bpe.enable_padding(length=9)
    bpe.save(str(path / "tokenizer.json"))
    roles = {"bos_token": END, "eos_token": END, "pad_token": PAD}
    (path / "tokenizer_config.json").write_text(json.dumps(roles | settings))
    if model_type:
        (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    return path


@pytest.mark.parametrize("model_type", [None, "phi3", "qwen3", "llama"])
@pytest.mark.parametrize(
    "settings",
    [
        {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False},
        {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": [START]},
        {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": [START]},
        {"tokenizer_class": "Qwen2Tokenizer"},
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos": True},
        {"tokenizer_class": "PreTrainedTokenizerFast", "truncated": True},
        {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages[0].content }}"},
    ],
)
def test_every_model_type_gives_the_dense_model_s_tokens(
    model_type: str | None, settings: dict[str, Any], tmp_path: Path
) -> None:
    dense = directory(tmp_path / "dense", model_type, **settings)
    original = AutoTokenizer.from_pretrained(dense)
    tokenizer.save(dense, tmp_path / "out")
    for written in ("phi3", "sparsekd_phi3", "sparsekd_llama", "qwen3", "never_heard_of"):
        (tmp_path / "out" / "config.json").write_text(json.dumps({"model_type": written}))
        again = AutoTokenizer.from_pretrained(tmp_path / "out")
        for text in (TEXT, f"a{START}b {END}"):
            assert again(text)["input_ids"] == original(text)["input_ids"]
        assert again.all_special_tokens == original.all_special_tokens
        assert again.chat_template == original.chat_template
    bare = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert bare.encode(TEXT).ids == original(TEXT)["input_ids"]
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in config  # which transformers 4 reads as a mapping


def test_saving_again_changes_nothing(tmp_path: Path) -> None:
    tokenizer.save(directory(tmp_path / "dense", "phi3", tokenizer_class="GPT2Tokenizer"), tmp_path / "one")
    tokenizer.save(tmp_path / "one", tmp_path / "two")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_dense_student_and_corpus_share_a_hash(tmp_path: Path) -> None:
    dense = directory(tmp_path / "dense", "phi3", tokenizer_class="GPT2Tokenizer", truncated=True)
    tokenizer.save(dense, tmp_path / "student")
    tokenizer.save(tmp_path / "student", tmp_path / "texts")
    used = tokenizer.load(tmp_path / "texts")
    used([f"{END} a"], split_special_tokens=True, truncation=True, max_length=2, padding="max_length")
    readings = [tokenizer.load(dense), tokenizer.load(tmp_path / "student"), used]
    assert len({tokenizer_hash(reading) for reading in readings}) == 1


@pytest.mark.parametrize("change", ["split", "merges", "normaliser", "around"])
def test_other_rules_over_one_vocabulary_have_another_hash(change: str, tmp_path: Path) -> None:
    dense = directory(tmp_path / "dense", None, tokenizer_class="PreTrainedTokenizerFast")
    other = directory(
        tmp_path / "other", None, tokenizer_class="PreTrainedTokenizerFast", bos=change == "around"
    )
    rules = json.loads((other / "tokenizer.json").read_text())
    if change == "split":
        rules["pre_tokenizer"] = {
            "type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True
        }  # fmt: skip
    elif change == "merges":
        rules["model"]["merges"] = []
    elif change == "normaliser":
        rules["normalizer"] = {"type": "Lowercase"}
    (other / "tokenizer.json").write_text(json.dumps(rules))
    one, two = tokenizer.load(dense), tokenizer.load(other)
    assert one.get_vocab() == two.get_vocab()
    assert tokenizer_hash(one) != tokenizer_hash(two)


def test_a_tokenizer_without_rules_to_hash_is_refused(tmp_path: Path) -> None:
    settings = {"tokenizer_class": "CanineTokenizer"}  # runs in Python only
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"runs in Python only \(CanineTokenizer\)"):
        tokenizer.load(tmp_path)


def test_readers_that_disagree_are_refused(tmp_path: Path) -> None:
    dense = directory(tmp_path / "dense", "phi3", tokenizer_class="PreTrainedTokenizerFast")
    tokenizer.save(dense, tmp_path / "out")
    rules = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    rules.save(str(tmp_path / "out" / "tokenizer.json"))
    with pytest.raises(ModelError, match=r"reads .* but the dense model's tokenizer as"):
        tokenizer.check_same(tokenizer.load(dense), tmp_path / "out")


@pytest.mark.parametrize("content", [None, "{", '{"version": "1.0"}'])
def test_no_tokenizer_or_a_damaged_one_is_named(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    expected = "has no tokenizer" if content is None else "tokenizer that"
    with pytest.raises(ModelError, match=expected):
        tokenizer.load(tmp_path)
