"""Files under one root, on local disk or S3, by key.

A key is a path relative to the root. A file is written whole or not at all, also if the process is killed. Failures
become a StoreError that says what was found and what to do.
"""

import errno
import functools
import hashlib
import os
import re
import shutil
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekd_ray.errors import ConfigError, StoreError
from sparsekd_ray.store import s3

# Words in the errors of torch, safetensors and Ray for a full disk. These errors carry no errno.
DISK_FULL = ("no space left on device", "disk quota exceeded", "pytorchstreamwriter failed", "unexpected pos")


@dataclass(frozen=True)
class Files:
    """Files below ``root``, a local directory or ``s3://bucket/prefix``; pickles as two strings."""

    root: str
    scratch: str | None = None  # local copies of an S3 root; by default ~/.cache/sparsekd-ray

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", _normal_root(self.root))

    @property
    def remote(self) -> bool:
        return self.root.startswith("s3://")

    def url(self, key: str) -> str:
        """The path or URL of a key, as a person would type it."""
        return f"{self.root}/{key}"

    def local(self, key: str) -> Path:
        """The path of a key on this machine: below a local root, or its scratch copy for S3."""
        if not self.remote:
            return Path(self.root, key)
        return self._scratch() / self.root.removeprefix("s3://") / key

    def lock_path(self, key: str) -> Path:
        """A lock file of this user. Users of a machine may share a scratch directory, but not their locks."""
        folder = self._scratch() / f".locks-{os.getuid()}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{hashlib.sha256(self.url(key).encode()).hexdigest()[:24]}.lock"

    def _scratch(self) -> Path:
        return Path(self.scratch or "~/.cache/sparsekd-ray").expanduser().absolute()

    def check(self) -> None:
        """Tries within seconds to write, list, read and delete a file. Raises StoreError if that fails."""
        probe = uuid.uuid4().hex
        path = self._path(f".check-{probe}")
        with self.explaining("trying to write, list, read and delete a file"):
            files = s3.client(hasty=True) if self.remote else self._files
            if not self.remote:
                os.makedirs(self.root, exist_ok=True)
            files.pipe_file(path, probe.encode())
            contents = files.find(path) and files.cat_file(path)
            files.rm_file(path)
            gone = not files.exists(path)
        if contents != probe.encode() or not gone:
            raise StoreError(
                f"Store {self.root} does not find a file just written, or finds one just deleted. "
                f"Use a server that shows every write at once, as AWS S3 does."
            )

    def list_keys(self, key: str) -> list[str]:
        """Every key at or below ``key``."""
        with self.explaining(f"listing {key}"):
            return [path.removeprefix(self._path("")) for path in self._files.find(self._path(key))]

    def read_bytes(self, key: str) -> bytes | None:
        with self.explaining(f"reading {key}"):
            try:
                return bytes(self._files.cat_file(self._path(key)))
            except FileNotFoundError:
                return None

    def read_hastily(self, key: str) -> bytes | None:
        """As `read_bytes`, but gives up on a silent server after about ten seconds instead of minutes."""
        with self.explaining(f"reading {key}"):
            files = s3.client(hasty=True) if self.remote else self._files
            try:
                return bytes(files.cat_file(self._path(key)))
            except FileNotFoundError:
                return None

    def read_text(self, key: str) -> str | None:
        data = self.read_bytes(key)
        return None if data is None else data.decode()

    def write_bytes(self, key: str, data: bytes) -> None:
        with self.explaining(f"writing {key}"):
            if self.remote:
                self._files.pipe_file(self._path(key), data)
            else:
                _replace(self.local(key), data)

    def write_text(self, key: str, text: str) -> None:
        self.write_bytes(key, text.encode())

    def create(self, key: str, data: bytes) -> bool:
        """Writes a file unless it exists. True: this process wrote the file. False: the file exists, or the server
        ignores the condition and overwrites (rclone). The caller then waits a moment and reads whose file it is."""
        with self.explaining(f"creating {key}"):
            if not self.remote:
                return _create(self.local(key), data)
            try:
                for _ in range(2):  # a server that accepts both writes ignores the condition
                    self._files.pipe_file(self._path(key), data, mode="create")
            except OSError as error:
                if s3.code(error) in ("PreconditionFailed", "ConditionalRequestConflict", "412", "409"):
                    return self.read_bytes(key) == data
                if s3.code(error) not in ("NotImplemented", "501"):
                    raise
                self.write_bytes(key, data)
            return False

    def delete(self, key: str) -> None:
        """Deletes the file ``key``, or all files below it, in the store and in scratch; no error if there is none."""
        with self.explaining(f"deleting {key}"):
            if self.remote and (keys := self.list_keys(key)):
                self._files.rm([self._path(doomed) for doomed in keys])
            local = self.local(key)
            shutil.rmtree(local) if local.is_dir() else local.unlink(missing_ok=True)

    def upload(self, key: str) -> None:
        """Uploads ``local(key)`` to S3. On local disk it is stored already."""
        if self.remote:
            with self.explaining(f"uploading {key}"):
                self._files.put_file(str(self.local(key)), self._path(key))

    @contextmanager
    def download(self, key: str) -> Iterator[Path]:
        """A temporary local copy of a stored file, to be verified and renamed. If there is no such file, no copy."""
        path = _temporary(self.local(key))
        try:
            with self.explaining(f"downloading {key}"), suppress(FileNotFoundError):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._files.get_file(self._path(key), str(path))
            yield path
        finally:
            path.unlink(missing_ok=True)

    @contextmanager
    def explaining(self, doing: str) -> Iterator[None]:
        """Turns an error of the file system into a StoreError without its cause, which may quote a key."""
        failures = s3.failures() if self.remote else (OSError,)
        try:
            yield
        except failures as error:
            raise self.failure(doing, error) from None

    def failure(self, doing: str, error: Exception) -> StoreError:
        """The error in words. A full disk is recognised whichever library reports it."""
        if disk_full(error):
            fault, advice = f"no space left on device, {_free(self.local(''))}", "Free space and resubmit."
        elif self.remote and not getattr(error, "filename", None):
            fault, advice = s3.explain(error)
        else:  # a file on this machine, scratch included
            where = getattr(error, "filename", None) or self.root
            fault = f"{getattr(error, 'strerror', None) or error} ({where})"
            advice = "Choose a directory that this user may create and write, or mend its rights."
        return StoreError(
            f"Store {self.root}: {doing} failed: {fault}. Finished artifacts are intact. {advice}"
        )

    @property
    def _files(self) -> Any:
        return _filesystem(self.remote, os.getpid())

    def _path(self, key: str) -> str:
        """A key as fsspec takes it: ``/absolute/path/key`` or ``bucket/prefix/key``."""
        return f"{self.root.removeprefix('s3://')}/{key}"


def disk_full(error: BaseException) -> bool:
    number = getattr(error, "errno", None)
    return number in (errno.ENOSPC, errno.EDQUOT) or any(words in str(error).lower() for words in DISK_FULL)


def _normal_root(root: str) -> str:
    """An absolute local path (Ray's workers have other working directories) or ``s3://bucket/prefix``. The error for a
    refused address does not quote it, because it may hold a secret."""
    scheme, _, rest = root.rpartition("://")
    if scheme in ("", "file") and rest:
        return os.path.abspath(os.path.expanduser(rest))
    if "@" in rest:
        raise ConfigError(
            "The store's root carries credentials (text before an @). Give s3://bucket/prefix alone, and give the "
            "credentials in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws, or the role of the machine."
        )
    if not re.fullmatch(r"s3://[A-Za-z0-9._-]+(/[^?#]*)?", root):
        raise ConfigError(
            "The store's root is neither a local directory nor s3://bucket/prefix. Give one of these."
        )
    return root.rstrip("/")


@functools.lru_cache
def _filesystem(remote: bool, process: int) -> Any:
    """The fsspec file system. Every process has its own, since connections do not survive a fork."""
    import fsspec  # takes a tenth of a second, which --help does not need

    return s3.client() if remote else fsspec.filesystem("file")


def _temporary(path: Path) -> Path:
    """A name beside ``path`` that no other thread, process or pod writes to."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}.tmp")


@contextmanager
def _written(path: Path, data: bytes) -> Iterator[Path]:
    """A temporary file beside ``path`` that holds the data. It is removed at the end if it is still there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _replace(path: Path, data: bytes) -> None:
    with _written(path, data) as temporary:
        os.replace(temporary, path)


def _create(path: Path, data: bytes) -> bool:
    """Creates the file by a hard link, so that it appears whole. A disk without hard links overwrites: False."""
    with _written(path, data) as temporary:
        try:
            os.link(temporary, path)
            return True
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            os.replace(temporary, path)
            return False


def _free(path: Path) -> str:
    while not path.exists():
        path = path.parent
    return f"{shutil.disk_usage(path).free / 2**20:,.1f} MiB free at {path}"
