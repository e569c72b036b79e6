"""The table of pruning methods: every spec is whole, and the rest of the package takes its names from it."""

import subprocess
import sys
from typing import get_args

import pytest

from sparsekd_ray.config import Method, Prune
from sparsekd_ray.prune.methods import FORMS, METHODS, in_words, named

SPECS = pytest.mark.parametrize("spec", METHODS.values(), ids=METHODS)


def test_the_settings_know_the_methods_of_the_table() -> None:
    assert get_args(Method) == tuple(METHODS)
    assert list(METHODS) == [name for form in FORMS for name in named(form)], "in the order of forms"
    assert Prune.model_fields["method"].description == in_words()
    assert "svd, svd-whitened: low-rank factors of every matrix." in in_words()


@SPECS
def test_a_spec_reads_settings_that_exist_and_describes_itself(spec) -> None:
    fields = Prune.model_fields
    assert set(spec.settings) <= set(fields) - {"method"}
    assert {setting for setting, _ in spec.inputs_where} <= set(spec.settings)
    assert spec.card.startswith("Pruned by ") and not spec.card.endswith(".")
    assert "" in spec.variants


@SPECS
def test_only_what_a_method_reads_is_kept(spec) -> None:
    changed = Prune(allocation="optimal", align=3, storage="gauge", bias=True, score="leverage", drop="influence",
                    alpha=0.1, temperature=1.0)  # fmt: skip
    read = spec.only_read(changed)
    assert read.method == spec.name
    for name, field in Prune.model_fields.items():
        if name != "method":
            assert getattr(read, name) == (getattr(changed, name) if name in spec.settings else field.default)


def test_inputs_may_depend_on_a_setting() -> None:
    svd = METHODS["svd"]
    assert svd.inputs_for(Prune()) == ()
    assert svd.inputs_for(Prune(allocation="optimal")) == ("statistics",)
    assert METHODS["sdm"].inputs_for(Prune()) == ("statistics", "texts", "cache")


def test_the_settings_import_no_heavy_library() -> None:
    """A module of methods that imports torch at its top would make every `--help` wait for it."""
    code = (
        "import sys, sparsekd_ray.config; print({'torch', 'transformers', 'numpy', 'ray'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
