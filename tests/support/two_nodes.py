"""A driver that captures on a cluster of two nodes with different labels, on one machine; a process of its own, since
Ray connects a process to one cluster.

python tests/support/two_nodes.py STORE NOTES

NOTES gets a file per shard, which holds the label of the node that made it.
"""

import os
import sys
import tempfile
from pathlib import Path

import capturing
import ray
from ray.cluster_utils import Cluster

from sparsekd_ray.store import Store
from sparsekd_ray.teacher import capture

KIND = "ray.io/accelerator-type"
CARDS = ("RTX-4090", "RTX-3090")


def noting(folder: Path) -> type:
    """A teacher actor that says which node it is on, shard by shard."""

    class NotingActor(capture.TeacherActor):
        def shard(self, index: int) -> int:
            (folder / str(index)).write_text(ray.get_runtime_context().get_node_labels()[KIND])
            return super().shard(index)

    return NotingActor


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        os.environ["RAY_TMPDIR"] = (
            folder  # or other drivers of this machine would find, and join, this cluster
        )
        cluster = Cluster()
        for card in CARDS:
            cluster.add_node(num_cpus=1, labels={KIND: card}, include_dashboard=False)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
        capture.TeacherActor = noting(Path(sys.argv[2]))  # type: ignore[misc]
        capturing.run(Store(sys.argv[1]), actors=2)
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
