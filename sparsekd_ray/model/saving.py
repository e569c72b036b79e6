"""Saving a model directory that proves itself: it is read back and compared before anybody relies on it."""

import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel

from sparsekd_ray.errors import ModelError
from sparsekd_ray.model import loading, low_rank, spec


def logits_difference(one: PreTrainedModel, other: PreTrainedModel) -> float:
    """Largest difference of logits on eight fixed tokens, relative to the largest logit if above 1."""
    ids_1L = torch.linspace(0, one.config.vocab_size - 1, 8).long()[None]
    with torch.no_grad():
        first, second = (m.eval()(ids_1L.to(m.device)).logits.double().cpu() for m in (one, other))
    return float((first - second).abs().max() / first.abs().max().clamp(min=1))


def save(model: PreTrainedModel, tokenizer_dir: Path, out: Path, card: str) -> None:
    """Write a complete model directory and prove it: reloaded weights equal bit by bit, logits to 1e-6.

    Leaves the model in eval mode. Raises ModelError if there is no tokenizer or the proof fails.
    """
    out.mkdir(parents=True, exist_ok=True)
    files = [file for name in spec.TOKENIZER_FILES if (file := Path(tokenizer_dir) / name).exists()]
    if not files:
        raise ModelError(
            f"{tokenizer_dir} has no tokenizer: expected one of {', '.join(spec.TOKENIZER_FILES)}"
        )
    for file in files:
        shutil.copyfile(file, out / file.name)
    model.save_pretrained(out, max_shard_size="5GB")
    (out / "README.md").write_text(card)
    if spec.is_low_rank(model):
        shutil.copyfile(low_rank.__file__, out / f"{loading.MODELLING_CODE}.py")
    reloaded = loading.load(out, dtype=model.dtype)
    meant, found = model.state_dict(), reloaded.state_dict()
    changed = [name for name in meant if not torch.equal(meant[name].cpu(), found[name])]
    allowed = 1e-6 if model.device.type == "cpu" else 0.05  # a GPU sums in another order
    if changed or (difference := logits_difference(model, reloaded)) > allowed:
        what = f"changed {', '.join(changed)}" if changed else f"logits differ by {difference:.1e}"
        raise ModelError(f"{out} did not reload as it was saved: {what}")
