"""The pruning methods, by name: every module of this directory lists some in `METHODS`.

A new method is one more module in this directory, with its `MethodSpec` and perhaps its mathematics. The settings tree
takes the names from here, and `--help` waits for that. So these modules do not import torch or transformers at their
top: their functions import what they need when they are called.
"""

from __future__ import annotations

import importlib
import pkgutil

from sparsekd_ray.prune.methods.spec import FORMS, Form, Input, MethodSpec

__all__ = ["FORMS", "METHODS", "Form", "Input", "MethodSpec", "in_words", "named"]


def _listed() -> list[MethodSpec]:
    """The methods of all modules, by form and then in the order of their `METHODS`."""
    modules = [
        importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)
    ]
    methods = [method for module in modules for method in getattr(module, "METHODS", ())]
    return sorted(methods, key=lambda method: list(FORMS).index(method.form))


METHODS: dict[str, MethodSpec] = {method.name: method for method in _listed()}


def named(form: Form) -> list[str]:
    """The names of the methods whose students are of this form."""
    return [method.name for method in METHODS.values() if method.form == form]


def in_words() -> str:
    """All methods by form, for help texts."""
    return " ".join(f"{', '.join(named(form))}: {words}." for form, words in FORMS.items())
