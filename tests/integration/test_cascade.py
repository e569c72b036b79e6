"""The whole cascade on the real engines, small: finished, resubmitted, on S3, killed and resumed.

One short plan is run once on the session's cluster; every other run must give the same weights and figures, bit for
bit. `SPARSEKD_KILLS=12 pytest tests/test_cascade.py -k killed` kills more often than the default.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from cascades import TINY
from lines import recorded

from sparsekd_ray.cascade import job
from sparsekd_ray.config import parse
from sparsekd_ray.store import Store

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("SPARSEKD_KILLS", "1"))


def tiny(store: str, scratch: Path | None = None):
    execution = {"store": store, "scratch": str(scratch) if scratch else None}
    return parse(TINY | {"execution": execution}, "test")


def outcome(store: Store) -> dict:
    """Everything that must not depend on kills, places or workers: figures, weights, shards."""
    config = tiny(store.root)
    found = {}
    for step in job.preflight(config):
        record = store.record(step.ref)
        assert record is not None, f"{step.name} is not there"
        figures = {k: v for k, v in record.metrics.items() if "seconds" not in k and "per_second" not in k}
        binary = {n: f.sha256 for n, f in record.files.items() if n.endswith((".safetensors", ".parquet"))}
        found[step.name] = (figures, binary)
    return found


@pytest.fixture(scope="session")
def finished(cluster, tmp_path_factory) -> Store:
    """A finished run of the short plan."""
    root = tmp_path_factory.mktemp("finished")
    job.main(tiny(str(root)), "python jobs/cascade.py", False)
    return Store(str(root))


def test_a_finished_run_has_all_it_promises(finished):
    folder = Path(finished.root) / "runs" / "tiny"
    summary = json.loads((folder / "summary.json").read_text())
    stages = [row["stage"] for row in summary["rows"]]
    assert stages == ["Dense", "CE only", "Round 1", "neurons 30%", "wanda 30%"]
    for row in summary["rows"][2:]:
        assert abs(row["sparsity"] - 0.3) <= 0.02, "a rank is 1.6 % of so small a model's MLP"
    assert "<svg" in (folder / "report.html").read_text()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kinds = {"cache", "distill", "evaluate", "export", "prune", "statistics", "training"}
    assert kinds <= {row["kind"] for row in rows}
    trained = [row for row in rows if (row["stage"], row["kind"]) == ("round 1", "training")]
    assert [row["step"] for row in trained] == list(range(trained[-1]["steps"] + 1))
    assert {"kl", "ce", "lr", "tokens_per_s", "memory_gb", "valid_ppl"} <= trained[-1].keys()


def test_a_mask_is_the_same_after_distillation(finished):
    from sparsekd_ray.model import loading, spec

    steps = {step.name: step for step in job.preflight(tiny(finished.root))}
    pruned, trained = (loading.load(finished.fetch(steps[n].ref)) for n in ("wanda 30% pruned", "wanda 30%"))
    for name in spec.shapes_from_config(pruned):
        before, after = (model.get_submodule(name).weight for model in (pruned, trained))
        assert ((before == 0) == (after == 0)).all() and (before != after).any()
    assert trained.config.sparsekd_mask == "wanda"


def test_the_pruned_size_is_that_of_the_files(finished):
    from sparsekd_ray.model.weights import tensor_shapes

    step = next(s for s in job.preflight(tiny(finished.root)) if s.name == "round 1 pruned")
    record = finished.record(step.ref)
    tensors = tensor_shapes(finished.fetch(step.ref))
    sizes = {name: a * b for name, (a, *rest) in tensors.items() for b in [rest[0] if rest else 1]}
    assert sum(sizes.values()) == record.metrics["params"]
    assert sum(n for name, n in sizes.items() if ".mlp." in name) == record.metrics["mlp_params"]


def test_resubmitting_a_finished_run_does_nothing(finished):
    before = records_of(finished)
    with recorded() as lines:
        job.main(tiny(finished.root), "python jobs/cascade.py", False)
    assert not any("▶" in line for line in lines)
    assert records_of(finished) == before


def test_the_same_figures_on_s3_and_a_second_machine_goes_on(finished, s3_server, tmp_path):
    """The second machine has an empty disk; what it cannot find it makes from the store's artifacts."""
    root = f"s3://{s3_server.bucket}/cascade"
    store = Store(root, str(tmp_path / "one"))
    with recorded() as said:
        job.main(tiny(root, tmp_path / "one"), "python jobs/cascade.py", False)
    assert outcome(store) == outcome(finished)
    for step in job.preflight(tiny(root)):
        if step.kind in ("export", "evaluate"):
            store.delete(f"{step.ref.key}/record.json")
    with recorded() as more:
        job.main(tiny(root, tmp_path / "two"), "python jobs/cascade.py", False)
    second = Store(root, str(tmp_path / "two"))
    assert outcome(second) == outcome(finished)
    written = [path for path in s3_server.directory.rglob("*") if path.is_file()]
    assert {"report.html", "record.json", "plan.json", "settings.yaml"} <= {path.name for path in written}
    for secret in (s3_server.secret_key, s3_server.access_key):
        assert secret not in "\n".join(said + more)
        assert not [path for path in written if secret.encode() in path.read_bytes()]


@pytest.mark.timeout(900)
def test_killed_and_resubmitted_it_ends_the_same(finished, tmp_path):
    """SIGKILL of the driver and all that it started, at seeded moments; the resubmitted run ends as if undisturbed."""
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(TINY))
    moments, kills = random.Random(0), 0
    for attempt in range(KILLS + 1):
        store = Store(str(tmp_path / f"store-{attempt}"))
        kills += killed_until_it_ends(config, store, moments, KILLS - kills)
        assert outcome(store) == outcome(finished)
        if kills == KILLS:
            return


def killed_until_it_ends(config: Path, store: Store, moments: random.Random, at_most: int) -> int:
    """Kills the run up to so many times while it lives, and submits it again; returns how often it did."""
    done: dict[str, str] = {}
    for kill in range(at_most + 1):
        driver = submit(config, store)
        if kill < at_most:
            wait_for_steps(driver, store, len(done) + 1)
        try:
            output, _ = driver.communicate(timeout=moments.uniform(0, 6) if kill < at_most else 600)
        except subprocess.TimeoutExpired:
            kill_tree(driver)
            assert done.items() <= records_of(store).items(), "a finished artifact was built twice"
            done = records_of(store)
            print(f"kill {kill + 1}: {len(done)} steps were done, the last file {newest(store)}")
        else:
            assert driver.returncode == 0, output
            assert done.items() <= records_of(store).items(), "a finished artifact was built twice"
            return kill
    raise AssertionError("the last run was to end")


def submit(config: Path, store: Store) -> subprocess.Popen:
    command = [sys.executable, "jobs/cascade.py", "--config", str(config), "--execution.store", store.root]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def wait_for_steps(driver: subprocess.Popen, store: Store, count: int) -> None:
    """Until so many artifacts exist, or the run has ended."""
    while driver.poll() is None and len(records_of(store)) < count:
        time.sleep(0.05)


def newest(store: Store) -> str:
    """What was written last in the store, wherever it was killed."""
    files = [path for path in Path(store.root).glob("artifacts/**/*") if path.is_file()]
    return (
        str(max(files, key=lambda path: path.stat().st_mtime).relative_to(store.root)) if files else "nothing"
    )


def kill_tree(driver: subprocess.Popen) -> None:
    if driver.poll() is None:
        below = psutil.Process(driver.pid).children(recursive=True)
        driver.send_signal(signal.SIGKILL)
        for process in below:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
    driver.communicate()


def records_of(store: Store) -> dict[str, str]:
    """Every record as it stands, so that one written again shows."""
    return {str(p): p.read_text() for p in Path(store.root).glob("artifacts/*/*/record.json")}
