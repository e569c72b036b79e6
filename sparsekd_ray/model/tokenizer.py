"""A model's tokenizer, written so that every reader gives the same tokens.

A tokenizer directory may name a class, and readers disagree on classes. `AutoTokenizer` looks the class up by the
model's type. Transformers 5 builds some classes from rules of its own instead of tokenizer.json. Transformers 4 does
not know the names that 5 writes. Other tools read tokenizer.json alone. `save` therefore writes what the dense model's
`AutoTokenizer` does into tokenizer.json, and names the one class that reads this file as it is. It then compares three
readings of fixed texts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from sparsekd_ray.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FILES = (  # any of them may hold a tokenizer
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip

PORTABLE_CLASS = "PreTrainedTokenizerFast"  # reads tokenizer.json as it is, in transformers 4 and 5
PROBES = (
    "don't they've I'll WE'RE the river's stone's",
    "12345 20240719 3.14159 1,000,000 ½ ٣٤٥",
    "北京の天気は晴れです。오늘은 맑음",
    "  two  spaces,\ta tab\n\n\nthree lines \r\n and an end  ",
    "def get_river(stone, n=7):\n\treturn stone[n] != 'é' # naïve 🙂",
    "",
)


def load(directory: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a directory as `AutoTokenizer` reads it, without code from the directory.

    Raises ModelError if there is none, if it is unreadable, or if it has no tokenizer.json form.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not any((directory / name).is_file() for name in FILES):
        raise ModelError(f"{directory} has no tokenizer: expected one of {', '.join(FILES)}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise ModelError(f"{directory} holds a tokenizer that does not load: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(
            f"{directory} holds a tokenizer that runs in Python only ({type(tokenizer).__name__}): a tokenizer.json "
            "is needed; load it with AutoTokenizer where its libraries are installed, and save_pretrained it"
        )
    return tokenizer


def save(source: Path, out: Path) -> None:
    """Write the tokenizer of `source` to `out` in the form that all readers resolve alike, and prove that they do.

    Raises ModelError if `source` has no usable tokenizer, or if two readers of `out` give other tokens.
    """
    from tokenizers import Tokenizer

    original = load(source)
    rules = Tokenizer.from_str(original.backend_tokenizer.to_str())
    rules.no_truncation()  # left by the program that saved the file; some readers obey it, others do not
    rules.no_padding()
    out.mkdir(parents=True, exist_ok=True)
    rules.save(str(out / "tokenizer.json"))
    settings = _settings(original)
    if isinstance(original.chat_template, str):
        (out / "chat_template.jinja").write_text(original.chat_template, encoding="utf-8")
    elif original.chat_template:
        named = original.chat_template.items()
        settings["chat_template"] = [{"name": name, "template": text} for name, text in named]
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (out / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    check_same(original, out)


def _settings(tokenizer: PreTrainedTokenizerFast) -> dict[str, object]:
    """The fields of tokenizer_config.json that transformers 4 and 5 both read, and read alike."""
    special = {name: str(token) for name in _roles(tokenizer) if (token := getattr(tokenizer, name))}
    settings: dict[str, object] = {"tokenizer_class": PORTABLE_CLASS, **special}
    if extra := [str(token) for token in tokenizer.extra_special_tokens]:
        settings["additional_special_tokens"] = extra  # transformers 4 fails on 5's name for them
    return settings | {
        "clean_up_tokenization_spaces": bool(tokenizer.clean_up_tokenization_spaces),
        "model_input_names": ["input_ids", "attention_mask"],  # a causal model takes no others
        "model_max_length": tokenizer.model_max_length,
        "padding_side": tokenizer.padding_side,
        "truncation_side": tokenizer.truncation_side,
    }


def _roles(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """`bos_token`, `eos_token` and so on."""
    return [name for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES if name.endswith("_token")]


def check_same(original: PreTrainedTokenizerFast, directory: Path) -> None:
    """ModelError if AutoTokenizer or the bare tokenizers library reads `directory` otherwise than `original`.

    The check compares the ids of `PROBES` and of every control token inside a text, with and without the tokens that
    the tokenizer adds. It also compares their decoding and the chat template.
    """
    from tokenizers import Tokenizer

    reloaded, bare = load(directory), Tokenizer.from_file(str(directory / "tokenizer.json"))
    texts = (*PROBES, *(f"a{token} b\n{token}" for token in original.get_added_vocab()))
    for text in texts:
        for added in (False, True):
            expected = original(text, add_special_tokens=added)["input_ids"]
            readings = {
                "AutoTokenizer": reloaded(text, add_special_tokens=added)["input_ids"],
                "tokenizers": bare.encode(text, add_special_tokens=added).ids,
            }
            for reader, ids in readings.items():
                if ids != expected:
                    raise ModelError(
                        f"{directory}: {reader} reads {text!r} as {ids}, but the dense model's tokenizer as {expected}"
                    )
        if reloaded.decode(expected) != original.decode(expected):
            raise ModelError(f"{directory}: its tokenizer does not decode {text!r} as the dense model's does")
    if reloaded.chat_template != original.chat_template:
        raise ModelError(f"{directory}: its chat template is not the dense model's")
