"""The connection to Ray: what cannot work is refused before any work, in one message that says what to do."""

import os
import time

import pytest
import ray
from lines import recorded

from sparsekd_ray.cascade.driver import side_by_side
from sparsekd_ray.cascade.steps import Step
from sparsekd_ray.config import Execution
from sparsekd_ray.errors import ClusterError
from sparsekd_ray.runtime import cluster
from sparsekd_ray.store import Ref

GPUS = Execution(gpus=True, workers=2, actors=2)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Ray that starts nothing; the calls of ray.init."""
    calls: list[dict] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: calls.append(options))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0})
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name in ("RAY_BACKEND_LOG_LEVEL", "OMP_WAIT_POLICY", "RAY_num_workers_soft_limit"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    return calls


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
def test_a_temporary_directory_too_long_for_sockets_is_refused(no_ray, monkeypatch, variable):
    monkeypatch.setenv(variable, "/scratch/" + "x" * 60)
    with pytest.raises(ClusterError, match=rf"{variable}=/scratch/x+ is too long.*RAY_TMPDIR=/tmp"):
        cluster.connected(Execution()).__enter__()
    assert not no_ray


def test_the_longest_temporary_directory_is_what_ray_accepts(no_ray, monkeypatch):
    from ray._private.utils import validate_socket_filepath

    longest = "/" + "x" * (cluster.LONGEST_TEMPORARY_DIRECTORY - 1)
    validate_socket_filepath(longest + cluster.SOCKET)
    monkeypatch.setenv("RAY_TMPDIR", longest)
    cluster.check_temporary_directory()
    with pytest.raises(OSError):
        validate_socket_filepath(f"{longest}x{cluster.SOCKET}")


def test_a_short_ray_tmpdir_overrides_a_long_tmpdir(no_ray, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/scratch/" + "x" * 60)
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    with cluster.connected(Execution()):
        assert no_ray[0]["address"] == "local"


@pytest.mark.parametrize(
    "resources, processes, found",
    [
        (
            {"CPU": 2.0},
            2,
            "asks for 2 GPUs at a time; Ray finds 0 on this machine.*Leave out --execution.gpus",
        ),
        ({"CPU": 2.0}, 1, "asks for 1 GPU at a time; Ray finds 0"),
        ({"CPU": 9.0, "GPU": 1.0}, 2, "Ray finds 1 .*--execution.workers 1 --execution.actors 1"),
    ],
)
def test_gpus_that_this_machine_has_not_are_refused(no_ray, monkeypatch, resources, processes, found):
    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    with pytest.raises(ClusterError, match=found):
        cluster.connected(GPUS, processes).__enter__()


def test_gpus_that_this_machine_has_are_used(no_ray, monkeypatch):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0, "GPU": 1.0})
    with cluster.connected(GPUS, 1):
        assert len(no_ray) == 1


def test_a_cluster_that_lacks_gpus_is_waited_for_with_a_reminder(no_ray, monkeypatch):
    there = {"CPU": 8.0}
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(ray, "cluster_resources", lambda: there)
    monkeypatch.setattr(cluster, "SECONDS_BETWEEN_REMINDERS", 0.02)
    with recorded() as lines, cluster.connected(GPUS, 2):
        while len(lines) < 3:
            time.sleep(0.005)
        assert "has 8 CPUs and 0 GPUs; this run needs 2 CPUs and 2 GPUs" in lines[0]
        assert "If no autoscaler adds them" in lines[0]
        there["GPU"] = 2.0  # an autoscaler added a node
        time.sleep(0.1)
        count = len(lines)
        time.sleep(0.1)
        assert len(lines) == count


@pytest.mark.parametrize(
    "address, found",
    [
        (
            "http://127.0.0.1:8265",
            "is where jobs are submitted.*ray job submit --address http://127.0.0.1:8265",
        ),
        ("127.0.0.1:1", "no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1 .*refused"),
        ("ray://127.0.0.1:1", "no Ray cluster answers at RAY_ADDRESS=ray://127.0.0.1:1"),
    ],
)
def test_an_address_where_no_cluster_is(no_ray, monkeypatch, address, found):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ClusterError, match=found):
        cluster.connected(Execution()).__enter__()
    assert not no_ray


def test_what_keeps_ray_from_starting_is_one_message(no_ray, monkeypatch):
    def init(**_: object) -> None:
        raise PermissionError(13, "Permission denied", "/scratch/ray/session_1")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setenv("RAY_TMPDIR", "/scratch")
    with pytest.raises(ClusterError, match=r"does not start .*Permission denied.*/scratch/ray.*RAY_TMPDIR"):
        cluster.connected(Execution()).__enter__()


def test_what_runs_side_by_side_depends_on_the_steps():
    def step(kind: str) -> Step:
        return Step(kind, kind, Ref(kind, "x", "00"), {}, {}, None)

    execution = Execution(workers=3, actors=5)
    assert side_by_side([step("prune"), step("evaluate")], execution) == 1
    assert side_by_side([step("prune"), step("distill")], execution) == 3
    assert side_by_side([step("cache"), step("distill")], execution) == 5
