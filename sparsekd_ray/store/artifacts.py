"""Artifacts on local disk or S3, shared by every run that sees the same root.

An artifact is the directory ``<root>/artifacts/<kind>/<name>-<fingerprint>/``. It exists once its ``record.json``
exists. The record lists every file with its size and sha256. It is written last, so a build that was killed leaves no
record and is done again. A long build keeps its finished files: ``publish`` stores a file, and then a promise of its
size and sha256 in ``.published/``. The next attempt, on any machine, gets the file back with ``pull``. Every process
verifies a file when it first uses it.

A local artifact is built and used in its place. An S3 artifact is built and used in a scratch directory, which is only
a cache.

    store = Store("s3://bucket/sparsekd")
    with store.building(ref) as out:
        metrics = stage(store.fetch(corpus), out)
    store.commit(ref, identity=settings, inputs={"corpus": corpus.key}, metrics=metrics, seconds=12.5)
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from sparsekd_ray.errors import IntegrityError, StoreError
from sparsekd_ray.store import version
from sparsekd_ray.store.files import Files, disk_full
from sparsekd_ray.store.lease import Lease, hold
from sparsekd_ray.store.record import Record, Ref, StoredFile, installed_versions, parse_object

RECORD = "record.json"
PROMISES = ".published"
CHECKPOINTS = "checkpoints"  # working state of a build, deleted once the record is written

_hashes: dict[tuple[int, int, int, int], str] = {}


class Store(Files):
    """Artifacts, and through ``Files`` the files of runs, under one root: ``Store(root, scratch=None)``.

    Raises StoreError if the store cannot be reached or written, and IntegrityError if a file is not what was stored.
    An IntegrityError names the file, what was expected and found, and what to remove to have it built again.
    """

    def check_version(self) -> None:
        """StoreError, within seconds, if the store does not answer or was written by another version."""
        version.check(self)

    def record(self, ref: Ref) -> Record | None:
        """The artifact's record; None if the artifact does not exist."""
        key = f"{ref.key}/{RECORD}"
        text = self.read_bytes(key)
        if text is None:
            return None
        try:
            return Record.from_json(text, ref)
        except ValueError as error:
            raise self._corrupt(key, str(error), remove=ref.key) from None

    def fetch(self, ref: Ref, files: Sequence[str] | None = None) -> Path:
        """The artifact's directory on this machine, with all files (or those named) present and verified."""
        record = self.record(ref)
        if record is None:
            raise StoreError(
                f"{self.url(ref.key)} is not finished: no {RECORD}. Run the step that builds it."
            )
        with self._one_at_a_time(ref):
            return self._fetched(ref, record.files, files)

    @contextmanager
    def _one_at_a_time(self, ref: Ref) -> Iterator[None]:
        """The first process on a machine downloads an S3 artifact; the others wait and reuse its files."""
        if not self.remote:
            yield
            return
        with self.explaining(f"locking {ref.key} in scratch"):
            lock = FileLock(self.lock_path(ref.key))
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _fetched(self, ref: Ref, listed: dict[str, StoredFile], files: Sequence[str] | None) -> Path:
        if unknown := sorted(set(files or ()) - set(listed)):
            some = ", ".join(sorted(listed)[:9])
            raise StoreError(f"{self.url(ref.key)} holds no {unknown[0]}. It holds {some} …")
        for relative in listed if files is None else files:
            self._obtain(f"{ref.key}/{relative}", listed[relative], remove=ref.key)
        if files is None:  # stages read whole directories, so they would use files that no record lists
            for relative in sorted(set(_outputs(self.local(ref.key))) - set(listed)):
                key = f"{ref.key}/{relative}"
                if not self.remote:
                    raise self._corrupt(key, "the record does not list it", remove=key)
                self.local(key).unlink()
        return self.local(ref.key)

    def workdir(self, ref: Ref) -> Path:
        """The directory where the artifact is built: its final place on local disk, scratch for S3."""
        with self.explaining(f"making the directory of {ref.key}"):
            self.local(ref.key).mkdir(parents=True, exist_ok=True)
        return self.local(ref.key)

    @contextmanager
    def building(self, ref: Ref) -> Iterator[Path]:
        """``workdir`` for a stage to write into. A full disk becomes a StoreError, whichever library reports it."""
        try:
            yield self.workdir(ref)
        except Exception as error:
            if not disk_full(error):  # torch, safetensors and Ray report it by types of their own
                raise
            raise self.failure(f"building {ref.key}", error) from error

    def publish(self, ref: Ref, relative: str) -> StoredFile:
        """Keeps a finished file of ``workdir`` for later attempts and other machines; returns its description.

        A published file must not change: ``discard`` it before writing it anew.
        """
        promise, file = _promise(ref, relative), describe(self.workdir(ref) / relative)
        self.delete(promise)  # after a kill before the new promise, the file counts as unfinished
        self.upload(f"{ref.key}/{relative}")
        self.write_text(promise, json.dumps(asdict(file)))
        return file

    @contextmanager
    def publishing(self, ref: Ref, relative: str) -> Iterator[Path]:
        """A temporary path for a stage to write to. At the block's end it becomes the published file ``relative``."""
        with self.building(ref) as folder:
            path = folder / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
            yield temporary
            temporary.replace(path)  # the file appears whole or not at all
            self.publish(ref, relative)

    def pull(self, ref: Ref, relative: str) -> Path | None:
        """A published file of an unfinished artifact, verified, in ``workdir``; None if it is not published."""
        promise = _promise(ref, relative)
        file = self._promised(promise)
        return self._obtain(f"{ref.key}/{relative}", file, remove=promise) if file else None

    def published(self, ref: Ref, folder: str = "") -> list[str]:
        """The published files of an unfinished artifact, at or below ``folder``, relative to the artifact."""
        top = f"{ref.key}/{PROMISES}/"
        promises = self.list_keys(f"{top}{folder}".rstrip("/"))
        return sorted(key.removeprefix(top).removesuffix(".json") for key in promises)

    def discard(self, ref: Ref, relative: str) -> None:
        """Deletes a file or folder of an unfinished artifact, promises first: a half-deleted file is unfinished."""
        for key in (_promise(ref, relative), f"{ref.key}/{PROMISES}/{relative}", f"{ref.key}/{relative}"):
            self.delete(key)

    def commit(
        self,
        ref: Ref,
        *,
        identity: dict[str, Any],
        inputs: dict[str, str],
        metrics: dict[str, Any],
        seconds: float,
    ) -> Record:
        """Makes the artifact exist: stores the files that are not stored yet, then writes and returns the record.

        The record lists the published files, wherever they were made, and all other files of ``workdir``. It leaves
        out dot names, ``*.tmp`` (removed) and ``checkpoints/`` (removed once the record is written).
        """
        work, files = self.workdir(ref), self._promises(ref)
        for stray in work.rglob("*.tmp"):
            stray.unlink()
        for relative in sorted(set(_outputs(work)) - set(files)):
            files[relative] = describe(work / relative)
            self.upload(f"{ref.key}/{relative}")
        assert files, f"{ref} was committed without a file"
        record = Record(
            ref=ref,
            identity=identity,
            inputs=inputs,
            metrics=metrics,
            files=files,
            versions=installed_versions(),
            created=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            seconds=seconds,
        )
        text = record.to_json()
        record = Record.from_json(text, ref)  # the caller gets the record as later runs read it
        version.stamp(self)
        self.write_text(f"{ref.key}/{RECORD}", text)
        # A kill after this line leaves files that no record lists. They cost disk space and are never read.
        self.delete(f"{ref.key}/{PROMISES}")
        self.delete(f"{ref.key}/{CHECKPOINTS}")
        return record

    def lease(self, key: str, holder: str, *, ttl: float = 60.0) -> AbstractContextManager[Lease]:
        """Holds ``key`` alone; StoreError if a live process holds it. A lease ends after ``ttl`` seconds of silence."""
        return hold(self, f"{key}.lease", holder, ttl)

    def _promises(self, ref: Ref) -> dict[str, StoredFile]:
        """The published files that a record will list. Local files are verified. Files on S3 were promised after
        their upload, perhaps by other machines, so they are not downloaded again."""
        files: dict[str, StoredFile] = {}
        for relative in self.published(ref):
            promise = _promise(ref, relative)
            if not relative.startswith(f"{CHECKPOINTS}/") and (file := self._promised(promise)):
                if not self.remote:
                    self._obtain(f"{ref.key}/{relative}", file, remove=promise)
                files[relative] = file
        return files

    def _promised(self, key: str) -> StoredFile | None:
        text = self.read_bytes(key)
        if text is None:
            return None
        try:
            return StoredFile(**parse_object(text))
        except TypeError:
            raise self._corrupt(key, "it is not a size and a sha256", remove=key) from None

    def _obtain(self, key: str, expected: StoredFile, remove: str) -> Path:
        """A file on this machine, verified. A wrong scratch copy is downloaded again, since scratch is only a cache.
        A wrong stored file is an IntegrityError."""
        path = self.local(key)
        wrong = _mismatch(path, expected)
        if wrong and self.remote:
            with self.download(key) as temporary:
                if not (wrong := _mismatch(temporary, expected)):
                    os.replace(temporary, path)
        if wrong:
            recorded = f"recorded are {expected.size} bytes, sha256 {expected.sha256}"
            raise self._corrupt(key, f"{wrong}; {recorded}", remove)
        return path

    def _corrupt(self, key: str, fault: str, remove: str) -> IntegrityError:
        return IntegrityError(
            f"{self.url(key)} is not what was stored: {fault}. It was not used, and nothing was rebuilt. "
            f"Remove {self.url(remove)} to have it built again."
        )


def locate(artifact: str, scratch: str | None = None) -> tuple[Store, Ref]:
    """The store and the Ref of an artifact from its directory or URL. Raises ConfigError for any other path."""
    remote = artifact.startswith("s3://")
    root, separator, rest = (artifact if remote else str(Path(artifact).absolute())).rpartition("/artifacts/")
    ref = Ref.from_key(f"artifacts/{rest}" if separator else artifact)
    store = Store(root, scratch)
    store.check_version()
    return store, ref


def describe(path: Path) -> StoredFile:
    """Size and sha256 of a file. A process reads a file once, unless inode, size or modification time change."""
    stat = path.stat()
    known = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if known not in _hashes:
        with path.open("rb") as file:
            _hashes[known] = hashlib.file_digest(file, "sha256").hexdigest()
    return StoredFile(stat.st_size, _hashes[known])


def _mismatch(path: Path, expected: StoredFile) -> str | None:
    """What is wrong with a file, in words; None if it is as promised."""
    if not path.is_file():
        return "the file is missing"
    if (size := path.stat().st_size) != expected.size:
        return f"found {size} bytes"
    actual = describe(path)
    return None if actual == expected else f"found {size} bytes, sha256 {actual.sha256}"


def _promise(ref: Ref, relative: str) -> str:
    return f"{ref.key}/{PROMISES}/{relative}.json"


def _outputs(folder: Path) -> list[str]:
    """The files that make up an artifact, relative to its directory."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    working = (RECORD, CHECKPOINTS)
    return [
        p.as_posix() for p in paths if p.parts[0] not in working and not any(n[0] == "." for n in p.parts)
    ]
