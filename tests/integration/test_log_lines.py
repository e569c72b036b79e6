"""A line logged in a process of the cluster is printed by the driver, also after the queue's process was lost."""

import logging
from collections.abc import Callable

import ray
from lines import recorded

from sparsekd_ray.config import Execution
from sparsekd_ray.runtime.logging import headline, listening
from sparsekd_ray.runtime.tasks import map_on_ray


def speaker() -> Callable[[str], str]:
    """A task that logs a line of either kind; a closure, since the workers cannot import the tests."""

    def speak(name: str) -> str:
        logging.getLogger("sparsekd_ray.somewhere").info(f"{name} is at work")
        headline(f"{name} is done")
        return name

    return speak


def test_lines_of_tasks_reach_the_driver(cluster):
    with recorded() as lines, listening() as log_queue:
        results = dict(map_on_ray(Execution(), log_queue)(speaker(), [("a",), ("b",)]))
    assert results == {0: "a", 1: "b"}
    assert sorted(lines) == ["a is at work", "a is done", "b is at work", "b is done"]


def test_a_queue_that_dies_is_started_again(cluster):
    with recorded() as lines, listening() as log_queue:
        task_map = map_on_ray(Execution(), log_queue)
        list(task_map(speaker(), [("before",)]))
        ray.kill(log_queue.actor, no_restart=False)
        list(task_map(speaker(), [("after",)]))
    assert lines == ["before is at work", "before is done", "after is at work", "after is done"]
