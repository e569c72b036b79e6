"""The store on local disk and on a real S3 server: what exists, what is refused, and what survives."""

import hashlib
import http.client
import http.server
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from lines import recorded

from benchmarks.s3_server import S3Server
from sparsekd_ray.errors import ConfigError, IntegrityError, StoreError
from sparsekd_ray.store import Record, Ref, Store, files, locate, s3, version
from sparsekd_ray.store.artifacts import _promise
from sparsekd_ray.store.record import StoredFile

REF = Ref("cache", "dense", "0123abcd")
ALTERED = hashlib.sha256(b"0123456780").hexdigest()
ABOUT = {"identity": {"k": 32}, "inputs": {"corpus": "77ff"}, "metrics": {"tokens": 12}, "seconds": 1.5}


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store(str(tmp_path / "store"))
    server = request.getfixturevalue("s3_server")
    return Store(f"s3://{server.bucket}/{uuid.uuid4().hex}", scratch=str(tmp_path / "scratch"))


def elsewhere(store: Store) -> Store:
    """The same store seen from a machine with an empty disk."""
    return Store(
        store.root, scratch=str(Path(store.scratch).with_name(uuid.uuid4().hex)) if store.scratch else None
    )


def build(store: Store, ref: Ref = REF, contents: bytes = b"0123456789") -> Record:
    with store.building(ref) as out:
        (out / "train").mkdir(exist_ok=True)
        (out / "train" / "00000.parquet").write_bytes(contents)
        (out / "manifest.json").write_text("{}")
    return store.commit(ref, **ABOUT)


# Artifacts.


def test_artifact_exists_once_recorded_and_reads_the_same_everywhere(store: Store) -> None:
    assert store.record(REF) is None
    with pytest.raises(StoreError, match="not finished"):
        store.fetch(REF)
    with store.building(REF) as out:
        for name in ("checkpoints/step-1/model.bin", ".hidden", "half.parquet.tmp", "nested/.cache/x"):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text("not a result")
    record = build(store)
    assert sorted(record.files) == ["manifest.json", "train/00000.parquet"]
    assert record.files["train/00000.parquet"] == StoredFile(
        10, "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882"
    )
    assert {key: getattr(record, key) for key in ABOUT} == ABOUT
    assert record.ref == REF
    assert set(record.versions) == {"python", "sparsekd_ray", "torch", "transformers", "ray", "deepspeed"}
    for view in (store, elsewhere(store)):
        for _ in range(2):
            directory = view.fetch(REF)
            assert (directory / "train" / "00000.parquet").read_bytes() == b"0123456789"
        assert view.record(REF) == record
    assert not store.list_keys(f"{REF.key}/checkpoints") and not (store.workdir(REF) / "checkpoints").exists()
    assert not list(store.workdir(REF).rglob("*.tmp"))


def test_named_files_are_fetched_alone(store: Store) -> None:
    build(store)
    other = elsewhere(store)
    directory = other.fetch(REF, ["manifest.json"])
    assert (directory / "manifest.json").exists()
    assert (directory / "train").exists() is not store.remote
    with pytest.raises(StoreError, match=r"holds no nothing\.txt.*manifest\.json"):
        other.fetch(REF, ["nothing.txt"])


def test_failure_between_upload_and_record_leaves_no_artifact(store: Store) -> None:
    with store.building(REF) as out:
        (out / "a.txt").write_text("a")
    with pytest.raises(
        TypeError
    ):  # a record that cannot be written as JSON: everything before it has happened
        store.commit(REF, identity={}, inputs={}, metrics={"figure": object()}, seconds=0)
    assert store.list_keys(f"{REF.key}/a.txt") and store.record(REF) is None
    build(store)
    assert sorted(elsewhere(store).record(REF).files) == ["a.txt", "manifest.json", "train/00000.parquet"]


def damage(store: Store, how: str) -> None:
    key = f"{REF.key}/train/00000.parquet"
    if how == "missing":
        elsewhere(store).delete(key)  # leaves the builder's own scratch copy
    else:
        store.write_bytes(key, {"altered": b"0123456780", "truncated": b"01234"}[how])


@pytest.mark.parametrize("how", ["altered", "truncated", "missing"])
def test_damage_is_named_and_never_used_nor_rebuilt(store: Store, how: str) -> None:
    build(store)
    damage(store, how)
    other = elsewhere(store)
    for _ in range(2):
        with pytest.raises(IntegrityError) as caught:
            other.fetch(REF)
        found = {"altered": f"sha256 {ALTERED}", "truncated": "found 5 bytes", "missing": "missing"}[how]
        for words in (
            f"{store.root}/{REF.key}/train/00000.parquet",
            found,
            "10 bytes, sha256 84d8",
            "Remove",
        ):
            assert words in str(caught.value), caught.value
    assert (other.fetch(REF, ["manifest.json"]) / "manifest.json").read_text() == "{}"
    pickle.loads(pickle.dumps(caught.value))  # Ray carries it
    store.delete(REF.key)  # what the message says
    build(store)
    assert (other.fetch(REF) / "train" / "00000.parquet").read_bytes() == b"0123456789"


def test_files_are_verified_once_per_process(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    build(store)
    shard = store.fetch(REF) / "train" / "00000.parquet"
    before = shard.stat()
    with shard.open("r+b") as file:
        file.write(b"X")
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    store.fetch(REF)  # same inode, size and time: not read again
    script = "Store(sys.argv[1]).fetch(Ref('cache', 'dense', '0123abcd'))"
    process = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; from sparsekd_ray.store import Ref, Store; {script}",
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
    )
    assert process.returncode and "IntegrityError" in process.stderr and "00000.parquet" in process.stderr


def test_scratch_is_only_a_cache(s3_server: S3Server, tmp_path: Path) -> None:
    store = Store(f"s3://{s3_server.bucket}/{uuid.uuid4().hex}", scratch=str(tmp_path))
    build(store)
    directory = store.fetch(REF)
    (directory / "train" / "00000.parquet").write_bytes(b"012")
    (directory / "train" / "00001.parquet").write_bytes(b"of a build that was killed")
    assert [path.name for path in store.fetch(REF).rglob("*.parquet")] == ["00000.parquet"]
    assert (directory / "train" / "00000.parquet").read_bytes() == b"0123456789"


def test_a_file_that_nobody_recorded_is_not_used(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    build(store)
    (store.workdir(REF) / "train" / "00001.parquet").write_bytes(b"by hand")
    with pytest.raises(IntegrityError, match=r"00001\.parquet.*does not list it"):
        store.fetch(REF)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"kind": "cache"}',
        '{"kind": "cache", "name": "dense", "fingerprint": "other", "files": {}}',
    ]
    + [
        json.dumps({"kind": "cache", "name": "dense", "fingerprint": "0123abcd", "files": {path: fact}})
        for path, fact in (
            ("../../x", {"size": 1, "sha256": ""}),
            ("/x", {"size": 1, "sha256": ""}),
            ("x", {}),
        )
    ],
)
def test_damaged_record_is_an_error(tmp_path: Path, text: str) -> None:
    store = Store(str(tmp_path))
    store.write_text(f"{REF.key}/record.json", text)
    with pytest.raises(IntegrityError, match=r"record\.json"):
        store.fetch(REF)


def test_a_store_says_its_version(store: Store) -> None:
    store.check_version()
    assert store.list_keys("") == [], "nothing is written before the first artifact"
    build(store)
    assert json.loads(store.read_text("store.json") or "") == {"format": version.FORMAT}
    elsewhere(store).check_version()


@pytest.mark.parametrize("text", [None, '{"format": 1}', '{"format": 99}', "[]"])
def test_a_store_of_another_version_is_refused_in_one_line(store: Store, text: str | None) -> None:
    build(store)
    store.delete("store.json")
    if text is not None:
        store.write_text("store.json", text)
    before = {key: store.read_bytes(key) for key in store.list_keys("")}
    for attempt in (store.check_version, lambda: locate(store.url(REF.key), store.scratch)):
        with pytest.raises(StoreError, match=r"has format .*Give another --execution\.store") as caught:
            attempt()
    assert len(str(caught.value).splitlines()) == 1 and store.root in str(caught.value)
    assert {key: store.read_bytes(key) for key in store.list_keys("")} == before


def test_a_build_that_was_killed_in_a_new_store_is_no_old_version(store: Store) -> None:
    (store.workdir(REF) / "shard").write_text("x")
    store.publish(REF, "shard")
    elsewhere(store).check_version()


# What a build keeps before it is finished.


def test_any_changed_byte_of_a_record_is_an_error(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    build(store)
    path = tmp_path / REF.key / "record.json"
    intact = path.read_bytes()
    for position in range(len(intact)):
        if not intact[position : position + 1].isspace():  # layout is not content
            path.write_bytes(intact[:position] + bytes([intact[position] ^ 1]) + intact[position + 1 :])
            with pytest.raises(IntegrityError, match=r"record\.json"):
                store.record(REF)


def test_published_files_are_pulled_by_the_next_attempt(store: Store) -> None:
    out = store.workdir(REF)
    for name in (
        "00000.parquet",
        "00001.parquet",
        "checkpoints/step-1/model.bin",
        "checkpoints/step-2/model.bin",
    ):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(name)
    file = store.publish(REF, "00000.parquet")  # 00001 is written but was never finished
    assert file.size == len("00000.parquet")
    for step in ("step-1", "step-2"):
        store.publish(REF, f"checkpoints/{step}/model.bin")

    resumed = elsewhere(store)
    assert resumed.record(REF) is None
    assert resumed.published(REF, "checkpoints") == [f"checkpoints/step-{n}/model.bin" for n in (1, 2)]
    assert resumed.pull(REF, "00000.parquet").read_text() == "00000.parquet"
    assert resumed.pull(REF, "00001.parquet") is None
    assert resumed.pull(REF, "checkpoints/step-2/model.bin").read_text() == "checkpoints/step-2/model.bin"
    resumed.discard(REF, "checkpoints/step-1")
    assert resumed.published(REF) == ["00000.parquet", "checkpoints/step-2/model.bin"]
    assert resumed.pull(REF, "checkpoints/step-1/model.bin") is None
    assert not resumed.list_keys(f"{REF.key}/checkpoints/step-1")


def test_record_lists_what_other_machines_published(store: Store) -> None:
    worker = elsewhere(store)
    for name in ("00000.parquet", "checkpoints/step-1.bin"):
        path = worker.workdir(REF) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
        worker.publish(REF, name)
    if store.remote:  # the driver's disk may hold half of an earlier attempt's shard
        (store.workdir(REF) / "00000.parquet").write_text("half")
    (store.workdir(REF) / "manifest.json").write_text("{}")
    assert sorted(store.commit(REF, **ABOUT).files) == ["00000.parquet", "manifest.json"]
    for view in (store, elsewhere(store)):
        assert (view.fetch(REF) / "00000.parquet").read_text() == "00000.parquet"
    assert sorted(store.list_keys(REF.key)) == [
        f"{REF.key}/{name}" for name in ("00000.parquet", "manifest.json", "record.json")
    ]


def test_published_file_that_changed_is_an_error(store: Store) -> None:
    (store.workdir(REF) / "train").mkdir()
    (store.workdir(REF) / "train" / "00000.parquet").write_bytes(b"0123456789")
    store.publish(REF, "train/00000.parquet")
    damage(store, "truncated")
    other = elsewhere(store)
    with pytest.raises(IntegrityError, match=r"00000\.parquet.*found 5 bytes.*recorded are 10"):
        other.pull(REF, "train/00000.parquet")
    if not store.remote:
        with pytest.raises(IntegrityError, match="found 5 bytes"):
            store.commit(REF, **ABOUT)
    other.discard(REF, "train/00000.parquet")
    assert other.pull(REF, "train/00000.parquet") is None
    build(other)
    assert store.fetch(REF)


def test_publishing_anew_and_failing_half_way_is_not_finished(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    shard = store.workdir(REF) / "shard"
    shard.write_text("old")
    store.publish(REF, "shard")
    shard.write_text("newer")
    files._temporary(store.local(_promise(REF, "shard"))).symlink_to("/dev/full")
    with pytest.raises(StoreError, match="no space left"):
        store.publish(REF, "shard")
    assert store.pull(REF, "shard") is None
    store.publish(REF, "shard")
    assert store.pull(REF, "shard").read_text() == "newer"


# Roots, credentials, and everything that cannot be reached.


def test_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for root in ("~/store", "store", f"file://{tmp_path}/store", f"{tmp_path}/store/"):
        assert Store(root).root == f"{tmp_path}/store"
    assert Store("s3://bucket/a/b/").root == "s3://bucket/a/b"
    assert Store("s3://bucket/a").workdir(REF) == tmp_path / ".cache/sparsekd-ray/bucket/a" / REF.key


@pytest.mark.parametrize(
    "root",
    [
        "",
        "file://",
        "s3://",
        "gs://bucket",
        "s3://key:hunter2@bucket/x",
        "s3://key:hunt/er2@bucket",
        "s3://key:hunter2",
        "s3://bucket?secret=hunter2",
        "https://key:hunter2@host/bucket",
    ],
)
def test_refused_roots_are_not_quoted(root: str) -> None:
    with pytest.raises(ConfigError, match="s3://bucket/prefix") as caught:
        Store(root)
    assert "hunt" not in str(caught.value)
    assert ("credentials" in str(caught.value)) == ("@" in root)


@pytest.mark.parametrize("name", ["Qwen/Qwen3", "..", "", ".hidden", "a b", "é"])
def test_names_stay_inside_their_directory(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be part of"):
        Ref("model", name, "00")


def test_check_passes_and_leaves_nothing(store: Store) -> None:
    store.check()
    assert store.list_keys("") == []


def silent_endpoint() -> tuple[socket.socket, str]:
    """A port that accepts and never says a word."""
    listener = socket.create_server(("127.0.0.1", 0))
    return listener, f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "not-the-secret-key"}, "refused the credentials"),
        ({"AWS_ACCESS_KEY_ID": "not-the-access-key"}, "refused the credentials"),
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "no usable AWS credentials"),
        ({"AWS_PROFILE": "no-such-profile"}, "no usable AWS credentials"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "http://127.0.0.1:9 does not answer"),
        ({"AWS_ENDPOINT_URL": "silent"}, "does not answer"),
        ({"bucket": "no-such-bucket"}, "no such bucket"),
    ],
)
def test_check_says_what_is_wrong(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None], found: str
) -> None:
    listener, endpoint = silent_endpoint()
    for name, value in changes.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, endpoint if value == "silent" else value)
    started = time.monotonic()
    with listener, pytest.raises(StoreError, match=found) as caught:
        Store(f"s3://{changes.get('bucket', s3_server.bucket)}/x").check()
    assert time.monotonic() - started < 30
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    for secret in (s3_server.access_key, s3_server.secret_key, "not-the-secret-key", "not-the-access-key"):
        assert secret not in str(caught.value)


class Refuses(http.server.BaseHTTPRequestHandler):
    """An S3 server that answers every request with an error code."""

    answer: str

    def log_message(self, *_: object) -> None: ...

    def refuse(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = f"<?xml version='1.0'?><Error><Code>{self.answer}</Code><Message>no</Message></Error>".encode()
        self.send_response(400 if self.answer.startswith("Expired") else 403)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_DELETE = refuse


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Credentials for a server that a test names; new connections before and after."""
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN", *s3.PROXIES):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/dev/null")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "some-access-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "some-secret-key")
    return monkeypatch


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("ExpiredToken", "session token has expired .*Renew the credentials"),
        ("RequestTimeTooSkewed", "this machine's clock .*Set the clock"),
        ("InvalidAccessKeyId", "does not know the access key.*Check AWS_ACCESS_KEY_ID"),
        ("SignatureDoesNotMatch", "secret key does not belong to it.*AWS_SECRET_ACCESS_KEY"),
        ("PermanentRedirect", "another region.*AWS_REGION"),
        ("AccessDenied", "refused the credentials .*may list, read, write and delete"),
    ],
)
def test_advice_names_what_the_server_refused(aws: pytest.MonkeyPatch, answer: str, found: str) -> None:
    handler = type("Handler", (Refuses,), {"answer": answer})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    aws.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    try:
        with pytest.raises(StoreError, match=found):
            Store("s3://bucket/x").check()
    finally:
        server.shutdown()


@pytest.mark.parametrize("endpoint", ["minio:9000", "minio.example:9000", "http//minio", "://x"])
def test_an_endpoint_that_is_no_url_is_refused_in_words(aws: pytest.MonkeyPatch, endpoint: str) -> None:
    aws.setenv("AWS_ENDPOINT_URL", endpoint)
    files._filesystem.cache_clear()
    store = Store("s3://bucket/x")
    for attempt in (store.check, lambda: store.record(REF), lambda: store.write_text("a", "b")):
        with pytest.raises(StoreError, match=r"not the URL of a server.*http://host:port"):
            attempt()
    files._filesystem.cache_clear()


def test_advice_names_the_proxy(aws: pytest.MonkeyPatch) -> None:
    aws.setenv("AWS_ENDPOINT_URL", "http://minio.example:9000")
    aws.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match=r"does not answer.*through http_proxy.*no_proxy"):
        Store("s3://bucket/x").check()


def test_a_certificate_that_nobody_vouches_for_is_said() -> None:
    from botocore.exceptions import SSLError

    error = SSLError(endpoint_url="https://127.0.0.1", error="self-signed certificate")
    assert "certificate" in s3.explain(error)[0] and "AWS_CA_BUNDLE" in s3.explain(error)[1]


def test_users_of_one_machine_share_scratch_but_not_its_locks(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(f"s3://{s3_server.bucket}/{uuid.uuid4().hex}", scratch=str(tmp_path))
    build(store)
    mine = store.lock_path(REF.key)
    monkeypatch.setattr(os, "getuid", lambda: 4321)
    theirs = store.lock_path(REF.key)
    assert mine.parent != theirs.parent and mine.is_relative_to(tmp_path)
    assert store.fetch(REF)


def test_a_lock_that_cannot_be_made_is_said(s3_server: S3Server, tmp_path: Path) -> None:
    store = Store(f"s3://{s3_server.bucket}/{uuid.uuid4().hex}", scratch=str(tmp_path))
    build(store)
    store.lock_path(REF.key).mkdir()
    with pytest.raises(StoreError, match="Choose a directory that this user may create and write"):
        store.fetch(REF)


def test_root_below_a_regular_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store(str(tmp_path / "file" / "store"))
    for attempt in (store.check, lambda: store.record(REF), lambda: store.workdir(REF)):
        with pytest.raises(StoreError, match=r"Not a directory.*Choose a directory"):
            attempt()


def test_credentials_are_written_nowhere(s3_server: S3Server, tmp_path: Path) -> None:
    store = Store(f"s3://{s3_server.bucket}/{uuid.uuid4().hex}", scratch=str(tmp_path))
    (store.workdir(REF) / "shard").write_text("x")
    store.publish(REF, "shard")
    build(store)
    with store.lease("runs/demo", "demo"):
        written = store.read_text("runs/demo.lease")
        stored = [path for path in s3_server.directory.rglob("*") if path.is_file()]
        stored += [path for path in tmp_path.rglob("*") if path.is_file()]
        everything = b"".join(
            [path.read_bytes() for path in stored] + [pickle.dumps(store), repr(store).encode()]
        )
    assert "demo" in written and len(stored) > 6
    for secret in (s3_server.access_key, s3_server.secret_key):
        assert secret.encode() not in everything and secret not in written


def test_run_files_are_replaced_whole(store: Store) -> None:
    assert store.read_text("runs/demo/report.md") is None
    store.write_text("runs/demo/report.md", "é" * 10)
    store.write_bytes("runs/demo/report.md", b"short")
    assert store.read_text("runs/demo/report.md") == "short"
    assert store.list_keys("runs") == ["runs/demo/report.md"]
    assert pickle.loads(pickle.dumps(store)) == store and len(pickle.dumps(store)) < 400


def test_readers_never_meet_half_a_file(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write_bytes("summary.json", b"a" * 200_000)
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(
            lambda: [store.write_bytes("summary.json", letter * 200_000) for letter in [b"a", b"b"] * 20]
        )
        while not writing.done():
            seen = store.read_bytes("summary.json")
            assert len(seen) == 200_000 and len(set(seen)) == 1


# Full disks.


def test_device_without_space_leaves_the_old_file(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write_text("runs/plan.json", "old")
    files._temporary(store.local("runs/plan.json")).symlink_to("/dev/full")
    with pytest.raises(
        StoreError, match=r"writing runs/plan\.json.*no space left.*MiB free.*intact.*resubmit"
    ):
        store.write_text("runs/plan.json", "new")
    assert store.read_text("runs/plan.json") == "old"
    assert os.listdir(tmp_path / "runs") == ["plan.json"]


FULL_DISK = """
import subprocess, sys
from pathlib import Path
from benchmarks.s3_server import serve_s3
import os, test_store
from sparsekd_ray.errors import StoreError
from sparsekd_ray.store import Ref, Store

where, disk = sys.argv[1], Path(sys.argv[2])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=True)  # in this process's namespace
server = None
if where == "server":
    (disk / "bucket").mkdir()
    server, os.environ["AWS_ENDPOINT_URL"] = serve_s3(disk, "some-access-key", "some-secret-key")
    os.environ |= {"AWS_ACCESS_KEY_ID": "some-access-key", "AWS_SECRET_ACCESS_KEY": "some-secret-key"}
roots = {"server": ("s3://bucket/x", sys.argv[3]), "local": (str(disk), None), "library": (str(disk), None)}
store, big = Store(*roots[where]), Ref("model", "big", "00")
try:
    test_store.build(store)
    try:
        with store.building(big) as out:
            if where == "library":
                import safetensors.numpy, numpy
                safetensors.numpy.save_file({"w": numpy.zeros(10**6)}, out / "model.safetensors")
            (out / "model.bin").write_bytes(bytes(3 << 20))
        store.commit(big, **test_store.ABOUT)
    except StoreError as error:
        print(error)
    test_store.elsewhere(store).fetch(test_store.REF)
    print("intact" if store.record(big) is None else "recorded")
finally:
    if server:
        server.kill()
"""


@pytest.mark.parametrize("where", ["local", "library", "server"])
def test_full_disk_in_mid_write(where: str, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run(
        [*alone, "mount", "-t", "tmpfs", "tmpfs", tmp_path / "disk"], capture_output=True
    ).returncode:
        pytest.skip(
            "this machine forbids private mounts; test_device_without_space_leaves_the_old_file still runs"
        )
    arguments = [
        sys.executable,
        "-c",
        FULL_DISK,
        where,
        tmp_path / "disk",
        tmp_path / "scratch",
    ]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    process = subprocess.run([*alone, *arguments], env=paths, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    message, intact = process.stdout.splitlines()
    found = "disk is full" if where == "server" else "no space left on device"
    assert found in message and "Finished artifacts are intact" in message and "resubmit" in message
    assert intact == "intact"


# Leases.


class AsOnAws(http.server.BaseHTTPRequestHandler):
    """Passes S3 requests on to rclone, and honours If-None-Match, which rclone ignores."""

    server_to: S3Server
    lock = threading.Lock()

    def log_message(self, *_: object) -> None: ...

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.lock:
            if "If-None-Match" in self.headers and (self.server_to.directory / self.path[1:]).exists():
                status, reply = 412, b"<Error><Code>PreconditionFailed</Code></Error>"
            else:
                onward = http.client.HTTPConnection(self.server_to.endpoint.removeprefix("http://"))
                onward.request(self.command, self.path, body, dict(self.headers))
                answer = onward.getresponse()
                status, reply = answer.status, answer.read()
        self.send_response(status)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_request


@pytest.fixture
def conditional_store(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Store]:
    handler = type("Handler", (AsOnAws,), {"server_to": s3_server})
    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
    files._filesystem.cache_clear()
    yield Store(f"s3://{s3_server.bucket}/{uuid.uuid4().hex}", scratch=str(tmp_path))
    files._filesystem.cache_clear()
    proxy.shutdown()


def contend(store: Store) -> list[str]:
    """Four at once on one key: what became of each."""
    start, refusals = threading.Barrier(4), []

    def one(name: str) -> str:
        start.wait()
        try:
            with store.lease("runs/demo", name) as lease:
                until = time.monotonic() + 20
                while len(refusals) < 3 and time.monotonic() < until:
                    time.sleep(0.02)
                lease.ensure()
                return "held"
        except StoreError as error:
            refusals.append(error)
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        return sorted(pool.map(one, ["a", "b", "c", "d"]), key=len)


def assert_one_winner(outcomes: list[str]) -> None:
    assert outcomes[0] == "held"
    for refusal in outcomes[1:]:
        assert "is held by" in refusal and f"process {os.getpid()}" in refusal and "then resubmit" in refusal


def test_one_of_four_rivals_gets_the_lease(store: Store) -> None:
    assert_one_winner(contend(store))
    assert store.list_keys("runs") == []


def test_lease_where_the_server_honours_conditions(conditional_store: Store) -> None:
    assert conditional_store.create("key", b"1") and not conditional_store.create("key", b"2")
    assert conditional_store.read_bytes("key") == b"1"
    assert_one_winner(contend(conditional_store))


HOLDER = """
store = Store(sys.argv[1], scratch=sys.argv[2])
with store.lease("runs/demo", "first driver", ttl=float(sys.argv[3])) as lease:
    print("holding", flush=True)
    sys.stdin.readline()
    lease.ensure()
"""


def holder(store: Store, ttl: float) -> subprocess.Popen[str]:
    code = "import sys\nfrom sparsekd_ray.store import Store\n" + HOLDER
    process = subprocess.Popen(
        [sys.executable, "-c", code, store.root, store.scratch or "", str(ttl)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "holding\n", process.communicate()[1]
    return process


def test_killed_holder_is_followed_at_once(store: Store) -> None:
    process = holder(store, 60)
    with pytest.raises(StoreError, match=rf"held by first driver \(process {process.pid} on .* since 20"):
        store.lease("runs/demo", "second").__enter__()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # not reaped: a zombie is dead too
    started = time.monotonic()
    with store.lease("runs/demo", "second") as lease:
        assert time.monotonic() - started < 15
        lease.ensure()
    process.wait()


def test_stopped_holder_loses_its_lease_and_learns_it(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    process = holder(store, 1.0)
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.2)
    with recorded() as said, store.lease("runs/demo", "second", ttl=1.0) as lease:
        assert "first driver" in said[0]
        process.send_signal(signal.SIGCONT)
        errors = process.communicate("go\n")[1]
        assert process.returncode and "StoreError" in errors and "taken over" in errors and "second" in errors
        # The loser left without deleting the winner's lease.
        assert json.loads(store.read_text("runs/demo.lease"))["token"] == lease.body["token"]
    assert store.list_keys("runs") == []


@pytest.mark.parametrize("beats", [True, False])
def test_holder_on_another_machine_is_watched(tmp_path: Path, beats: bool) -> None:
    store = Store(str(tmp_path))
    with store.lease("runs/demo", "x"):
        body = json.loads(store.read_text("runs/demo.lease"))
    body.update(host="far", holder="far driver", heartbeat=0)
    store.write_text("runs/demo.lease", json.dumps(body))
    stop = threading.Event()

    def far_away() -> None:
        while not stop.wait(0.2) and json.loads(store.read_text("runs/demo.lease"))["holder"] == "far driver":
            body["heartbeat"] = time.time() - 3600  # its clock is an hour slow: only the movement counts
            store.write_text("runs/demo.lease", json.dumps(body))

    with ThreadPoolExecutor(1) as pool:
        pool.submit(far_away)
        time.sleep(0.5)
        if beats:
            with (
                pytest.raises(StoreError, match="held by far driver"),
                store.lease("runs/demo", "me", ttl=1.5),
            ):
                pass
        stop.set()
    with store.lease("runs/demo", "me", ttl=1.5) as lease:
        assert lease.body["holder"].startswith("me ")


def test_of_two_who_take_over_the_last_writer_holds(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with store.lease("runs/demo", "x"):
        body = json.loads(store.read_text("runs/demo.lease"))
    store.write_text("runs/demo.lease", json.dumps(body | {"started": 0}))  # its process is gone

    def rival() -> None:
        while not store.read_text("runs/demo.lease").count('"me '):
            time.sleep(0.01)
        store.write_text("runs/demo.lease", json.dumps(body | {"holder": "rival", "token": "of the rival"}))

    with ThreadPoolExecutor(1) as pool:
        pool.submit(rival)
        with pytest.raises(StoreError, match="held by rival"), store.lease("runs/demo", "me"):
            pass
