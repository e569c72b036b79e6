"""Hub models and data sets without a revision are named in the plan; the commits that were read are recorded."""

from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest
from lines import recorded

from sparsekd_ray.cascade import steps
from sparsekd_ray.config import Source
from sparsekd_ray.corpus.sources import Tally, read


@pytest.mark.parametrize("revision", [None, "c0ffee"])
def test_what_is_not_pinned_is_named_in_one_line(revision: str | None) -> None:
    model = SimpleNamespace(standin=None, path="someone/model", revision=revision)
    source = Source(name="set", path="hf://owner/set", revision=revision)
    config: Any = SimpleNamespace(model=model, corpus=SimpleNamespace(sources=(source,), exclude=()))
    with recorded() as lines:
        steps._warn_unpinned(config)
    named = [line for line in lines if "no revision is set for someone/model, hf://owner/set" in line]
    assert len(named) == len(lines) == (revision is None)


def test_the_commit_of_a_data_set_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    data = datasets.Dataset.from_dict({"text": ["alpha beta"]}).to_iterable_dataset()
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: SimpleNamespace(sha="c0ffee"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    tally = Tally()
    assert [d.text for d in read(Source(name="set", path="hf://owner/set"), 1, tally)] == ["alpha beta"]
    assert tally.commit == "c0ffee"
