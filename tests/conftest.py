"""Fixtures that several test files share."""

import os
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.s3_server import S3Server, running
from benchmarks.s3_server import serve_s3 as serve_s3  # for checks that run outside pytest


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server with one bucket; the environment of this session points to it and holds its credentials."""
    with (
        running(tmp_path_factory.mktemp("s3") / "served") as server,
        pytest.MonkeyPatch.context() as environment,
    ):
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            environment.delenv(name, raising=False)
        for name, value in server.environment.items():
            environment.setenv(name, value)
        yield server


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
