"""Small texts and a tokenizer for the tests of corpora."""

from pathlib import Path

from sparsekd_ray.config import Corpus, Source

END = "<|endoftext|>"
WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "eta",
    "theta",
    "iota",
    "kappa",
    "lambda",
    "mu",
]


def word_tokenizer(folder: Path, *special: str, eos: str = END, **more: object) -> Path:
    """A byte-level BPE tokenizer that knows the words; `special` tokens come after END."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[END, *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos, **more).save_pretrained(folder)
    return folder


def small_corpus(sources: tuple[Source, ...], **settings: object) -> Corpus:
    defaults = {"samples": 50, "valid_samples": 8, "test_samples": 8, "seq_len": 16, "held_out": 0.3}
    return Corpus(sources=sources, **{**defaults, "shard_rows": 8, **settings})
