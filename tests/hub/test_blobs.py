"""What every blob store must do, and how the local one keeps its promise when things break."""

import errno
import hashlib
import os
import resource
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest
from anyio import run
from starlette.testclient import TestClient

from hub.app import create_app
from hub.blobs import durable, s3
from hub.blobs.bucket import Bucket, make_client
from hub.blobs.files import TRASH_S, FileBlobStore
from hub.blobs.probe import Probe, probe
from hub.blobs.s3 import S3BlobStore, key_of
from hub.blobs.store import BlobStore, Sha256, lfs_pointer_oid
from hub.context import open_hub
from hub.errors import BadUpload, DigestMismatch, NoSpace, StoreFailed
from hub.repos import commits
from hub.repos import service as repos
from hub.repos.operations import Add
from hub.settings import Settings
from hub.users import service as users
from tests.fixtures.s3 import S3Server, serve_moto, serve_s3
from tests.fixtures.swift import serve_swift

# `printf 'hello' | git hash-object --stdin`, git 2.39.5
HELLO_GIT = "b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0"
HELLO = Sha256(hashlib.sha256(b"hello").hexdigest())


MiB = 2**20
# All of them take parts of this size, and moto and Swift none that are smaller.
PART_BYTES = 5 * MiB
SERVERS = {"moto": serve_moto, "rclone": serve_s3, "swift": serve_swift}
Make = Callable[[str], BlobStore]


@pytest.fixture(scope="module", params=["files", *SERVERS])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[S3Server | None]:
    """With a bucket, or None for local files."""
    if request.param == "files":
        yield None
        return
    with SERVERS[request.param](tmp_path_factory.mktemp("s3")) as server:
        server.make_bucket("bucket")
        yield server


@pytest.fixture(scope="module")
def client(server: S3Server | None) -> Any:
    """As a hub makes it, of that server."""
    if server is None:
        return None
    with pytest.MonkeyPatch.context() as environment:
        server.use(environment)
        return make_client(None, None)


@pytest.fixture
def make_store(client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """The store of a name, new at its first use in a test."""
    if client is None:
        return lambda name: FileBlobStore(tmp_path / name)
    monkeypatch.setattr(s3, "PART_BYTES", PART_BYTES)
    prefix = uuid.uuid4().hex
    return lambda name: S3BlobStore(
        Bucket(client, "bucket", f"{prefix}/{name}"), tmp_path / name, cache_bytes=MiB
    )


@pytest.fixture
def store(make_store: Make) -> BlobStore:
    return make_store("store")


async def stream(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


def everything_in(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# Any store


@pytest.mark.parametrize("size", [None, 5])
def test_stored_bytes_have_their_digest_and_git_object_id(
    store: BlobStore, size: int | None
) -> None:
    stored = store.put([b"hel", b"", b"lo"], size=size, expected=HELLO)
    assert (stored.sha256, stored.git_oid, stored.size) == (HELLO, HELLO_GIT, 5)
    assert b"".join(store.open(HELLO)) == b"hello"
    assert store.size(HELLO) == 5


@pytest.mark.parametrize("size", [None, 3_000_001])
def test_a_streamed_body_is_the_same_blob_as_a_put(store: BlobStore, size: int | None) -> None:
    content = os.urandom(3_000_001)
    pieces = [content[i : i + 65536] for i in range(0, len(content), 65536)]

    async def upload() -> Any:
        return await store.put_stream(stream(*pieces), size=size)

    assert run(upload) == store.put([content])


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [(0, None, b"hello"), (1, 3, b"el"), (4, 99, b"o"), (5, None, b""), (3, 3, b"")],
)
def test_ranges_are_half_open(
    store: BlobStore, start: int, end: int | None, expected: bytes
) -> None:
    store.put([b"hello"])
    assert b"".join(store.open(HELLO, start, end)) == expected


def test_an_empty_blob_is_a_blob(store: BlobStore) -> None:
    stored = store.put([])
    assert stored.git_oid == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"  # git's empty blob
    assert store.size(stored.sha256) == 0
    assert list(store.open(stored.sha256)) == []


def test_a_wrong_digest_is_refused_and_stores_nothing(store: BlobStore) -> None:
    with pytest.raises(DigestMismatch, match="send them again"):
        store.put([b"hellO"], expected=HELLO)
    assert store.size(HELLO) is None
    assert store.size(Sha256(hashlib.sha256(b"hellO").hexdigest())) is None


@pytest.mark.parametrize("announced", [4, 6])
def test_a_wrong_length_is_refused_and_stores_nothing(store: BlobStore, announced: int) -> None:
    with pytest.raises(BadUpload, match=f"announced {announced} bytes"):
        store.put([b"hello"], size=announced)
    assert store.size(HELLO) is None


def test_a_missing_blob_has_no_size_and_cannot_be_opened(store: BlobStore) -> None:
    assert store.size(HELLO) is None
    assert store.path(HELLO) is None
    with pytest.raises(FileNotFoundError):
        store.open(HELLO)
    store.delete(HELLO)


def test_a_deleted_blob_is_gone_and_can_come_back(store: BlobStore) -> None:
    store.put([b"hello"])
    store.delete(HELLO)
    assert store.size(HELLO) is None
    store.put([b"hello"])
    with store.local(HELLO) as path:
        assert path.read_bytes() == b"hello"


def test_an_adopted_file_is_moved_in(store: BlobStore, tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"hello")
    assert store.adopt(tmp_path / "out") == store.put([b"hello"])
    assert not (tmp_path / "out").exists()


def test_a_new_upload_repairs_a_damaged_blob(store: BlobStore) -> None:
    store.put([b"hello"])
    if isinstance(store, S3BlobStore):
        store.bucket.put(key_of(HELLO), b"")
    else:
        path = store.path(HELLO)
        assert path is not None
        path.chmod(0o600)
        path.write_bytes(b"")
    assert store.size(HELLO) == 0
    store.put([b"hello"])
    assert b"".join(store.open(HELLO)) == b"hello"


def test_a_store_keeps_its_identity(make_store: Make) -> None:
    first = make_store("store").id
    assert len(first) == 32
    assert make_store("store").id == first
    assert make_store("other").id != first


@pytest.mark.parametrize("announced", ["digest and size", "digest", "size", "nothing"])
def test_a_blob_of_several_parts_is_whole(store: BlobStore, announced: str) -> None:
    content = os.urandom(2 * PART_BYTES + 1234)
    sha256 = Sha256(hashlib.sha256(content).hexdigest())
    pieces = [content[i : i + MiB] for i in range(0, len(content), MiB)]
    stored = store.put(
        pieces,
        expected=sha256 if "digest" in announced else None,
        size=len(content) if "size" in announced else None,
    )
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    assert (stored.sha256, stored.git_oid, stored.size) == (sha256, git, len(content))
    assert b"".join(store.open(sha256)) == content
    edge = slice(PART_BYTES - 3, PART_BYTES + 3)
    assert b"".join(store.open(sha256, edge.start, edge.stop)) == content[edge]


@pytest.mark.parametrize("fault", ["digest", "size", "break"])
def test_a_large_upload_that_fails_leaves_nothing(
    store: BlobStore, tmp_path: Path, fault: str
) -> None:
    content = os.urandom(PART_BYTES + MiB)
    right = Sha256(hashlib.sha256(content).hexdigest())

    def pieces() -> Iterator[bytes]:
        yield content[:-1]
        if fault == "break":
            raise ConnectionResetError
        yield b"" if fault == "size" else bytes([content[-1] ^ 1])

    expected = {"digest": DigestMismatch, "size": BadUpload, "break": ConnectionResetError}
    with pytest.raises(expected[fault]):
        store.put(pieces(), expected=right, size=len(content))
    assert list(store.inventory()) == []
    if isinstance(store, S3BlobStore):
        key = store.bucket.prefix + key_of(right)
        assert key not in [upload["Key"] for upload in unfinished(store.bucket)]
    assert everything_in(tmp_path) in ([], ["store/STORE_ID"])


def unfinished(bucket: Bucket) -> list[Any]:
    try:
        return list(bucket.client.list_multipart_uploads(Bucket=bucket.name).get("Uploads", []))
    except bucket.client.exceptions.NoSuchUpload:  # rclone's way to say that there never was one
        return []


def test_a_local_copy_lasts_as_long_as_its_use(store: BlobStore, tmp_path: Path) -> None:
    store.put([b"hello"])
    with store.local(HELLO) as path, store.local(HELLO) as again:
        assert path.read_bytes() == again.read_bytes() == b"hello"
    with pytest.raises(FileNotFoundError), store.local(Sha256("0" * 64)):
        pass
    assert not list((tmp_path / "store/cache").glob("uses/*"))


def test_the_inventory_tells_of_every_blob(store: BlobStore) -> None:
    before = datetime.now(UTC) - timedelta(seconds=2)
    assert list(store.inventory()) == []
    stored = [store.put([bytes([i]) * i]) for i in range(5)]
    found = list(store.inventory())
    assert {(sha256, size) for sha256, size, _ in found} == {(s.sha256, s.size) for s in stored}
    assert all(before < changed < datetime.now(UTC) + timedelta(seconds=2) for *_, changed in found)


def test_what_is_in_the_trash_is_no_blob_any_more(store: BlobStore) -> None:
    store.put([b"hello"])
    store.trash(HELLO)
    store.trash(HELLO)
    assert store.size(HELLO) is None
    assert list(store.inventory()) == []
    store.put([b"hello"])
    assert store.size(HELLO) == 5


# Parts

GONE = (FileNotFoundError, StoreFailed)  # moto answers 500 for an upload that it does not know
LARGE = os.urandom(2 * PART_BYTES + 1234)
LARGE_SHA256 = Sha256(hashlib.sha256(LARGE).hexdigest())


def send(store: BlobStore, handle: str, number: int, data: bytes, size: int | None = None) -> str:
    async def upload() -> str:
        pieces = stream(*(data[i : i + MiB] for i in range(0, len(data), MiB)))
        size_ = len(data) if size is None else size
        return await store.parts.put(handle, number, (number - 1) * PART_BYTES, size_, pieces)

    return run(upload)


def parts_of(content: bytes) -> list[bytes]:
    return [content[i : i + PART_BYTES] for i in range(0, len(content), PART_BYTES)]


def test_parts_become_a_blob_in_whatever_order_they_come(
    store: BlobStore, make_store: Make
) -> None:
    handle = store.parts.begin()
    tags = {
        3: send(store, handle, 3, parts_of(LARGE)[2]),
        1: send(store, handle, 1, LARGE[:PART_BYTES]),
    }
    again = make_store("store")  # as after a restart
    again.sweep(older_than_s=0)
    tags[2] = send(again, handle, 2, parts_of(LARGE)[1])
    assert list(store.inventory()) == []
    stored = again.parts.finish(handle, [tags[1], tags[2], tags[3]], LARGE_SHA256, len(LARGE))
    git = hashlib.sha1(b"blob %d\0" % len(LARGE) + LARGE).hexdigest()
    assert (stored.sha256, stored.git_oid, stored.size) == (LARGE_SHA256, git, len(LARGE))
    assert b"".join(store.open(LARGE_SHA256)) == LARGE
    with pytest.raises(GONE):
        store.parts.finish(handle, list(tags.values()), LARGE_SHA256, len(LARGE))
    assert leftovers(store) == []


@pytest.mark.parametrize("fault", ["digest", "size"])
def test_parts_that_are_not_the_file_are_refused_and_gone(store: BlobStore, fault: str) -> None:
    handle = store.parts.begin()
    content = LARGE[:-1] + bytes([LARGE[-1] ^ 1]) if fault == "digest" else LARGE[:-1]
    tags = [send(store, handle, n, part) for n, part in enumerate(parts_of(content), 1)]
    with pytest.raises(DigestMismatch if fault == "digest" else BadUpload):
        store.parts.finish(handle, tags, LARGE_SHA256, len(LARGE))
    assert list(store.inventory()) == []
    assert leftovers(store) == []


def test_a_dropped_upload_leaves_nothing(store: BlobStore) -> None:
    handle = store.parts.begin()
    tag = send(store, handle, 1, LARGE[:PART_BYTES])
    store.parts.drop(handle)
    store.parts.drop(handle)
    assert leftovers(store) == []
    with pytest.raises(GONE):
        store.parts.finish(handle, [tag], LARGE_SHA256, PART_BYTES)


@pytest.mark.parametrize("announced", [4, 6])
def test_a_part_of_another_size_is_refused(store: BlobStore, announced: int) -> None:
    handle = store.parts.begin()
    with pytest.raises(BadUpload, match=f"the {announced} bytes of this part arrived"):
        send(store, handle, 1, b"hello", announced)
    store.parts.drop(handle)


def leftovers(store: BlobStore) -> list[Any]:
    """Of unfinished uploads."""
    if isinstance(store, S3BlobStore):
        mine = [u for u in unfinished(store.bucket) if u["Key"].startswith(store.bucket.prefix)]
        return [*mine, *store.bucket.list("staging/")]
    return list((store._root / "parts").iterdir())  # type: ignore[attr-defined]


# The probe

# Of what is tried, what each does not do (versions of constraints.txt).
FAILURES = {
    "serve_moto": {"md5", "sha256", "presigned expiry", "presigned signature", "presigned length"},
    "serve_s3": {"sha256", "create only", "part copy", "presigned range"},
    "serve_swift": set(),
}


def test_the_probe_finds_what_each_store_does(client: Any, request: pytest.FixtureRequest) -> None:
    if client is None:
        pytest.skip("a local folder is not probed")
    bucket = Bucket(client, "bucket", uuid.uuid4().hex)
    found = probe(bucket, client, client.meta.endpoint_url)
    name = SERVERS[request.node.callspec.params["server"]].__name__
    assert set(found.failures) == FAILURES[name]
    assert found.missing is None
    assert found.can_copy
    assert found.can_presign == (name != "serve_moto")
    assert found.can_redirect == (name == "serve_swift")
    assert list(bucket.list("")) == []
    again = Probe.model_validate_json(found.model_dump_json())
    assert again.is_about(bucket, client.meta.endpoint_url)
    assert not again.is_about(bucket, None)
    assert not again.is_about(Bucket(client, "other"), client.meta.endpoint_url)


def test_a_large_download_goes_by_the_stores_address_if_that_is_as_good(
    request: pytest.FixtureRequest,
    server: S3Server | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if server is None:
        pytest.skip("a local folder has no addresses")
    server.use(monkeypatch)
    endpoint = server.endpoint
    settings = Settings(data_dir=tmp_path / "data", min_free_bytes=0)
    at = {"s3_bucket": "bucket", "s3_prefix": uuid.uuid4().hex, "s3_endpoint": endpoint}
    settings = settings.model_copy(update={**at, "s3_public_endpoint": endpoint})
    with open_hub(settings) as hub, hub.db.write() as session:
        viewer = users.viewer_of(session, hub.admin_token or "")
        repo = repos.create_repo(session, viewer, "admin", "large")
        files = {"large.bin": LARGE, "small.bin": b"small", "large.png": LARGE}
        adds = [Add(path, hub.store.put([data]), lfs=True) for path, data in files.items()]
        commits.create(session, viewer, repo, operations=adds, message="files")
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as browser:
        for path, data in files.items():
            address = f"/admin/large/resolve/main/{path}"
            answer = browser.get(address, follow_redirects=False)
            if path != "large.bin" or request.node.callspec.params["server"] != "swift":
                assert (answer.status_code, answer.content) == (200, data)
                continue
            assert answer.status_code == 302
            assert answer.headers["Cache-Control"] == "private, no-store"
            assert answer.headers["X-Linked-Size"] == str(len(LARGE))
            there = answer.headers["Location"]
            assert there.startswith(server.endpoint)
            got = httpx2.get(there, timeout=60, headers={"Range": "bytes=1-9"})
            assert (got.status_code, got.content) == (206, LARGE[1:10])
            assert got.headers["Content-Disposition"] == answer.headers["Content-Disposition"]
            assert got.headers["Content-Type"] == "application/octet-stream"


def test_a_store_that_can_be_written_to_says_so(store: BlobStore) -> None:
    assert store.is_writable()


# The local store


def test_a_blob_cannot_be_written_to(tmp_path: Path) -> None:
    store = FileBlobStore(tmp_path)
    store.put([b"hello"])
    assert (tmp_path / "blobs" / HELLO[:2] / HELLO[2:4] / HELLO).stat().st_mode & 0o777 == 0o444


def test_the_trash_is_kept_for_a_day(tmp_path: Path) -> None:
    store = FileBlobStore(tmp_path)
    store.put([b"hello"])
    store.trash(HELLO)
    store.sweep(older_than_s=0)
    assert (tmp_path / "trash" / HELLO).read_bytes() == b"hello"
    yesterday = time.time() - TRASH_S - 1
    os.utime(tmp_path / "trash" / HELLO, (yesterday, yesterday))
    store.sweep(older_than_s=3600)
    assert everything_in(tmp_path) == ["STORE_ID"]


def test_an_upload_that_breaks_leaves_nothing(tmp_path: Path) -> None:
    store = FileBlobStore(tmp_path)

    def breaking() -> Iterator[bytes]:
        yield b"hel"
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        store.put(breaking(), size=5)
    assert everything_in(tmp_path) == ["STORE_ID"]


def test_the_file_is_durable_before_its_name_and_the_name_before_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FileBlobStore(tmp_path)
    steps: list[str] = []

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            where = arguments[0].name if isinstance(arguments[0], Path) else ""
            steps.append(f"{name} {where}".strip())
            return real(*arguments)

        return call

    monkeypatch.setattr(durable, "sync_file", watched("sync", durable.sync_file))
    monkeypatch.setattr(durable, "sync_folder", watched("sync", durable.sync_folder))
    monkeypatch.setattr(os, "replace", watched("rename", os.replace))
    store.put([b"hello"])
    renamed = next(step for step in steps if step.startswith("rename"))
    assert steps == ["sync", "sync blobs", f"sync {HELLO[:2]}", renamed, f"sync {HELLO[2:4]}"]


@pytest.mark.parametrize("step", ["sync_file", "make_folders", "reserve"])
@pytest.mark.parametrize(
    ("code", "expected"), [(errno.EIO, OSError), (errno.ENOSPC, NoSpace)], ids=["EIO", "ENOSPC"]
)
def test_a_fault_before_the_rename_leaves_no_blob_and_no_temporary_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    code: int,
    expected: type[Exception],
) -> None:
    store = FileBlobStore(tmp_path)
    calls = []

    def fault(*arguments: Any) -> None:
        calls.append(arguments)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(durable, step, fault)
    with pytest.raises(expected):
        store.put([b"hello"], size=5)
    assert len(calls) == 1, "a failed fsync must not be tried again"
    assert everything_in(tmp_path) == ["STORE_ID"]


def test_a_disk_that_fails_twice_gets_nothing_more_until_a_new_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FileBlobStore(tmp_path)
    store.put([b"before"])

    def fault(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patches:
        patches.setattr(durable, "sync_file", fault)
        for _ in range(2):
            assert store.is_writable()
            with pytest.raises(OSError, match="Input/output error"):
                store.put([b"hello"])
    assert not store.is_writable()
    with pytest.raises(StoreFailed, match="does not keep what is written"):
        store.put([b"hello"])
    assert b"".join(store.open(Sha256(hashlib.sha256(b"before").hexdigest()))) == b"before"
    assert FileBlobStore(tmp_path).put([b"hello"]).sha256 == HELLO


@pytest.mark.parametrize("size", [None, 3_000_000])
def test_a_full_disk_is_no_space_and_leaves_nothing(tmp_path: Path, size: int | None) -> None:
    store = FileBlobStore(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(NoSpace, match="nothing was stored"):
            store.put([bytes(1_000_000)] * 3, size=size)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert everything_in(tmp_path) == ["STORE_ID"]


def test_an_upload_into_the_reserve_is_refused_before_its_first_byte(tmp_path: Path) -> None:
    store = FileBlobStore(tmp_path, min_free_bytes=2**60)
    with pytest.raises(NoSpace):
        store.put(iter(lambda: pytest.fail("read a byte"), b""), size=5)
    assert not store.is_writable()


def test_the_next_start_removes_what_a_killed_upload_left(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from hub.blobs.files import FileBlobStore
def chunks():
    yield b"hello"
    os.kill(os.getpid(), signal.SIGKILL)
FileBlobStore(Path({str(tmp_path)!r})).put(chunks())
"""
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == -signal.SIGKILL
    store = FileBlobStore(tmp_path)
    assert len(everything_in(tmp_path / "tmp")) == 1
    assert store.sweep(older_than_s=3600) == 0
    assert store.sweep(older_than_s=0) == 1
    assert everything_in(tmp_path) == ["STORE_ID"]


def test_without_fallocate_the_same_bytes_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    assert FileBlobStore(tmp_path).put([b"hello"], size=5).sha256 == HELLO


# Digests


def test_an_lfs_file_has_the_git_object_id_of_its_pointer() -> None:
    # printf 'version https://git-lfs.github.com/spec/v1\noid sha256:2cf2…\nsize 5\n'
    #   | git hash-object --stdin, git 2.39.5
    assert lfs_pointer_oid(HELLO, 5) == "d1ca116d6733584c13cb8bb50b21d5b5b81ee28f"
