"""Saving a model directory: it is read back and compared with the model before anybody relies on it.

A directory suits readers of other versions: it has the tokenizer in the form that all of them resolve alike
(`tokenizer.py`), the rotary settings under the names of transformers 4 as well as 5, and the dense model's name and
licence (`origin.py`).
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel

from sparsekd_ray.errors import ModelError
from sparsekd_ray.model import loading, low_rank, origin, spec, tokenizer


def logits_difference(model: PreTrainedModel, other: PreTrainedModel) -> float:
    """Largest difference of logits on eight fixed tokens, relative to the largest logit if above 1."""
    ids_1L = torch.linspace(0, model.config.vocab_size - 1, 8).long()[None]
    with torch.no_grad():
        first, second = (m.eval()(ids_1L.to(m.device)).logits.double().cpu() for m in (model, other))
    return float((first - second).abs().max() / first.abs().max().clamp(min=1))


def save(model: PreTrainedModel, source: Path, out: Path, card: str) -> None:
    """Write a complete model directory and prove it: reloaded weights equal bit by bit, logits to 1e-6.

    source: the directory whose tokenizer, dense model's name and licence are passed on.
    Leaves the model in eval mode. Raises ModelError if there is no tokenizer, if transformers refuses to write the
    model, or if the proof fails.
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(source, out)
    origin.pass_on(source, out)
    try:
        model.save_pretrained(out, max_shard_size="5GB")
    except (ValueError, StrictDataclassError) as error:
        raise ModelError(
            f"transformers refuses to write {out}: {error}. Correct the config.json or generation_config.json of the "
            "dense model"
        ) from error
    _write_older_names(out / "config.json")
    (out / "README.md").write_text(card, encoding="utf-8")
    if spec.is_low_rank(model):
        shutil.copyfile(low_rank.__file__, out / f"{loading.MODELLING_CODE}.py")
    _prove(model, out)


def _prove(model: PreTrainedModel, out: Path) -> None:
    """ModelError unless the directory loads as the same model."""
    reloaded = loading.load(out, dtype=model.dtype)
    expected, state = model.state_dict(), reloaded.state_dict()
    changed = [name for name in expected if not torch.equal(expected[name].cpu(), state[name])]
    allowed = 1e-6 if model.device.type == "cpu" else 0.05  # a GPU sums in another order
    if changed or (difference := logits_difference(model, reloaded)) > allowed:
        fault = f"changed {', '.join(changed)}" if changed else f"logits differ by {difference:.1e}"
        raise ModelError(f"{out} did not reload as it was saved: {fault}")


def _write_older_names(path: Path) -> None:
    """Add to a config.json the names that transformers 4 and the tools of its time read."""
    values = json.loads(path.read_text(encoding="utf-8"))
    values |= older_rope(values)
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def older_rope(values: Mapping[str, object]) -> dict[str, object]:
    """The rotary settings of a config under the names of transformers 4; empty for a config without any.

    Transformers 5 keeps them in `rope_parameters` alone. Transformers 4 does not read this field and falls back to its
    defaults without a warning. A reader of version 5 takes either form.
    """
    parameters = values.get("rope_parameters")
    if not isinstance(parameters, Mapping) or "rope_theta" not in parameters:
        return {}
    rest = dict(parameters)
    older: dict[str, object] = {"rope_theta": rest.pop("rope_theta"), "rope_scaling": None}
    if "partial_rotary_factor" in rest:
        older["partial_rotary_factor"] = rest.pop("partial_rotary_factor")
    rest.pop("type", None)
    kind = rest.pop("rope_type", "default")
    if kind == "default":
        return older
    if "original_max_position_embeddings" in values:  # Phi-3's place; its class refuses a fourth field
        rest.pop("original_max_position_embeddings", None)
    name = "type" if kind == "longrope" else "rope_type"  # Phi-3's name and everybody else's
    return older | {"rope_scaling": {name: kind, **rest}}
