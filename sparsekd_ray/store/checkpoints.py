"""Checkpoints of an artifact that is being built, in the store: `checkpoints/step-000080/`, whole or not at all.

A checkpoint exists once its `complete.json` is published. This file lists all files of the checkpoint and is published
last. The files and their checksums are verified when the checkpoint is fetched. The artifact's commit deletes all
checkpoints.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from sparsekd_ray.errors import IntegrityError
from sparsekd_ray.store import Ref, Store

FOLDER = "checkpoints"
COMPLETE = "complete.json"


def tag(step: int) -> str:
    return f"step-{step:06d}"


class Checkpoints:
    """The checkpoints of the artifact `ref`."""

    def __init__(self, store: Store, ref: Ref) -> None:
        self.store, self.ref = store, ref

    def folder(self) -> Path:
        """Where a stage writes its checkpoints before it publishes them."""
        return self.store.workdir(self.ref) / FOLDER

    def publish(self, files: list[Path]) -> None:
        """Publishes single files of a checkpoint's folder."""
        for path in files:
            self.store.publish(self.ref, f"{FOLDER}/{path.parent.name}/{path.name}")

    def complete(self, name: str) -> None:
        """Makes the checkpoint exist, once all its files are published, and deletes older checkpoints."""
        listing = self.folder() / name / COMPLETE
        listing.write_text(json.dumps(self.store.published(self.ref, f"{FOLDER}/{name}")))
        self.publish([listing])
        names = {path.split("/")[1] for path in self.store.published(self.ref, FOLDER)}
        for older in sorted(other for other in names if other < name):
            self.store.discard(self.ref, f"{FOLDER}/{older}")

    def save(self, step: int, folder: Path) -> None:
        """Publishes a complete folder that one process wrote."""
        assert folder.name == tag(step)
        self.publish(sorted(folder.iterdir()))
        self.complete(folder.name)

    def newest(self) -> str | None:
        """Tag of the newest complete checkpoint."""
        names = self.store.published(self.ref, FOLDER)
        return max((n.split("/")[1] for n in names if n.endswith(f"/{COMPLETE}")), default=None)

    def discard_all(self) -> None:
        """Deletes every checkpoint. `complete.json` goes first, so a half-deleted checkpoint does not exist."""
        for published in self.store.published(self.ref, FOLDER):
            if published.endswith(f"/{COMPLETE}"):
                self.store.discard(self.ref, published)
        self.store.discard(self.ref, FOLDER)

    def forget(self, before: int | None = None) -> None:
        """Deletes this machine's scratch copies of the checkpoints before a step, or of all checkpoints."""
        if self.store.remote and self.folder().is_dir():
            for folder in self.folder().iterdir():
                if before is None or folder.name < tag(before):
                    shutil.rmtree(
                        folder, ignore_errors=True
                    )  # another worker of this machine may delete it too

    def fetch(self, name: str, only: str | None = None) -> Path:
        """The folder of a complete checkpoint, with every file (or the one named `only`) present and verified."""
        top = f"{FOLDER}/{name}"
        listing = self.store.pull(self.ref, f"{top}/{COMPLETE}")
        assert listing is not None, f"{name} is complete"
        for relative in [f"{top}/{only}"] if only else json.loads(listing.read_text()):
            if self.store.pull(self.ref, relative) is None:
                raise IntegrityError(
                    f"{self.store.url(self.ref.key)}/{relative} belongs to a complete checkpoint and is gone. "
                    f"Remove {self.store.url(self.ref.key)} to start this step again."
                )
        return self.folder() / name

    def latest(self) -> Path | None:
        newest = self.newest()
        return None if newest is None else self.fetch(newest)
