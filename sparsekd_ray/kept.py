"""Checkpoints of an artifact in the making, kept in the store: `checkpoints/step-000080/`, whole or not at all.

A checkpoint exists once its `progress.json` is published, which is done last; every file's checksum is verified when
it comes back. The artifact's commit deletes them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from sparsekd_ray.store import Ref, Store

FOLDER = "checkpoints"
PROGRESS = "progress.json"


def tag(step: int) -> str:
    return f"step-{step:06d}"


class Kept:
    """The checkpoints of the artifact `ref`."""

    def __init__(self, store: Store, ref: Ref) -> None:
        self.store, self.ref = store, ref

    def folder(self) -> Path:
        """Where a stage writes its checkpoints before it hands them over."""
        return self.store.workdir(self.ref) / FOLDER

    def publish(self, files: list[Path]) -> None:
        """Takes over single files of a checkpoint's folder."""
        for path in files:
            self.store.publish(self.ref, f"{FOLDER}/{path.parent.name}/{path.name}")

    def save(self, step: int, folder: Path) -> None:
        """Takes over a complete folder and drops the ones before it."""
        self.publish(sorted(path for path in folder.iterdir() if path.name != PROGRESS))
        self.publish([folder / PROGRESS])
        self.drop_before(step)

    def drop_before(self, step: int) -> None:
        names = {name.split("/")[1] for name in self.store.published(self.ref, FOLDER)}
        for older in sorted(name for name in names if name < tag(step)):
            self.store.discard(self.ref, f"{FOLDER}/{older}")

    def newest(self) -> str | None:
        """Tag of the newest complete checkpoint."""
        names = self.store.published(self.ref, FOLDER)
        return max((n.split("/")[1] for n in names if n.endswith(f"/{PROGRESS}")), default=None)

    def progress(self, name: str) -> Path:
        """The `progress.json` of a complete checkpoint, verified."""
        path = self.store.pull(self.ref, f"{FOLDER}/{name}/{PROGRESS}")
        assert path is not None, f"{name} is complete"
        return path

    def discard_all(self) -> None:
        self.store.discard(self.ref, FOLDER)

    def forget(self, before: int | None = None) -> None:
        """Frees this machine's copies, of checkpoints before a step or of all, once the store needs them no more."""
        if self.store.remote and self.folder().is_dir():
            for folder in self.folder().iterdir():
                if before is None or folder.name < tag(before):
                    shutil.rmtree(folder, ignore_errors=True)  # another worker of this machine may be first

    def fetch(self, name: str) -> Path:
        """The folder of a complete checkpoint, every file verified."""
        for published in self.store.published(self.ref, f"{FOLDER}/{name}"):
            self.store.pull(self.ref, published)
        return self.folder() / name

    def latest(self) -> Path | None:
        newest = self.newest()
        return None if newest is None else self.fetch(newest)
