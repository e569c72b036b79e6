"""Perplexity by both protocols against a loop over windows, on a tiny random model."""

import math

import numpy as np
import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from sparsekd_ray.evaluate.perplexity import evaluate, protocol, window_starts


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return Phi3ForCausalLM(config).eval()


def naive(model, streams, window, stride):
    """exp of the mean over every prediction of every whole window, one window at a time, from full logits."""
    losses = []
    for stream in streams:
        for start in window_starts(len(stream), window, stride):
            ids = torch.from_numpy(stream[start : start + window]).long()[None]
            with torch.no_grad():
                logprobs = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            losses += (-logprobs.gather(1, ids[0, 1:, None])[:, 0]).tolist()
    return math.exp(sum(losses) / len(losses)), len(losses)


def test_both_protocols(model):
    rng = np.random.default_rng(0)
    streams = {"a": rng.integers(0, 61, 417), "b": rng.integers(0, 61, 16), "short": rng.integers(0, 61, 9)}
    found = evaluate(model, streams, window=512)
    assert (found["window"], found["stride"]) == (16, 8) == protocol(512, 16)
    for name, stride in (("sliding", 8), ("disjoint", 16)):
        expected, tokens = naive(model, streams.values(), 16, stride)
        assert found[name]["ppl"] == pytest.approx(expected, rel=1e-5)
        assert found[name]["tokens"] == tokens
        for domain, stream in streams.items():
            expected, _ = naive(model, [stream], 16, stride)
            assert found[name]["domains"][domain]["ppl"] == pytest.approx(expected, rel=1e-5)


def test_windows_are_whole_and_overlap_by_half():
    assert window_starts(20, 8, 4) == [0, 4, 8, 12]
    assert window_starts(8, 8, 4) == [0]
    assert window_starts(5, 8, 4) == [0]
