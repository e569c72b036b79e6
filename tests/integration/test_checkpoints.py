"""Checkpoints in a store: whole or not at all, local and on S3."""

import uuid
from pathlib import Path

import pytest

from sparsekd_ray.errors import IntegrityError
from sparsekd_ray.store import Ref, Store
from sparsekd_ray.store.checkpoints import Checkpoints, tag

REF = Ref("distill", "student", "0123abcd")


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path):
    if request.param == "local":
        return Store(str(tmp_path / "store"))
    server = request.getfixturevalue("s3_server")
    return Store(f"s3://{server.bucket}/{uuid.uuid4().hex}", scratch=str(tmp_path / "scratch"))


def write(kept: Checkpoints, step: int) -> Path:
    folder = kept.folder() / tag(step)
    folder.mkdir(parents=True)
    for name in ("weights", "progress.json"):
        (folder / name).write_text(f"{name} after {step}")
    return folder


def test_the_newest_complete_one_comes_back_and_older_ones_go(store):
    kept = Checkpoints(store, REF)
    for step in (4, 12):
        kept.save(step, write(kept, step))
    unfinished = write(kept, 20)
    kept.publish([unfinished / "weights"])
    folder = kept.latest()
    assert folder is not None and folder.name == "step-000012"
    assert (folder / "weights").read_text() == "weights after 12"
    assert not [name for name in store.published(REF) if "step-000004" in name]


def test_nothing_complete_is_nothing(store):
    kept = Checkpoints(store, REF)
    kept.publish([write(kept, 4) / "weights"])
    assert kept.latest() is None


def test_a_complete_one_that_lost_a_file_is_refused(store):
    kept = Checkpoints(store, REF)
    kept.save(4, write(kept, 4))
    store.discard(REF, "checkpoints/step-000004/weights")
    with pytest.raises(IntegrityError, match=r"weights.*is gone"):
        kept.latest()
