"""The export stage: a student as directories that stock tools load, each proved by loading it as users do.

A low-rank student gives two: `low-rank/` with `modeling_sparsekd.py`, which transformers runs with
trust_remote_code=True, and `merged/`, the same function as a stock dense model, larger but loaded anywhere without
code. A student of stock architecture (narrower, shallower or masked) is one already: `stock/`. Each carries the
tokenizer and a model card whose usage snippet runs as printed from inside the directory.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from sparsekd_ray.errors import ModelError
from sparsekd_ray.model import loading, saving, spec
from sparsekd_ray.prune.methods import METHODS, named

logger = logging.getLogger(__name__)

TOLERANCE = 1e-5  # of the largest logit, in float32

Form = Literal["low-rank", "merged", "stock"]
NOT_MERGED = "its MLP matrices have biases, which stock Phi-3 and Qwen3 cannot hold"
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


def export(source: Path, out: Path, *, card_facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write and prove `out/low-rank/` and `out/merged/`, or `out/stock/`, from a student's directory.

    card_facts: see `model_card`. Returns parameters and the largest relative difference of logits of each; of a
    low-rank student with biases, which no stock model can hold, the reason in place of `merged`'s figures.
    Raises ModelError if a directory does not load as its card says.
    """
    model = loading.load(source, dtype="auto")
    low_rank, biased = spec.is_low_rank(model), spec.mlp_storage(model)[1]
    variants: dict[Form, PreTrainedModel] = {"low-rank" if low_rank else "stock": model}
    metrics: dict[str, Any] = {}
    if biased:
        metrics["merged"] = {"absent": NOT_MERGED}
        logger.info(f"merged: none, because {NOT_MERGED}")
    elif low_rank:
        variants["merged"] = loading.merge(model)
    for form, variant in variants.items():
        facts = {**card_facts, "parameters": loading.count_parameters(variant), "biased": biased}
        saving.save(variant, source, out / form, model_card(facts, form))
        metrics[form] = found = _prove(model, variant, out / form)
        logger.info(f"{form}: {found['params']} parameters, logits off by {found['logits_difference']:.0e}")
    return metrics


def _prove(model: PreTrainedModel, variant: PreTrainedModel, path: Path) -> dict[str, Any]:
    """Load a directory as its user does, compare the logits with those of `model`, and generate."""
    loader: Any = AutoModelForCausalLM
    if spec.is_low_rank(variant):
        # What AutoModelForCausalLM does with trust_remote_code=True where this package is absent. Here it
        # would prefer the class registered by `checkpoint` and prove nothing about the shipped file.
        loader = get_class_from_dynamic_module(variant.config.auto_map["AutoModelForCausalLM"], str(path))
    loaded = loader.from_pretrained(path, dtype=model.dtype)
    params, expected = loading.count_parameters(loaded), loading.count_parameters(variant)
    difference = saving.logits_difference(model, loaded)
    allowed = TOLERANCE if model.dtype == torch.float32 else 8 * torch.finfo(model.dtype).eps
    prompt = torch.zeros(1, 1, dtype=torch.long)
    new = loaded.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape[1] - 1
    if params != expected or not difference <= allowed or new != 4:
        raise ModelError(
            f"{path} does not load as exported: {params} parameters instead of {expected}, logits differ by "
            f"{difference:.1e} (allowed {allowed:.0e}), {new} tokens generated instead of 4"
        )
    return {"params": params, "logits_difference": difference}


def model_card(facts: Mapping[str, Any], form: Form) -> str:
    """README.md of an exported directory: YAML front matter and Markdown.

    facts: `parameters` and `sparsity` (share of the dense model's MLP parameters that is gone, or zero); optional
    `method` (of pruning, a key of `prune.methods.METHODS`), `distilled` (False for a student as it was cut), `biased`
    (low-rank matrices with biases), `base_model` (name or hub id), `license`, `perplexity` and `dense_perplexity` (as
    `evaluate.perplexity.evaluate` returns them).
    Raises ModelError for a method that is not known.
    """
    method = facts.get("method")
    if method is not None and method not in METHODS:
        raise ModelError(f"card facts name the method {method!r}; known are {', '.join(METHODS)}")
    tags = ["sparsekd-ray", "knowledge-distillation", "pruning", *([method] if method else []), form]
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    front |= {key: facts[key] for key in ("base_model", "license") if facts.get(key)}
    origin = f" of {facts['base_model']}" if facts.get("base_model") else ""
    made = METHODS[method].card if method else "Pruned by sparsekd-ray"
    title = METHODS[method].form if method and form == "stock" else form
    then = ", then trained to recover by self-distillation (SparseKD)" if facts.get("distilled", True) else ""
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {title.capitalize()} student{origin}",
        f"{made}{then}. {_what_it_holds(facts, form)}",
        f"Parameters: {facts['parameters']:,}, tied embeddings counted once.",
        _perplexity_table(facts.get("perplexity"), facts.get("dense_perplexity")),
        USAGE.format(code=", trust_remote_code=True" if form == "low-rank" else ""),
    ]
    return "\n\n".join(part for part in parts if part)


def _what_it_holds(facts: Mapping[str, Any], form: Form) -> str:
    """How the sparsity shows in this directory, and what it is good for."""
    share = f"{facts['sparsity']:.1%} of the dense model's MLP parameters"
    if form == "low-rank":
        held = f"Its MLP matrices are products of two thin ones, so that {share} are gone; "
        held += f"`{loading.MODELLING_CODE}.py` beside the weights is the architecture."
        return f"{held} There is no merged form, because {NOT_MERGED}." if facts.get("biased") else held
    if form == "merged":
        held = f"The student is low-rank, without {share}; here its products are multiplied out, which gives "
        return held + "the same function as a stock model, of the dense model's size and speed."
    if facts.get("method") in named("masked"):
        return f"{share} are zeros, in a stock model of the dense model's size: no stock runtime is faster for it."
    return (
        f"{share} are gone; what is left is a smaller model of the stock architecture, which needs no code."
    )


def _perplexity_table(figures: Mapping[str, Any] | None, dense: Mapping[str, Any] | None) -> str:
    """Held-out perplexity by protocol and domain, beside the dense model's; nothing without figures."""
    if not figures:
        return ""
    rows = ["| protocol | text | tokens | this model | dense |", "|---|---|--:|--:|--:|"]
    names = [name for name in ("paper", "gptq", "words") if name in figures]
    for protocol in names:
        texts = {"all": figures[protocol], **figures[protocol]["domains"]}
        known = {"all": dense[protocol], **dense[protocol]["domains"]} if dense and protocol in dense else {}
        for text, found in texts.items():
            reference = f"{known[text]['ppl']:.2f}" if text in known else "–"
            rows.append(f"| `{protocol}` | {text} | {found['tokens']:,} | {found['ppl']:.2f} | {reference} |")
    meanings = [f"- `{name}`: {figures[name]['sentence']}." for name in names]
    return "\n\n".join(["## Perplexity on held-out text", "\n".join(rows), "\n".join(meanings)])
