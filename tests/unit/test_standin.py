"""The stand-in: its optimiser against the definitions, its tokenizer, and training that may be killed."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsekd_ray import errors
from sparsekd_ray.config import Model, Standin
from sparsekd_ray.corpus import read_rows
from sparsekd_ray.corpus.shards import domain_table, write_shards
from sparsekd_ray.model import hub, spec
from sparsekd_ray.runtime import metrics
from sparsekd_ray.standin import pretrain
from sparsekd_ray.standin import tokenizer as bpe
from sparsekd_ray.standin.muon import QUINTIC, STEPS, Muon, orthogonalise
from sparsekd_ray.store import Store

SMALL = Standin(
    hidden=32,
    intermediate=48,
    layers=2,
    heads=2,
    kv_heads=1,
    vocab=320,
    steps=12,
    batch=4,
    lr=0.02,
    lr_adam=0.01,
)
QWEN = SMALL.model_copy(update={"family": "qwen3"})
LENGTH = 24
TIMES = ("train_seconds", "tokens_per_second")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


WORDS = (
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "small",
    "models",
    "count",
)


def sentences(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=12)) + ".\n" for _ in range(count)]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus artifact of one domain, with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("texts")
    bpe.train(sentences(200), SMALL.vocab, LENGTH, folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    for split, seed, rows in (("train", 1, 40), ("valid", 2, 8)):
        ids = np.array(tokenizer("".join(sentences(200, seed)))["input_ids"], dtype=np.int32)
        rows_RL = ids[: rows * LENGTH].reshape(rows, LENGTH)
        write_shards(domain_table("prose", split, rows_RL), folder / split, shard_rows=16)
    return folder


class Folder:
    """Checkpoints in a plain directory; can be told to be killed, before or after it has taken one over."""

    def __init__(self, kept: Path, die_before: int = -1, die_after: int = -1) -> None:
        self.kept, self.die_before, self.die_after = kept, die_before, die_after
        self.kept.mkdir(exist_ok=True)

    def save(self, step: int, folder: Path) -> None:
        if step == self.die_before:
            raise KeyboardInterrupt
        shutil.copytree(folder, self.kept / folder.name)
        if step == self.die_after:
            raise KeyboardInterrupt

    def latest(self) -> Path | None:
        return max(self.kept.iterdir(), default=None)


def train(
    texts: Path, out: Path, checkpoints: Folder, settings: Standin = SMALL, seed: int = 7
) -> dict[str, float]:
    metrics = pretrain.pretrain(settings, texts, out, seed=seed, checkpoints=checkpoints, every=4)
    return {name: value for name, value in metrics.items() if name not in TIMES}


@pytest.fixture(scope="module")
def trained(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    out = tmp_path_factory.mktemp("trained")
    return out, train(texts, out, Folder(out / "kept"))


@pytest.fixture(scope="module")
def trained_qwen(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    out = tmp_path_factory.mktemp("trained-qwen")
    return out, train(texts, out, Folder(out / "kept"), QWEN)


# Muon


@pytest.mark.parametrize("shape", [(1, 128, 128), (3, 5, 7), (2, 70, 33), (4, 16, 64), (2, 1, 9), (1, 6, 1)])
def test_orthogonalise_keeps_singular_vectors_and_maps_singular_values(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 40
    left, values, right = torch.linalg.svd(matrices.double(), full_matrices=False)
    inside = (
        left.mT @ orthogonalise(matrices).double() @ right.mT
    )  # diagonal, if the singular vectors are kept
    expected = values / values.norm(dim=-1, keepdim=True)
    large = expected > 0.003
    for _ in range(STEPS):
        a, b, c = QUINTIC
        expected = a * expected + b * expected**3 + c * expected**5
    torch.testing.assert_close(inside, torch.diag_embed(expected), rtol=0, atol=2e-3)
    assert ((expected[large] > 0.68) & (expected[large] < 1.21)).all()


def test_orthogonalise_of_zero_is_zero() -> None:
    assert torch.equal(orthogonalise(torch.zeros(2, 4, 6)), torch.zeros(2, 4, 6))


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """The iteration as it is published, one matrix at a time."""
    x = matrix / matrix.norm()
    for _ in range(STEPS):
        a, b, c = QUINTIC
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("parts", [None, [3, 9]])
def test_stacked_update_equals_a_loop_over_matrices(parts: list[int] | None) -> None:
    rng = torch.Generator().manual_seed(3)
    shapes = [(12, 8), (8, 12), (12, 8), (8, 8), (12, 8)]
    matrices = [torch.randn(shape, generator=rng).requires_grad_() for shape in shapes]
    naive = [matrix.detach().clone() for matrix in matrices]
    averages = [torch.zeros(shape) for shape in shapes]
    fused = [matrix for matrix in matrices if matrix.shape == (12, 8)]
    others = [matrix for matrix in matrices if matrix.shape != (12, 8)]
    muon = Muon([{"params": fused, "parts": parts}, {"params": others}], lr=0.1, momentum=0.9)
    for _ in range(3):
        for i, matrix in enumerate(matrices):
            matrix.grad = torch.randn(matrix.shape, generator=rng)
            averages[i] = 0.9 * averages[i] + 0.1 * matrix.grad
            ahead = 0.9 * averages[i] + 0.1 * matrix.grad
            first = 0
            for rows in parts if parts and shapes[i] == (12, 8) else [shapes[i][0]]:
                block = slice(first, first + rows)
                naive[i][block] -= 0.1 * max(1, rows / shapes[i][1]) ** 0.5 * newton_schulz(ahead[block])
                first += rows
        muon.step()
    for matrix, expected in zip(matrices, naive, strict=True):
        torch.testing.assert_close(matrix.detach(), expected, rtol=0, atol=2e-5)


# Schedule and order


def test_each_pass_takes_every_row_once_in_an_order_of_its_own() -> None:
    rows = [row for step in range(10) for row in pretrain.batch_rows(step, 4, 20, seed=5)]
    assert sorted(rows[:20]) == sorted(rows[20:]) == list(range(20))
    assert rows[:20] != rows[20:]
    assert rows != [row for step in range(10) for row in pretrain.batch_rows(step, 4, 20, seed=6)]


# Tokenizer


def test_tokenizer_gives_text_back(texts: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(texts / "tokenizer")
    text = "def f(x):\n\treturn  x ** 2   # naïve – 数 🙂\r\n\n  12 345 "
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(" the quick brown")["input_ids"]) == 3  # learnt whole words
    assert 258 < len(tokenizer) < SMALL.vocab  # so few words hold fewer merges than were asked for
    assert tokenizer.model_max_length == LENGTH
    assert tokenizer.convert_ids_to_tokens([tokenizer.eos_token_id, tokenizer.pad_token_id]) == [
        bpe.END,
        bpe.PAD,
    ]


def test_tokenizer_is_the_same_in_another_process(texts: Path, tmp_path: Path) -> None:
    script = (
        "import json, pathlib, sys; from sparsekd_ray.standin import tokenizer; "
        "tokenizer.train(json.load(sys.stdin), *map(int, sys.argv[1:3]), pathlib.Path(sys.argv[3]))"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(SMALL.vocab), str(LENGTH), str(tmp_path)],
        input=json.dumps(sentences(200)).encode(),
        env=os.environ
        | {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "17"},
        check=True,
    )
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(path.name for path in (texts / "tokenizer").iterdir())
    for name in names:
        assert (tmp_path / name).read_bytes() == (texts / "tokenizer" / name).read_bytes(), name


def test_tokenizer_reads_a_bounded_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe, "CHARACTERS", 10_000)
    figures = bpe.train(itertools.cycle(sentences(7)), 300, LENGTH, tmp_path)
    assert figures == {"vocab_size": 300, "characters": 10_000}


@pytest.mark.parametrize("documents", [[], ["", ""]])
def test_tokenizer_needs_text(documents: list[str], tmp_path: Path) -> None:
    with pytest.raises(errors.CorpusError, match="no text"):
        bpe.train(documents, 300, LENGTH, tmp_path)


# Training


@pytest.mark.parametrize("family", ["phi3", "qwen3"])
def test_training_learns(texts: Path, tmp_path: Path, family: str) -> None:
    settings = SMALL.model_copy(update={"steps": 60, "family": family})
    metrics = pretrain.pretrain(
        settings, texts, tmp_path, seed=0, checkpoints=Folder(tmp_path / "kept"), every=50
    )
    progress = json.loads((tmp_path / "kept" / "step-000050" / "progress.json").read_text())
    assert abs(progress["losses"][0] - np.log(310)) < 0.3  # knows nothing yet: all tokens alike
    assert metrics["train_loss"] < 3.5
    assert (
        metrics["valid_ppl"] < 25
    )  # random words: which there are, and their spelling, is all there is to learn
    assert metrics["tokens"] == 60 * 4 * LENGTH and metrics["passes"] == 6


def test_directory_loads_with_stock_classes(texts: Path, trained: tuple[Path, dict[str, float]]) -> None:
    out, metrics = trained
    model: Any = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert type(model).__name__ == "Phi3ForCausalLM" and model.config.tie_word_embeddings
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.max_position_embeddings == tokenizer.model_max_length == LENGTH
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    assert sum(p.numel() for p in model.parameters()) == metrics["params"]
    assert sum(p.numel() for name, p in model.named_parameters() if ".mlp." in name) == metrics["mlp_params"]
    assert "partly trained" in (out / "README.md").read_text()
    prompt = tokenizer("the quick", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] > prompt["input_ids"].shape[1]
    rows = torch.tensor(np.stack(read_rows(texts, "valid")["input_ids"].to_numpy()))
    with torch.no_grad():
        loss = model(input_ids=rows.long(), labels=rows.long()).loss.item()
    assert np.exp(loss) == pytest.approx(metrics["valid_ppl"], rel=1e-5)


def test_a_qwen3_stand_in_is_a_stock_qwen3(texts: Path, trained_qwen: tuple[Path, dict[str, float]]) -> None:
    out, metrics = trained_qwen
    model: Any = AutoModelForCausalLM.from_pretrained(out)
    assert type(model).__name__ == "Qwen3ForCausalLM" and model.config.tie_word_embeddings
    assert model.config.head_dim == 16 and model.config.num_key_value_heads == 1
    assert sum(p.numel() for p in model.parameters()) == metrics["params"]
    assert sum(p.numel() for name, p in model.named_parameters() if ".mlp." in name) == metrics["mlp_params"]
    stated = hub.mlp_shapes(Model(standin=QWEN))
    assert stated == spec.shapes_from_config(out) and len(stated) == 2 * 3
    assert "Qwen3's architecture" in (out / "README.md").read_text()


def test_every_matrix_of_a_block_goes_to_muon_and_every_vector_to_adamw(texts: Path) -> None:
    for settings in (SMALL, QWEN):
        run = pretrain._Run.start(pretrain._config(settings, texts, LENGTH), settings, seed=0)
        names = {id(parameter): name for name, parameter in run.model.named_parameters()}
        held = {
            kind: [names[id(p)] for group in optimiser.param_groups for p in group["params"]]
            for kind, optimiser in run.optimisers.items()
        }
        assert sorted(held["muon"] + held["adamw"]) == sorted(names.values())
        assert all(".layers." in name and name.endswith("_proj.weight") for name in held["muon"])
        assert all("norm" in name or "embed" in name for name in held["adamw"])
        assert any("q_norm" in name for name in held["adamw"]) == (settings.family == "qwen3")


def test_a_killed_qwen3_ends_bit_for_bit_as_an_uninterrupted_one(
    texts: Path, trained_qwen: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(texts, tmp_path, Folder(tmp_path / "kept", die_after=4), QWEN)
    assert train(texts, tmp_path, Folder(tmp_path / "kept"), QWEN) == trained_qwen[1]
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / name).read_bytes() == (trained_qwen[0] / name).read_bytes(), name


@pytest.mark.parametrize("kills", [{"die_after": 4}, {"die_after": 8}, {"die_before": 4}, {"die_before": 8}])
def test_killed_and_resumed_run_ends_bit_for_bit_as_an_uninterrupted_one(
    texts: Path, trained: tuple[Path, dict[str, float]], tmp_path: Path, kills: dict[str, int]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(texts, tmp_path, Folder(tmp_path / "kept", **kills))
    torch.manual_seed(99)  # nothing may hang on the state of the process
    metrics = train(texts, tmp_path, Folder(tmp_path / "kept"))
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["step-000004", "step-000008"]
    assert metrics == trained[1]
    for name in ("model.safetensors", "config.json", "README.md", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (trained[0] / name).read_bytes(), name


def test_seed_decides(texts: Path, trained: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    assert train(texts, tmp_path, Folder(tmp_path / "kept"), seed=8)["valid_ppl"] != trained[1]["valid_ppl"]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "muon.safetensors", "adamw.safetensors", "progress.json"]
)
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_checkpoint_is_refused(
    texts: Path, trained: tuple[Path, dict[str, float]], tmp_path: Path, name: str, damage: str
) -> None:
    shutil.copytree(trained[0] / "kept", tmp_path / "kept")
    file = tmp_path / "kept" / "step-000008" / name
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-9])
    else:
        file.unlink()
    with pytest.raises(errors.IntegrityError, match="step-000008"):
        train(texts, tmp_path, Folder(tmp_path / "kept"))


@pytest.mark.parametrize("change", [{"intermediate": 40}, {"family": "qwen3"}])
def test_checkpoint_of_another_size_or_family_is_refused(
    texts: Path, trained: tuple[Path, dict[str, float]], tmp_path: Path, change: dict[str, Any]
) -> None:
    shutil.copytree(trained[0] / "kept", tmp_path / "kept")
    with pytest.raises(errors.IntegrityError, match="step-000008"):
        train(texts, tmp_path, Folder(tmp_path / "kept"), SMALL.model_copy(update=change))


def test_less_than_one_batch_is_refused(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.CorpusError, match=r"holds 40 training sequences.*batch is 41"):
        train(texts, tmp_path, Folder(tmp_path / "kept"), SMALL.model_copy(update={"batch": 41}))


@pytest.mark.parametrize("change", [{"heads": 3}, {"hidden": 34}, {"heads": 4, "kv_heads": 3}])
def test_sizes_that_do_not_fit_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="multiple of"):
        Standin.model_validate(SMALL.model_dump() | change)


def test_live_figures_have_the_names_of_a_distillations(texts: Path, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    with metrics.recording(store, "metrics.jsonl"):
        measured = train(texts, tmp_path, Folder(tmp_path / "kept"))
    rows = [json.loads(line) for line in (store.read_text("metrics.jsonl") or "").splitlines()]
    assert [row["step"] for row in rows] == list(range(1, SMALL.steps + 1))
    names = {
        "stage",
        "kind",
        "time",
        "step",
        "steps",
        "tokens",
        "ce",
        "lr",
        "lr_adam",
        "tokens_per_s",
        "memory_gb",
    }
    assert all(row.keys() - {"valid_ppl"} == names for row in rows)
    assert max(row["lr"] for row in rows) == pytest.approx(SMALL.lr)
    assert rows[-1]["valid_ppl"] == measured["valid_ppl"] and "valid_ppl" not in rows[0]


def test_divergence_is_an_error(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.ModelError, match=r"loss is (nan|inf) in step \d+"):
        train(texts, tmp_path, Folder(tmp_path / "kept"), SMALL.model_copy(update={"lr_adam": 1e30}))
