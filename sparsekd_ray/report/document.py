"""The document that a report is made of, field by field.

The annotations are the glossary of `summary.json`. `FIELDS` collects them under their paths, in which [] stands for
each item of a list and * for each key of a mapping. A figure that is not finite is null in the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypedDict, get_args, get_origin, get_type_hints

from sparsekd_ray.config import Control

Kind = Literal["dense", "control", "round", "baseline"]
CONTROLS: dict[Control, str] = {"dense+kd": "Dense + KD", "ce-only": "CE only", "kl-only": "KL only"}
KD, CE, KL = CONTROLS.values()


class Protocol(TypedDict):
    window: Annotated[int, "tokens in a window"]
    stride: Annotated[int, "tokens from one window to the next"]
    sentence: Annotated[str, "the protocol in words"]
    mixture: Annotated[
        str | None, "which models were evaluated in which dtype where there are several, or null"
    ]


class Domain(TypedDict):
    train_tokens: Annotated[int, "tokens in the training mix"]
    test_tokens: Annotated[int, "tokens in the test split"]
    in_dense_training: Annotated[bool | None, "whether the dense model was trained on it, null if not known"]


class Corpus(TypedDict):
    artifact: Annotated[str, "store key"]
    train_tokens: Annotated[int, "tokens in the training mix"]
    domains: dict[str, Domain]
    warning: Annotated[str | None, "what training and test text have in common, or null"]


class Dense(TypedDict):
    artifact: Annotated[str, "store key"]
    note: Annotated[str | None, "a remark on the dense model, or null"]
    params: Annotated[int, "parameters"]
    mlp_params: Annotated[int, "parameters in MLP matrices"]


class Row(TypedDict):
    """One model: its size, its perplexity, and how it was made."""

    stage: Annotated[str, "name of the model"]
    kind: Annotated[
        Kind,
        "dense; control (trained at full size); round (pruned and distilled); baseline (dense pruned once by another "
        "method and distilled)",
    ]
    method: Annotated[
        str | None, "pruning method and, for an SVD, its allocation; null for dense and controls"
    ]
    sparsity_requested: Annotated[float, "fraction of MLP parameters to remove"]
    sparsity: Annotated[float, "fraction of MLP parameters removed, counted"]
    params: Annotated[int, "parameters, zeros of a mask included"]
    mlp_params: Annotated[int, "parameters in MLP matrices, zeros of a mask left out"]
    artifact: Annotated[str, "store key"]
    export: Annotated[str | None, "store key of the directory that Transformers loads, or null"]
    teacher: Annotated[str | None, "dense, dense+kd, previous or null"]
    teacher_ppl: Annotated[float | None, "perplexity of the teacher"]
    oneshot_ppl: Annotated[
        float | None, "perplexity of plain SVD of dense to a round's size, all matrices alike, untrained"
    ]
    pre_ppl: Annotated[float | None, "perplexity just after pruning, untrained"]
    ppl: Annotated[float, "perplexity on the test split by protocol paper, mean over seeds"]
    std: Annotated[float | None, "standard deviation of ppl over seeds, null for one seed"]
    per_seed: Annotated[dict[str, float], "ppl by seed"]
    gptq_ppl: Annotated[float | None, "perplexity by protocol gptq, mean over seeds, null if not measured"]
    words_ppl: Annotated[float | None, "perplexity by protocol words, mean over seeds, null if not measured"]
    domains: Annotated[dict[str, float], "ppl by domain"]
    vs_dense: Annotated[float, "ppl / dense ppl - 1"]
    recovered: Annotated[float | None, "(pre - post) / (pre - dense), null for dense and controls"]
    trained_tokens: Annotated[int, "tokens trained on since dense, cumulative over rounds"]
    lr: Annotated[float | None, "learning rate"]
    stopped: Annotated[str | None, "what ended the training: budget, minimum or saturation"]


class Point(TypedDict):
    step: Annotated[int, "optimiser steps done, 0 before distillation"]
    tokens: Annotated[int, "tokens trained on so far"]
    valid_ppl: Annotated[float, "perplexity on the validation split"]
    valid_domains: Annotated[dict[str, float], "valid_ppl by domain"]


class Curve(TypedDict):
    stage: Annotated[str, "name of the model that was trained"]
    seed: Annotated[int, "seed of this training"]
    best_step: Annotated[int, "step whose weights were kept"]
    points: list[Point]


class StepRow(TypedDict):
    name: Annotated[str, "name of the step"]
    kind: Annotated[str, "kind of its result"]
    artifact: Annotated[str, "store key of its result"]
    inputs: Annotated[list[str], "names of the steps that it reads"]
    seconds: Annotated[float, "time that it took when it was done"]
    reused: Annotated[bool, "whether this run found it done"]
    figure: Annotated[str, "the figure that matters, in words"]


class Command(TypedDict):
    what: Annotated[str, "what the command is for"]
    command: Annotated[str, "the command itself"]


class Summary(TypedDict):
    """A finished run."""

    run: Annotated[str, "name of the run"]
    created: Annotated[str, "time of the report, ISO 8601"]
    command: Annotated[str, "command that repeats the run"]
    seconds: Annotated[float, "wall-clock time of the run"]
    seeds: Annotated[list[int], "seeds of the distillations"]
    protocol: Protocol
    corpus: Corpus
    dense: Dense
    rows: list[Row]
    curves: list[Curve]
    steps: list[StepRow]
    settings: Annotated[dict[str, Any], "every setting"]
    commands: list[Command]
    versions: Annotated[dict[str, str], "versions of the software"]
    hardware: Annotated[str, "machine that it ran on"]


class Document(Summary):
    """What `summary.json` holds, without the glossary itself."""

    findings: Annotated[list[str], "the figures in words"]


def fields(kind: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every leaf below a type of this file, with its meaning."""
    for name, hint in get_type_hints(kind, include_extras=True).items():
        place = f"{path}.{name}".lstrip(".")
        if get_origin(hint) is Annotated:
            value, meaning = get_args(hint)
            yield place + _inside(value), meaning
        else:
            inner = get_args(hint)[-1] if get_args(hint) else hint
            yield from fields(inner, place + _inside(hint))


def _inside(hint: Any) -> str:
    return {list: "[]", dict: ".*"}.get(get_origin(hint), "")


FIELDS: Mapping[str, str] = dict(fields(Document))
