"""The loop on 1, 2 and 3 workers with the real engine: equal gradients, resuming, divergence, stopping early."""

import json
import os
import subprocess
import sys
from pathlib import Path

import distilling
import pytest
import torch
from distilling import KILLED_AT, SEQUENCES, STEPS, TEMPERATURE, VALIDATE_EVERY, WORLDS
from safetensors.torch import load_file

from sparsekd_ray import corpus
from sparsekd_ray.distill import schedule
from sparsekd_ray.distill.loss import kd_loss
from sparsekd_ray.distill.reader import SampleReader
from sparsekd_ray.model import loading
from sparsekd_ray.store import Ref, Store

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """After all runs of `distilling.main`."""
    root = tmp_path_factory.mktemp("distilling")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support'}"}
    command = [sys.executable, distilling.__file__, str(root)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return Store(str(root))


def outcome(store: Store, name: str) -> str:
    return str(json.loads(store.read_text("outcomes.json") or "")[name])


def metrics(store: Store, name: str) -> dict:
    record = store.record(Ref("distill", name, "ff66"))
    assert record is not None
    return record.metrics


def weights(store: Store, name: str) -> dict[str, torch.Tensor]:
    return load_file(store.fetch(Ref("distill", name, "ff66")) / "model.safetensors")


def gradients_of_one_process(store: Store) -> dict[str, torch.Tensor]:
    """Autograd over the five sequences at once, without the engine."""
    model, reader = (
        loading.load(store.fetch(distilling.STUDENT)),
        SampleReader(store, distilling.CACHE, TEMPERATURE),
    )
    batch = reader.batch(schedule.batch_at(0, SEQUENCES, reader.shard_rows, seed=3), "cpu")
    hidden_BLD = model.base_model(batch.input_ids_BL).last_hidden_state[:, :-1]
    share = 0.5 / len(batch.labels_N)
    loss, _, _ = kd_loss(
        hidden_BLD.flatten(0, 1), model.lm_head.weight, batch.labels_N, batch.target,
        temperature=TEMPERATURE, kl_weight=share, ce_weight=share,
    )  # fmt: skip
    loss.backward()
    return {f"model.{name}": parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("world", WORLDS)
def test_gradients_are_one_process_s(store: Store, world: int) -> None:
    sizes = schedule.micro_batches(SEQUENCES, 3, 1)
    assert [0 in worker for worker in sizes] == [False, False, True], "one share of three workers is empty"
    assert outcome(store, f"one-step-{world}") == ""
    found, expected = (
        load_file(f"{store.root}/gradients-{world}.safetensors"),
        gradients_of_one_process(store),
    )
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-6 * gradient.norm(), name


@pytest.mark.parametrize("world", WORLDS[1:])
def test_figures_do_not_depend_on_the_number_of_workers(store: Store, world: int) -> None:
    found, expected = metrics(store, f"one-step-{world}"), metrics(store, "one-step-1")
    for one, other in zip(found["history"], expected["history"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["valid_ppl"] == pytest.approx(other["valid_ppl"], rel=1e-5)
        assert one["valid_domains"] == pytest.approx(other["valid_domains"], rel=1e-5)
    assert expected["history"][0]["valid_domains"].keys() == {"prose", "code"}


def test_killed_after_a_checkpoint_it_resumes_bit_for_bit(store: Store) -> None:
    assert outcome(store, "killed") == "killed" and KILLED_AT > VALIDATE_EVERY
    assert outcome(store, "resumed") == "", "the steps before the checkpoint are not done again"
    assert metrics(store, "resumed") == metrics(store, "undisturbed")
    assert metrics(store, "resumed")["steps"] == STEPS
    found, expected = weights(store, "resumed"), weights(store, "undisturbed")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    left = [path.name for path in store.local(Ref("distill", "resumed", "ff66").key).iterdir()]
    assert "checkpoints" not in left


def test_training_lowers_the_loss_and_keeps_the_best_weights(store: Store) -> None:
    found = metrics(store, "undisturbed")
    losses = [point["loss"][0] for point in found["history"][1:]]
    assert losses == sorted(losses, reverse=True)
    best = min(found["history"], key=lambda point: point["valid_ppl"])
    assert (found["best_step"], found["valid_ppl"]) == (best["step"], best["valid_ppl"])


def test_divergence_is_our_error_and_commits_nothing(store: Store) -> None:
    message = outcome(store, "diverged")
    assert message.startswith("ModelError: diverged diverged: validation perplexity nan at step 4")
    assert "Lower distill.lr" in message
    assert store.record(Ref("distill", "diverged", "ff66")) is None


def test_without_gain_it_stops_early(store: Store) -> None:
    found = metrics(store, "idle")
    assert found["stopped"] in ("minimum", "saturation") and found["planned_steps"] == 9
    assert found["steps"] == 2, "two validations after the first without a gain"
    assert len(found["history"]) == 3


def test_the_student_is_a_complete_model(store: Store) -> None:
    folder = store.fetch(Ref("distill", "undisturbed", "ff66"))
    assert loading.load(folder).config.vocab_size == distilling.VOCABULARY
    assert corpus.MANIFEST not in [path.name for path in folder.iterdir()]
