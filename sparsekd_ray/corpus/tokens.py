"""Text → tokens: the tokenizer, the token after each document, and the token before it if there is one.

A control token that stands in the text (`<|endoftext|>` in a page about language models) is read as plain text.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sparsekd_ray.errors import CorpusError, ModelError
from sparsekd_ray.model.tokenizer import load

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

# Chat tokenizers have these end tokens, which end a turn. Their models were pretrained with another token after texts.
TURN_ENDS = frozenset(
    ["<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<turn|>", "<|eot|>", "<|eom_id|>", "<|return|>"]
)
TEXT_ENDS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end▁of▁sentence|>",
    "<｜end▁of▁sentence｜>",
    "<eos>",
    "</s>",
)
NOT_OF_IDS = frozenset(["version", "truncation", "padding", "decoder"])  # parts of tokenizer.json


@dataclass(frozen=True)
class Encoder:
    """Turns every text into int32 tokens: the beginning token if there is one, the text, the separator."""

    tokenizer: PreTrainedTokenizerFast
    separator: int
    beginning: int | None

    def __call__(self, texts: list[str]) -> list[NDArray[np.int32]]:
        if not texts:
            return []
        before = [] if self.beginning is None else [self.beginning]
        tokens = self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,  # control tokens in the text are plain text
            return_attention_mask=False,
            verbose=False,
        )
        return [np.array([*before, *ids, self.separator], dtype=np.int32) for ids in tokens["input_ids"]]

    def token(self, number: int | None) -> str | None:
        return None if number is None else str(self.tokenizer.convert_ids_to_tokens(number))


def load_encoder(directory: Path, separator: str | None) -> Encoder:
    """The encoder of the tokenizer in `directory`. Raises ModelError if the tokenizer cannot be used.

    separator: the setting. Without it, the token that ends a text is chosen.
    """
    tokenizer = load(directory)
    after, before = _separator(tokenizer, separator), _beginning(tokenizer)
    encoder = Encoder(tokenizer, after, before)
    begins = f", {encoder.token(before)} before it" if before is not None else ""
    logger.info(f"corpus: {encoder.token(after)} after each document{begins}")
    return encoder


def check_context(directory: Path, seq_len: int) -> None:
    """Raises CorpusError if the model of the tokenizer's directory takes no sequences of `seq_len` tokens."""
    config = directory / "config.json"
    values = json.loads(config.read_text()) if config.is_file() else {}
    context = values.get("max_position_embeddings") or (values.get("text_config") or {}).get(
        "max_position_embeddings"
    )
    if context is not None and seq_len > context:
        raise CorpusError(
            f"corpus.seq_len is {seq_len}, the model's context {context} tokens (max_position_embeddings): lower it"
        )


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """16 hex digits of all rules that turn text into ids. Tokenizers that share them give the same ids for every text.

    The rules are the normaliser, the cut into pieces, the model with its merges, the added tokens and those put around
    a text. Truncation and padding are settings of a call, and the decoder only reads ids.
    """
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = {key: value for key, value in rules.items() if key not in NOT_OF_IDS}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def _separator(tokenizer: PreTrainedTokenizerFast, setting: str | None) -> int:
    """The id of the token after each document."""
    vocabulary = tokenizer.get_vocab()
    if setting is not None:
        if setting not in vocabulary:
            raise CorpusError(
                f"corpus.separator is {setting!r}, which is no token of this tokenizer. Its special tokens are "
                f"{', '.join(map(str, tokenizer.all_special_tokens))}"
            )
        return int(vocabulary[setting])
    end = tokenizer.eos_token
    if end is not None and end not in TURN_ENDS:
        return int(vocabulary[end])
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    if ends := [token for token in TEXT_ENDS if token in added]:
        return int(vocabulary[ends[0]])
    if end is None:
        raise ModelError(
            "the tokenizer has no end-of-text token to separate documents with: name one as corpus.separator"
        )
    logger.warning(
        f"corpus: documents are separated by {end}, which ends a chat turn, since the tokenizer has no token that is "
        "known to end a text. If the model was pretrained with another token, set corpus.separator"
    )
    return int(vocabulary[end])


def _beginning(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The token that the tokenizer itself puts before a text, as those of Llama and Gemma do."""
    ids = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    begins = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id] and ids != plain
    return int(tokenizer.bos_token_id) if begins else None
