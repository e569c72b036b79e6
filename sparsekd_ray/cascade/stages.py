"""Runs one step in the present process: fetches its inputs, calls its stage, commits its artifact.

Only this module knows which function makes which kind of artifact. It does not run captures and distillations: the
driver spreads these over actors and workers.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekd_ray.cascade.steps import ExportSettings, PruneSettings, Step, TokenizerSettings
from sparsekd_ray.config import Calibrate, Corpus, Evaluate, Execution, Model, Standin
from sparsekd_ray.errors import ConfigError, ModelError
from sparsekd_ray.prune.methods import METHODS
from sparsekd_ray.runtime.tasks import TaskMap
from sparsekd_ray.store import Ref, Store, locate
from sparsekd_ray.store.checkpoints import Checkpoints
from sparsekd_ray.store.dtype import dtype_on

if TYPE_CHECKING:
    from sparsekd_ray.model.card import CardFacts
    from sparsekd_ray.prune.task import Task

MAPPED = ("statistics", "prune")  # kinds of steps that run their own tasks through a TaskMap


def run(step: Step, parents: dict[str, Ref], store: Store, execution: Execution, task_map: TaskMap) -> None:
    """Makes the artifact of `step`. `parents`: role → artifact of every input."""
    started = time.monotonic()
    with store.building(step.ref) as out:
        if step.kind in MAPPED:
            metrics = _mapped(step, parents, store, execution, task_map)
        else:
            metrics = _made(step, parents, out, store, execution.gpus)
    store.commit(
        step.ref,
        identity=step.identity,
        inputs={role: ref.key for role, ref in parents.items()},
        metrics=metrics,
        seconds=time.monotonic() - started,
    )


def _made(step: Step, parents: dict[str, Ref], out: Path, store: Store, gpu: bool) -> dict[str, Any]:
    """Makes the artifact in `out` in this process. Returns its metrics."""
    inputs = {role: store.fetch(ref) for role, ref in parents.items()}
    match step.settings:
        case TokenizerSettings(texts=texts, standin=standin):
            from sparsekd_ray import corpus
            from sparsekd_ray.standin import tokenizer

            documents = corpus.train_documents(texts, step.seed)
            return tokenizer.train(documents, standin.vocab, texts.seq_len, out)
        case Corpus() as settings:
            from sparsekd_ray import corpus

            return dict(corpus.build(settings, inputs["tokenizer"], out, seed=step.seed))
        case Standin() as settings:
            from sparsekd_ray.standin import pretrain

            checkpoints = Checkpoints(store, step.ref)
            return pretrain.pretrain(settings, inputs["texts"], out, seed=step.seed, checkpoints=checkpoints)
        case Model() as settings:
            from sparsekd_ray.model import hub

            folder = exported_model(str(settings.path), store.scratch)
            local = settings if folder is None else settings.model_copy(update={"path": str(folder)})
            return hub.import_model(local, out)
        case Evaluate() as settings:
            return _evaluate(settings, inputs, out, gpu)
        case ExportSettings() as settings:
            from sparsekd_ray.model.export import export

            return export(inputs["model"], out, card_facts=_card_facts(settings, parents, inputs))
    raise AssertionError(f"no stage makes a {step.kind}")


def _mapped(
    step: Step, parents: dict[str, Ref], store: Store, execution: Execution, task_map: TaskMap
) -> dict[str, Any]:
    """Makes the artifact by tasks that may run on any machine. Returns its metrics."""
    if not isinstance(step.settings, Calibrate):
        from sparsekd_ray.prune.run import prune

        return prune(prune_task(step, parents, store, execution.gpus), task_map)
    from sparsekd_ray.prune.calibrate import calibrate

    return calibrate(
        parents["model"],
        parents["texts"],
        step.ref,
        settings=step.settings,
        groups=execution.actors,
        store=store,
        gpu=execution.gpus,
        task_map=task_map,
    )


def prune_task(step: Step, parents: dict[str, Ref], store: Store, gpu: bool) -> Task:
    """The task of a step of kind prune."""
    from sparsekd_ray.prune.task import Task

    assert isinstance(step.settings, PruneSettings), f"{step.name} is a pruning"
    return Task(
        store=store,
        model=parents["model"],
        out=step.ref,
        settings=step.settings.prune,
        sparsity=step.settings.sparsity,
        dense_mlp_params=_metrics(store, parents["dense"])["mlp_params"],
        calibrate=step.settings.calibrate,
        statistics=parents.get("statistics"),
        texts=parents.get("texts"),
        cache=parents.get("cache"),
        gpu=gpu,
    )


def exported_model(path: str, scratch: str | None) -> Path | None:
    """The directory on this machine of `<store>/artifacts/export/<ref>/<form>`, fetched; None for any other path.

    ConfigError if the export is not finished or has no such form.
    """
    match = re.fullmatch(r"((?:.*/)?artifacts/export/[^/]+)/(low-rank|merged|stock)/?", path)
    if match is None:
        return None
    store, ref = locate(match[1], scratch)
    record, form = store.record(ref), match[2]
    if record is None:
        raise ConfigError(f"{match[1]} is no finished export: it has no record.json")
    files = [name for name in record.files if name.startswith(f"{form}/")]
    if not files:
        forms = sorted({name.split("/")[0] for name in record.files})
        raise ConfigError(f"{match[1]} has no form {form}: it has {' and '.join(forms)}")
    return store.fetch(ref, files) / form


def _evaluate(settings: Evaluate, inputs: dict[str, Path], out: Path, gpu: bool) -> dict[str, Any]:
    from sparsekd_ray import corpus
    from sparsekd_ray.evaluate.protocols import HeldOut, evaluate
    from sparsekd_ray.model import loading, tokenizer

    _check_tokenizer(inputs["model"], inputs["texts"])
    model = loading.load(inputs["model"], dtype=dtype_on(gpu), device="cuda" if gpu else "cpu")
    whole = corpus.read_manifest(inputs["texts"])["whole_test"]
    texts = {
        domain: HeldOut(rows, corpus.read_test_text(inputs["texts"], domain), whole[domain])
        for domain, rows in corpus.domain_streams(inputs["texts"], "test").items()
    }
    encoder = tokenizer.load(inputs["texts"] / "tokenizer")
    figures = evaluate(model, encoder, texts, settings.protocols)
    (out / "perplexity.json").write_text(json.dumps(figures, indent=1, sort_keys=True))
    return dict(figures)


def _check_tokenizer(model: Path, texts: Path) -> None:
    """Raises ModelError unless the model's tokenizer is the one that the corpus was made with."""
    from sparsekd_ray import corpus
    from sparsekd_ray.model import tokenizer

    if corpus.tokenizer_hash(tokenizer.load(model)) != corpus.read_manifest(texts)["tokenizer_hash"]:
        raise ModelError(
            f"the tokenizer in {model} is not the one that the text was tokenized with: evaluate the model with the "
            "settings it was made with (--config), or with this model as their dense model"
        )


def _metrics(store: Store, ref: Ref) -> dict[str, Any]:
    """The measured figures in an artifact's record."""
    record = store.record(ref)
    assert record is not None, f"{ref.key} was fetched"
    return record.metrics


def _card_facts(settings: ExportSettings, parents: dict[str, Ref], inputs: dict[str, Path]) -> CardFacts:
    figures = json.loads((inputs["figures"] / "perplexity.json").read_text())
    dense = json.loads((inputs["dense"] / "perplexity.json").read_text())
    return {
        "sparsity": settings.sparsity,
        "method": settings.method,
        "made": METHODS[settings.method].card,
        "student_form": METHODS[settings.method].form,
        "distilled": parents["model"].kind == "distill",
        "perplexity": figures,
        "dense_perplexity": dense,
    }
