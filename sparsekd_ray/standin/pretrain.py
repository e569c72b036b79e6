"""The stand-in: a small Phi-3 or Qwen3 trained here, so that a cascade runs without a model hub.

It has the real architecture (grouped query heads, rotary positions, tied embedding; Phi-3 with fused qkv_proj and
gate_up_proj, Qwen3 with separate matrices and norms of queries and keys), its own byte-level BPE tokenizer
(`tokenizer.py`), and a minute or two of training: Muon for the matrices inside the blocks, AdamW for embedding and
norms. It is partly trained, and its card says so. Its MLP matrices need only hold enough for a cut to be felt.

Weights and optimiser states go into a checkpoint every so many steps. The order of the sequences is a pure
function of the seed, so a run that was killed ends, bit for bit, where an uninterrupted one does (with as
many threads, on the same kind of processor).

Shapes: R sequences in all, B in a batch, of L tokens each.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sparsekd_ray import corpus
from sparsekd_ray.config import Standin
from sparsekd_ray.distill.schedule import learning_rate
from sparsekd_ray.errors import CorpusError, IntegrityError, ModelError
from sparsekd_ray.evaluate.perplexity import perplexity, token_nll, window_nll, windows
from sparsekd_ray.model import loading, saving, spec
from sparsekd_ray.model.families import FAMILIES
from sparsekd_ray.runtime.logging import log_progress
from sparsekd_ray.runtime.metrics import TRAINING, log, log_interval, memory_gb
from sparsekd_ray.standin.muon import Muon

logger = logging.getLogger(__name__)

WARMUP = 0.05  # share of the steps
RECENT = 40  # steps behind the reported training loss

StandinConfig = Phi3Config | Qwen3Config
StandinModel = Phi3ForCausalLM | Qwen3ForCausalLM


class Checkpoints(Protocol):
    """Keeps the checkpoints of a run. What it gives back is what it was given."""

    def save(self, step: int, folder: Path) -> None:
        """Keeps a complete folder of plain files. Older folders are no longer needed."""

    def latest(self) -> Path | None:
        """The newest kept folder, or None."""


def pretrain(
    settings: Standin,
    tokens_dir: Path,
    out: Path,
    *,
    seed: int,
    checkpoints: Checkpoints,
    every: int = 80,
) -> dict[str, Any]:
    """Trains a stand-in on the corpus in `tokens_dir` and writes it into `out` as a Hugging Face directory.

    Goes on from `checkpoints.latest()`, and hands over a new checkpoint after each `every` steps, made under
    `out`/checkpoints. Returns the metrics; all but the two times are the same, bit for bit, however
    often it was killed. Raises CorpusError if there is less than one batch of text, ModelError if the sizes
    do not fit together or training diverges, IntegrityError for a checkpoint that is not one of this run.
    """
    rows_RL, valid_RL = _rows(tokens_dir, "train"), _rows(tokens_dir, "valid")
    if len(rows_RL) < settings.batch:
        raise CorpusError(
            f"{tokens_dir} holds {len(rows_RL)} training sequences, fewer than one batch (model.standin."
            f"batch is {settings.batch}): give more text, or lower the batch"
        )
    run = _Run.start(_config(settings, tokens_dir, rows_RL.shape[1]), settings, seed)
    if folder := checkpoints.latest():
        run.restore(folder)
        logger.info(f"stand-in: resumes after step {run.step} of {settings.steps}")
    while run.step < settings.steps:
        started = time.monotonic()
        share = learning_rate(run.step, settings.steps, 1.0, WARMUP, floor=0.0)
        run.learn(_batch(rows_RL, run.step, settings.batch, seed), share)
        run.seconds += time.monotonic() - started
        log_progress(logger, _progress_line(run, rows_RL.shape[1], settings))
        if run.step % log_interval(settings.steps) == 0 and run.step < settings.steps:
            _log_row(run, rows_RL.shape[1], settings, share)
        if run.step % every == 0 and run.step < settings.steps:
            checkpoints.save(run.step, run.save(out / "checkpoints"))
    metrics = _metrics(run, rows_RL, valid_RL, settings)
    _log_row(run, rows_RL.shape[1], settings, share, valid_ppl=metrics["valid_ppl"])
    saving.save(run.model, tokens_dir / "tokenizer", out, _card(metrics, settings))
    return metrics


def batch_rows(step: int, batch: int, rows: int, seed: int) -> list[int]:
    """The rows of one step. Every pass over the corpus takes each row once, in an order of its own."""
    places = (divmod(place, rows) for place in range(step * batch, (step + 1) * batch))
    return [int(_order(rows, seed, number)[place]) for number, place in places]


@lru_cache(maxsize=2)
def _order(rows: int, seed: int, number: int) -> np.ndarray:
    return np.random.default_rng([seed, number]).permutation(rows)


def _batch(rows_RL: np.ndarray, step: int, batch: int, seed: int) -> Tensor:
    return torch.from_numpy(rows_RL[batch_rows(step, batch, len(rows_RL), seed)].astype(np.int64))


def _rows(tokens_dir: Path, split: str) -> np.ndarray:
    """int32 [R, L]"""
    table = corpus.read_rows(tokens_dir, split)
    rows_RL: np.ndarray = table["input_ids"].combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1)
    return rows_RL


def _config(settings: Standin, tokens_dir: Path, context: int) -> StandinConfig:
    """The configuration. Its vocabulary is the tokenizer's, its context the length of the sequences."""
    tokenizer = AutoTokenizer.from_pretrained(tokens_dir / "tokenizer")
    values: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": settings.hidden,
        "intermediate_size": settings.intermediate,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.kv_heads,
        "max_position_embeddings": context,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if settings.family == "qwen3":  # its heads are 128 wide by default
        return Qwen3Config(head_dim=settings.hidden // settings.heads, **values)
    return Phi3Config(original_max_position_embeddings=context, **values)


@dataclass
class _Run:
    """Everything that changes during training. A checkpoint holds all of it."""

    model: StandinModel
    optimisers: dict[str, torch.optim.Optimizer]
    losses: list[float]
    seconds: float

    @classmethod
    def start(cls, config: StandinConfig, settings: Standin, seed: int) -> _Run:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Qwen3ForCausalLM(config) if isinstance(config, Qwen3Config) else Phi3ForCausalLM(config)
        for layer in model.model.layers:  # each block begins as the identity: learns faster
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
            torch.nn.init.zeros_(layer.mlp.down_proj.weight)
        others = [p for name, p in model.named_parameters() if ".layers." not in name or p.ndim != 2]
        muon = Muon(_matrices(model, settings), lr=settings.lr)
        adamw = torch.optim.AdamW(others, lr=settings.lr_adam, betas=(0.9, 0.95), weight_decay=0.0)
        for group in muon.param_groups + adamw.param_groups:
            group["peak"] = group["lr"]
        return cls(model, {"muon": muon, "adamw": adamw}, [], 0.0)

    @property
    def step(self) -> int:
        return len(self.losses)

    def learn(self, ids_BL: Tensor, share: float) -> None:
        """One step at this share of the peak learning rates."""
        loss = token_nll(self.model, ids_BL).mean()
        loss.backward()
        for optimiser in self.optimisers.values():
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * share
            optimiser.step()
            optimiser.zero_grad()
        self.losses.append(loss.item())
        if not math.isfinite(self.losses[-1]):
            raise ModelError(
                f"the stand-in's loss is {self.losses[-1]} in step {self.step}: lower model.standin.lr and "
                "model.standin.lr_adam"
            )

    def save(self, folder: Path) -> Path:
        """Writes `folder`/step-000080. Until it is complete it has another name."""
        done, unfinished = folder / f"step-{self.step:06d}", folder / "unfinished"
        for left_over in (done, unfinished):
            shutil.rmtree(left_over, ignore_errors=True)
        unfinished.mkdir(parents=True)
        save_file(dict(self.model.named_parameters()), unfinished / "model.safetensors")
        for name, optimiser in self.optimisers.items():
            states = optimiser.state_dict()["state"].items()
            tensors = {f"{number}.{key}": tensor for number, state in states for key, tensor in state.items()}
            save_file(tensors, unfinished / f"{name}.safetensors")
        progress = {"losses": self.losses, "seconds": self.seconds}
        (unfinished / "progress.json").write_text(json.dumps(progress))
        return unfinished.rename(done)

    def restore(self, folder: Path) -> None:
        """Loads the state that `save` wrote. Raises IntegrityError if `folder` does not hold it."""
        try:
            weights = load_file(folder / "model.safetensors")
            self.model.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
            for name, optimiser in self.optimisers.items():
                states: dict[int, dict[str, Tensor]] = {}
                for path, tensor in load_file(folder / f"{name}.safetensors").items():
                    number, key = path.split(".")
                    states.setdefault(int(number), {})[key] = tensor.clone()  # out of the mapped file
                optimiser.load_state_dict({**optimiser.state_dict(), "state": states})
            progress = json.loads((folder / "progress.json").read_text())
            self.losses, self.seconds = progress["losses"], progress["seconds"]
        except (OSError, SafetensorError, RuntimeError, ValueError, KeyError) as error:
            raise IntegrityError(
                f"{folder} is no checkpoint of this stand-in: {error}. Delete it to go on from an older one"
            ) from error


def _matrices(model: StandinModel, settings: Standin) -> list[dict[str, Any]]:
    """The matrices inside the blocks, kind by kind, with the row blocks of the fused ones."""
    key = settings.hidden // settings.heads * settings.kv_heads
    fused: dict[str, list[int] | None] = {
        "self_attn.qkv_proj": [settings.hidden, key, key],
        "mlp.gate_up_proj": [settings.intermediate, settings.intermediate],
    }
    separate = [f"self_attn.{name}_proj" for name in "qkv"] + ["mlp.gate_proj", "mlp.up_proj"]
    first = fused if settings.family == "phi3" else dict.fromkeys(separate)
    kinds = {**first, "self_attn.o_proj": None, "mlp.down_proj": None}
    layers = model.model.layers
    return [
        {"params": [layer.get_submodule(kind).weight for layer in layers], "parts": parts}
        for kind, parts in kinds.items()
    ]


def _progress_line(run: _Run, length: int, settings: Standin) -> str:
    speed = run.step * settings.batch * length / run.seconds
    left = run.seconds / run.step * (settings.steps - run.step)
    return (
        f"stand-in: step {run.step}/{settings.steps}  loss {run.losses[-1]:.2f}  {speed:,.0f} tokens/s  "
        f"{left:.0f} s left"
    )


def _log_row(run: _Run, length: int, settings: Standin, share: float, **validation: float) -> None:
    """One row of live figures, by the names of `distill.figures`. `share` is that of the peak learning rates."""
    tokens = run.step * settings.batch * length
    log(
        "dense",
        TRAINING,
        step=run.step,
        steps=settings.steps,
        tokens=tokens,
        ce=run.losses[-1],
        lr=settings.lr * share,
        lr_adam=settings.lr_adam * share,
        tokens_per_s=tokens / run.seconds,
        memory_gb=memory_gb(torch.device("cpu")),
        **validation,
    )


def _metrics(run: _Run, rows_RL: np.ndarray, valid_RL: np.ndarray, settings: Standin) -> dict[str, Any]:
    length = rows_RL.shape[1]
    valid_windows = windows(valid_RL.reshape(-1), length, length)
    run.model.eval()  # type: ignore[no-untyped-call]
    tokens, recent = settings.steps * settings.batch * length, run.losses[-RECENT:]
    return {
        "params": loading.count_parameters(run.model),
        "mlp_params": spec.mlp_parameters(run.model),
        "tokens": tokens,
        "passes": settings.steps * settings.batch / len(rows_RL),
        "train_loss": math.fsum(recent) / len(recent),
        "valid_ppl": perplexity(
            window_nll(run.model, valid_windows), sum(window.scored for window in valid_windows)
        ),
        "train_seconds": run.seconds,
        "tokens_per_second": tokens / run.seconds,
    }


def _card(metrics: dict[str, Any], settings: Standin) -> str:
    name = FAMILIES[settings.family].name
    return f"""---
library_name: transformers
tags: [sparsekd-ray, stand-in]
---
# A small, partly trained stand-in

This is no model to use. It is {name}'s architecture in small ({metrics["params"]:,} parameters, of which
{metrics["mlp_params"]:,} in MLP matrices), trained by sparsekd-ray so that a cascade of pruning and
distillation can be run and watched without a model hub.

- Training: {metrics["tokens"]:,} tokens in {settings.steps} steps of {settings.batch} sequences; Muon (peak
  learning rate {settings.lr}) for the matrices inside the blocks, AdamW ({settings.lr_adam}) for the rest.
- Perplexity on held-out text of the same sources: {metrics["valid_ppl"]:.2f}, on windows as long as its
  context that do not overlap. It would still improve much with more training.
"""
