"""The export stage: a student as directories that stock tools load, each proved by loading it as users do.

`low-rank/` holds the factors and `modeling_sparsekd.py`, which transformers runs with trust_remote_code=True;
`merged/` holds the same function as a stock dense model, larger but loaded anywhere without code. Both carry
the tokenizer and a model card whose usage snippet runs as printed from inside the directory.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from sparsekd_ray.errors import ModelError
from sparsekd_ray.model import checkpoint

TOLERANCE = 1e-5  # of the largest logit, in float32

USAGE = """## Usage

From inside this directory:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("."{code})
tokenizer = AutoTokenizer.from_pretrained("."{code})
inputs = tokenizer("The", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```
"""


def export(
    source: Path, out: Path, *, card_facts: Mapping[str, Any], say: Callable[[str], None]
) -> dict[str, Any]:
    """Write and prove `out/low-rank/` and `out/merged/` from a sparse model directory.

    card_facts: see `model_card`. Returns parameters and the largest relative difference of logits of each.
    Raises ModelError if the source is not low-rank or a directory does not load as its card says.
    """
    if not checkpoint.is_sparse(source):
        raise ModelError(f"{source} is a stock model already: there is nothing to merge, use it as it is")
    model = checkpoint.load(source, dtype="auto")
    merged = checkpoint.merge(model)
    metrics: dict[str, Any] = {}
    for name, variant in (("low-rank", model), ("merged", merged)):
        facts = {**card_facts, "parameters": checkpoint.count_parameters(variant)}
        checkpoint.save(variant, source, out / name, model_card(facts, low_rank=variant is model))
        metrics[name] = found = _prove(model, variant, out / name)
        say(f"{name}: {found['params']} parameters, logits off by {found['logits_difference']:.0e}")
    return metrics


def _prove(model: PreTrainedModel, variant: PreTrainedModel, path: Path) -> dict[str, Any]:
    """Load a directory as its user does, compare the logits with those of `model`, and generate."""
    loader: Any = AutoModelForCausalLM
    if checkpoint.is_sparse(variant):
        # What AutoModelForCausalLM does with trust_remote_code=True where this package is absent. Here it
        # would prefer the class registered by `checkpoint` and prove nothing about the shipped file.
        loader = get_class_from_dynamic_module(variant.config.auto_map["AutoModelForCausalLM"], str(path))
    loaded = loader.from_pretrained(path, dtype=model.dtype)
    params, expected = checkpoint.count_parameters(loaded), checkpoint.count_parameters(variant)
    difference = checkpoint.logits_difference(model, loaded)
    allowed = TOLERANCE if model.dtype == torch.float32 else 8 * torch.finfo(model.dtype).eps
    prompt = torch.zeros(1, 1, dtype=torch.long)
    new = loaded.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape[1] - 1
    if params != expected or not difference <= allowed or new != 4:
        raise ModelError(
            f"{path} does not load as exported: {params} parameters instead of {expected}, logits differ by "
            f"{difference:.1e} (allowed {allowed:.0e}), {new} tokens generated instead of 4"
        )
    return {"params": params, "logits_difference": difference}


def model_card(facts: Mapping[str, Any], low_rank: bool) -> str:
    """README.md of an exported directory: YAML front matter and Markdown.

    facts: `parameters` and `sparsity` (share of the dense model's MLP parameters that is gone); optional
    `base_model` (name or hub id), `license`, `perplexity` and `dense_perplexity` (as
    `evaluate.perplexity.evaluate` returns them).
    """
    tags = ["sparsekd-ray", "knowledge-distillation", "pruning", "low-rank" if low_rank else "merged"]
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    front |= {key: facts[key] for key in ("base_model", "license") if facts.get(key)}
    origin = f" of {facts['base_model']}" if facts.get("base_model") else ""
    gone = f"{facts['sparsity']:.1%} of the dense model's MLP parameters"
    if low_rank:
        held = f"Its MLP matrices are products of two thin ones, so that {gone} are gone; "
        held += f"`{checkpoint.MODELLING_CODE}.py` beside the weights is the architecture."
    else:
        held = f"The student is low-rank, without {gone}; here its products are multiplied out, which gives "
        held += "the same function as a stock model, of the dense model's size and speed."
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {'Low-rank' if low_rank else 'Merged'} student{origin}",
        f"Pruned by truncated SVD, then trained to recover by self-distillation (SparseKD). {held}",
        f"Parameters: {facts['parameters']:,}, tied embeddings counted once.",
        _perplexity_table(facts.get("perplexity"), facts.get("dense_perplexity")),
        USAGE.format(code=", trust_remote_code=True" if low_rank else ""),
    ]
    return "\n\n".join(part for part in parts if part)


def _perplexity_table(figures: Mapping[str, Any] | None, dense: Mapping[str, Any] | None) -> str:
    """Held-out perplexity by protocol and domain, beside the dense model's; nothing without figures."""
    if not figures:
        return ""
    window, stride = figures["window"], figures["stride"]
    words = {
        "sliding": f"windows of {window} tokens, stride {stride}, every token of every window",
        "disjoint": f"windows of {window} tokens that do not overlap",
    }
    rows = ["| protocol | text | tokens | this model | dense |", "|---|---|--:|--:|--:|"]
    for protocol, meaning in words.items():
        texts = {"all": figures[protocol], **figures[protocol]["domains"]}
        known = {"all": dense[protocol], **dense[protocol]["domains"]} if dense else {}
        for text, found in texts.items():
            reference = f"{known[text]['ppl']:.2f}" if text in known else "–"
            rows.append(f"| {meaning} | {text} | {found['tokens']:,} | {found['ppl']:.2f} | {reference} |")
    return "## Perplexity on held-out text\n\n" + "\n".join(rows)
