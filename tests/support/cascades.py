"""Settings of cascades that the tests share."""

from pathlib import Path

from sparsekd_ray.config import load, parse

LAPTOP = Path(__file__).parents[2] / "jobs" / "configs" / "laptop.yaml"
TINY = {
    "name": "tiny",
    "model": {
        "standin": {"hidden": 32, "intermediate": 48, "layers": 2, "heads": 2, "kv_heads": 1, "vocab": 384,
                    "steps": 30, "batch": 4, "unseen": ["manual"]},
    },
    "corpus": {
        "sources": [
            {"name": "arithmetic", "path": "embedded:arithmetic"},
            {"name": "manual", "path": "embedded:manual"},
        ],
        "samples": 48, "valid_samples": 8, "test_samples": 16, "seq_len": 32, "held_out": 0.2, "shard_rows": 16,
    },
    "teacher": {"k": 8},
    "distill": {"batch": 4, "validate_every": 4, "epochs": 1},
    "calibrate": {"samples": 16},
    "cascade": {
        "rounds": [{"sparsity": 0.3, "teacher": "dense"}], "controls": ["ce-only"],
        "baselines": [{"method": "neurons", "sparsity": 0.3}, {"method": "wanda", "sparsity": 0.3}],
    },
}  # fmt: skip


def changed(path: str, value):
    """The laptop's configuration with one setting changed."""
    tree = load(LAPTOP).model_dump(mode="json")
    *parents, leaf = path.split(".")
    node = tree
    for part in parents:
        node = node[int(part)] if part.isdigit() else node[part]
    node[leaf] = value
    return parse(tree, "test")
