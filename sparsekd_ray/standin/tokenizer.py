"""The stand-in's tokenizer: a byte-level BPE learnt from the beginning of its text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from sparsekd_ray.errors import CorpusError

END, PAD = "<|endoftext|>", "<|pad|>"
CHARACTERS = 2_000_000  # twice as many save half a per cent of the tokens


def train(documents: Iterable[str], vocab: int, context: int, out: Path) -> dict[str, Any]:
    """Writes a tokenizer directory: byte-level BPE of at most `vocab` tokens for models of `context` tokens.

    Learns from the first `CHARACTERS` characters, so `documents` should come well mixed. Equal documents give
    equal bytes. Raises CorpusError if there is no text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts = list(_beginning(documents, CHARACTERS))
    if not any(texts):
        raise CorpusError("found no text to learn a tokenizer from: give a corpus source that is not empty")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    special = {"bos_token": END, "eos_token": END, "pad_token": PAD}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=context, **special)
    fast.save_pretrained(out)
    return {"vocab_size": len(fast), "characters": sum(map(len, texts))}


def _beginning(documents: Iterable[str], characters: int) -> Iterator[str]:
    for text in documents:
        yield text[:characters]
        characters -= len(text)
        if characters <= 0:
            return
