"""The export stage: a student as directories that stock tools load, each proved by loading it as users do.

A low-rank student gives two directories: `low-rank/` with `modeling_sparsekd.py`, which transformers runs with
trust_remote_code=True, and `merged/`, the same function as a stock dense model, larger but loaded anywhere without
code. A student of stock architecture (narrower, shallower or masked) gives one, `stock/`. Each holds the
tokenizer and a model card whose usage snippet runs as printed from inside the directory.
"""

import importlib.util
import logging
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparsekd_ray.errors import ModelError
from sparsekd_ray.model import loading, origin, saving, spec
from sparsekd_ray.model.card import NOT_MERGED, CardFacts, Form, model_card

logger = logging.getLogger(__name__)

TOLERANCES: dict[Form, float] = {"low-rank": 1e-5, "stock": 1e-5, "merged": 1e-3}
"""Allowed difference in float32, relative to the largest logit. A merged student adds the same products in another
order: in SmolLM2's 30 layers the rounding grows to 4e-5."""

Exported = dict[str, dict[str, int | float | str]]
"""By form: `params` and `logits_difference`, relative to the largest logit; `absent`, the reason, for `merged` of a
student with biases, which no stock model can hold."""


def export(source: Path, out: Path, *, card_facts: CardFacts) -> Exported:
    """Write and prove `out/low-rank/` and `out/merged/`, or `out/stock/`, from a student's directory.

    Raises ModelError if `out` cannot be written, if the dense model's licence forbids students, or if a directory does
    not load as its card says.
    """
    _check_writable(out)
    stated = origin.read(source)
    origin.check_license(source, stated)
    model = loading.load(source, dtype="auto")
    low_rank, biased = spec.is_low_rank(model), spec.mlp_storage(model).bias
    variants: dict[Form, PreTrainedModel] = {"low-rank" if low_rank else "stock": model}
    figures: Exported = {}
    if biased:
        figures["merged"] = {"absent": NOT_MERGED}
        logger.info(f"merged: none, because {NOT_MERGED}")
    elif low_rank:
        variants["merged"] = loading.merge(model)
    for form, variant in variants.items():
        facts: CardFacts = {
            **card_facts,
            "parameters": loading.count_parameters(variant),
            "biased": biased,
        }
        saving.save(variant, source, out / form, model_card(facts, form, stated))
        params, difference = _prove(model, variant, out / form, TOLERANCES[form])
        figures[form] = {"params": params, "logits_difference": difference}
        logger.info(f"{form}: {params:,} parameters, logits off by {difference:.0e}")
    return figures


def _check_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ModelError(
            f"the export's directory {out} cannot be written ({error.strerror}): choose another, or "
            "correct its permissions"
        ) from error


def _prove(
    model: PreTrainedModel, variant: PreTrainedModel, path: Path, tolerance: float
) -> tuple[int, float]:
    """Load a directory as its user does, compare the logits with those of `model`, and generate.

    Returns its parameters and the difference of its logits. Raises ModelError if the directory
    loads as another model or does not generate.
    """
    if spec.is_low_rank(variant):
        with _shipped_class(path, variant.config.auto_map["AutoModelForCausalLM"]) as model_class:
            loaded = model_class.from_pretrained(path, dtype=model.dtype)
            return _compare(model, variant, loaded, path, tolerance)
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype=model.dtype)
    return _compare(model, variant, loaded, path, tolerance)


@contextmanager
def _shipped_class(path: Path, reference: str) -> Iterator[type[PreTrainedModel]]:
    """A class of the code beside the weights, by its `module.Class` in `auto_map`, imported from that file alone.

    AutoModelForCausalLM would take the class of this package, which `loading` registers, and would prove nothing about
    the shipped file. Without the package it would copy the file to a cache below HF_HOME, which may not be writable.
    """
    module_name, _, class_name = reference.partition(".")
    name = f"sparsekd_export_{module_name}"
    file_spec = importlib.util.spec_from_file_location(name, path / f"{module_name}.py")
    if file_spec is None or file_spec.loader is None:
        raise ModelError(f"{path} has no {module_name}.py, which its config.json names")
    sys.modules[name] = module = importlib.util.module_from_spec(file_spec)
    try:
        file_spec.loader.exec_module(module)
        yield getattr(module, class_name)
    finally:
        del sys.modules[name]


def _compare(
    model: PreTrainedModel,
    variant: PreTrainedModel,
    loaded: PreTrainedModel,
    path: Path,
    tolerance: float,
) -> tuple[int, float]:
    params, expected = loading.count_parameters(loaded), loading.count_parameters(variant)
    difference = saving.logits_difference(model, loaded)
    allowed = tolerance if model.dtype == torch.float32 else 8 * torch.finfo(model.dtype).eps
    prompt = torch.zeros(1, 1, dtype=torch.long)
    generated: torch.Tensor = loaded.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)  # type: ignore[operator]
    new_tokens = generated.shape[1] - 1
    if params != expected or not difference <= allowed or new_tokens != 4:
        raise ModelError(
            f"{path} does not load as exported: {params} parameters instead of {expected}, logits differ by "
            f"{difference:.1e} (allowed {allowed:.0e}), {new_tokens} tokens generated instead of 4"
        )
    return params, difference
