"""Runs one step in the present process: fetches its inputs, calls its stage, commits its artifact.

The only place that knows which function makes which kind of artifact. Captures and distillations are not here: they
are spread over actors and workers by the driver.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekd_ray.cascade.steps import Step
from sparsekd_ray.config import Execution
from sparsekd_ray.runtime.tasks import TaskMap
from sparsekd_ray.store import Ref, Store
from sparsekd_ray.store.checkpoints import Checkpoints

if TYPE_CHECKING:
    from sparsekd_ray.prune.task import Task

IN_PIECES = ("statistics", "prune")  # kinds of step whose work is in independent pieces


def run(step: Step, parents: dict[str, Ref], store: Store, execution: Execution, each: TaskMap) -> None:
    """Makes the artifact of `step`; `parents` maps its roles to the artifacts they name; `each` runs its pieces."""
    started = time.monotonic()
    with store.building(step.ref) as out:
        if step.kind in IN_PIECES:
            metrics = _in_pieces(step, parents, store, execution, each)
        else:
            metrics = _stage(step, parents, out, store, execution.gpus)
    store.commit(
        step.ref,
        identity=step.identity,
        inputs={role: ref.key for role, ref in parents.items()},
        metrics=metrics,
        seconds=time.monotonic() - started,
    )


def _stage(step: Step, parents: dict[str, Ref], out: Path, store: Store, gpu: bool) -> dict[str, Any]:
    inputs = {role: store.fetch(ref) for role, ref in parents.items()}
    match step.kind:
        case "tokenizer":
            from sparsekd_ray import corpus
            from sparsekd_ray.standin import pretrain

            texts, settings = step.settings
            documents = corpus.train_documents(texts.sources, step.seed, texts.held_out)
            return pretrain.train_tokenizer(documents, settings.vocab, texts.seq_len, out)
        case "corpus":
            from sparsekd_ray import corpus

            return corpus.build(step.settings, inputs["tokenizer"], out, seed=step.seed)
        case "dense" if "texts" in inputs:
            from sparsekd_ray.standin import pretrain

            kept = Checkpoints(store, step.ref)
            return pretrain.pretrain(step.settings, inputs["texts"], out, seed=step.seed, checkpoints=kept)
        case "dense":
            from sparsekd_ray.model import hub

            return hub.import_model(step.settings, out)
        case "evaluate":
            return _evaluate(step, inputs, out, gpu)
        case "export":
            from sparsekd_ray.model.export import export

            return export(inputs["model"], out, card_facts=_card_facts(step, parents, inputs))
    raise AssertionError(f"no stage makes a {step.kind}")


def _in_pieces(
    step: Step, parents: dict[str, Ref], store: Store, execution: Execution, each: TaskMap
) -> dict[str, Any]:
    run: dict[str, Any] = {"store": store, "gpu": execution.gpus, "each": each}
    if step.kind == "statistics":
        from sparsekd_ray.prune.calibrate import calibrate

        groups = execution.actors
        return calibrate(
            parents["model"], parents["texts"], step.ref, settings=step.settings, groups=groups, **run
        )
    from sparsekd_ray.prune.run import prune

    return prune(prune_task(step, parents, store, execution.gpus), each)


def prune_task(step: Step, parents: dict[str, Ref], store: Store, gpu: bool) -> Task:
    """What a step of kind prune is asked to do."""
    from sparsekd_ray.prune.task import Task

    sparsity, settings, calibration = step.settings
    return Task(
        store=store,
        model=parents["model"],
        out=step.ref,
        settings=settings,
        sparsity=sparsity,
        dense_mlp_params=_metrics(store, parents["dense"])["mlp_params"],
        calibrate=calibration,
        statistics=parents.get("statistics"),
        texts=parents.get("texts"),
        cache=parents.get("cache"),
        gpu=gpu,
    )


def _evaluate(step: Step, inputs: dict[str, Path], out: Path, gpu: bool) -> dict[str, Any]:
    from transformers import AutoTokenizer

    from sparsekd_ray import corpus
    from sparsekd_ray.evaluate.protocols import HeldOut, evaluate
    from sparsekd_ray.model import loading

    dtype, device = ("bfloat16", "cuda") if gpu else ("float32", "cpu")
    model = loading.load(inputs["model"], dtype=dtype, device=device)
    texts = {
        domain: HeldOut(rows, corpus.read_test_text(inputs["texts"], domain))
        for domain, rows in corpus.domain_streams(inputs["texts"], "test").items()
    }
    tokenizer = AutoTokenizer.from_pretrained(inputs["texts"] / "tokenizer")
    figures = evaluate(model, tokenizer, texts, step.settings.protocols)
    (out / "perplexity.json").write_text(json.dumps(figures, indent=1, sort_keys=True))
    return dict(figures)


def _metrics(store: Store, ref: Ref) -> dict[str, Any]:
    """The measured figures in an artifact's record."""
    record = store.record(ref)
    assert record is not None, f"{ref.key} was fetched"
    return record["metrics"]


def _card_facts(step: Step, parents: dict[str, Ref], inputs: dict[str, Path]) -> dict[str, Any]:
    figures = json.loads((inputs["figures"] / "perplexity.json").read_text())
    dense = json.loads((inputs["dense"] / "perplexity.json").read_text())
    return {
        "sparsity": step.identity["sparsity"],
        "method": step.identity["method"],
        "distilled": parents["model"].kind == "distill",
        "perplexity": figures,
        "dense_perplexity": dense,
    }
