"""An S3 store when things break on the way, and a hub that is opened on one."""

import hashlib
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from anyio import run
from fastapi import FastAPI
from sqlmodel import select
from starlette.testclient import TestClient

from hub.blobs import s3
from hub.blobs.bucket import Bucket, make_client
from hub.blobs.probe import Probe
from hub.blobs.s3 import S3BlobStore, key_of
from hub.blobs.store import Sha256
from hub.context import StoreIdentity, open_hub
from hub.errors import CannotStart, StoreFailed, install
from hub.hf.content import BlobResponse
from hub.settings import Settings
from tests.fixtures.proxy import CUT_BODY, LOSE_ANSWER, Request, proxy_to
from tests.fixtures.s3 import S3Server, serve_s3

KiB, MiB = 2**10, 2**20
PART_BYTES = 256 * KiB  # rclone takes parts of any size
CONTENT = os.urandom(3 * PART_BYTES + 99)
SHA256 = Sha256(hashlib.sha256(CONTENT).hexdigest())
Open = Callable[..., S3BlobStore]
# For the first pattern that is in "METHOD path": what happens to the next request, and the next.
Plan = dict[str, list[str | int | None]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with serve_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def bucket(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a new one; boto3 finds its server by the environment."""
    monkeypatch.setattr(s3, "PART_BYTES", PART_BYTES)
    server.use(monkeypatch)
    name = f"bucket-{hashlib.sha256(str(tmp_path).encode()).hexdigest()[:8]}"
    server.make_bucket(name)
    return name


@pytest.fixture
def open_store(server: S3Server, bucket: str, tmp_path: Path) -> Iterator[Open]:
    """A store behind a proxy, which from its opening on does what a plan says."""
    plan: Plan = {}

    def decide(request: Request) -> str | int | None:
        for pattern, left in plan.items():
            if pattern in f"{request.method} {request.path}" and left:
                return left.pop(0)
        return None

    with proxy_to(server.endpoint, decide) as address:

        def open_store(decisions: Plan | None = None, **options: Any) -> S3BlobStore:
            made = Bucket(make_client(address, None), bucket)
            store = S3BlobStore(made, tmp_path / "store", **options)
            plan.update(decisions or {})
            return store

        yield open_store
    assert not any(plan.values()), f"these requests never came: {plan}"


def put(store: S3BlobStore, content: bytes = CONTENT) -> None:
    """As LFS does: digest and size are known."""
    sha256 = Sha256(hashlib.sha256(content).hexdigest())
    store.put([content], expected=sha256, size=len(content))


def uploads(store: S3BlobStore) -> list[Any]:
    client = store.bucket.client
    try:
        return list(client.list_multipart_uploads(Bucket=store.bucket.name).get("Uploads", []))
    except client.exceptions.NoSuchUpload:  # rclone's way to say that there never was one
        return []


# Broken connections and refusals


@pytest.mark.parametrize("fault", [LOSE_ANSWER, 503])
@pytest.mark.parametrize("request_", ["PUT", "POST", "partNumber"])
def test_one_fault_in_an_upload_is_got_over(open_store: Open, request_: str, fault: Any) -> None:
    small = request_ == "PUT"
    store = open_store({request_: [fault]})
    put(store, CONTENT[:99] if small else CONTENT)
    assert [size for _, size, _ in store.inventory()] == [99 if small else len(CONTENT)]


def test_an_upload_whose_answer_is_always_lost_is_found_to_be_there(open_store: Open) -> None:
    store = open_store({"PUT": [LOSE_ANSWER] * 3})
    put(store, b"hello")
    store = open_store({"POST /": [None], "uploadId": [None] * 4 + [LOSE_ANSWER] * 3})
    put(store)
    assert b"".join(store.open(SHA256)) == CONTENT


@pytest.mark.parametrize("step", ["PUT", "POST", "partNumber=2", "POST complete"])
def test_an_upload_that_the_store_never_takes_leaves_nothing(open_store: Open, step: str) -> None:
    plan: Plan = {step: [503] * 3}
    if step == "POST complete":
        plan = {"POST": [None, 503, 503, 503]}
    store = open_store(plan)
    with pytest.raises(StoreFailed, match="s3://bucket-.*/: the store answers 503"):
        put(store, CONTENT[:99] if step == "PUT" else CONTENT)
    assert list(store.inventory()) == []
    assert uploads(store) == []


def test_an_object_shorter_than_what_was_sent_is_no_blob(
    open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    monkeypatch.setattr(Bucket, "size", lambda *_: len(CONTENT) - 1)
    with pytest.raises(StoreFailed, match=f"says it has {len(CONTENT) - 1} bytes of the"):
        put(store)


def test_a_broken_read_goes_on_where_it_was(open_store: Open) -> None:
    store = open_store()
    put(store)
    open_store({"GET": [CUT_BODY, None, CUT_BODY, LOSE_ANSWER, 503]})
    assert b"".join(store.open(SHA256, 10)) == CONTENT[10:]
    assert b"".join(store.open(SHA256, 10, 700_000)) == CONTENT[10:700_000]


def test_a_read_that_stays_broken_is_an_error(open_store: Open) -> None:
    store = open_store()
    put(store)
    open_store({"GET": [None, 503, 503, 503]})
    next(read := store.open(SHA256))
    read.close()
    with pytest.raises(StoreFailed, match="the store answers 503"):
        store.open(SHA256)


def test_a_download_from_a_store_that_is_away_is_a_503(open_store: Open) -> None:
    store = open_store()
    put(store)
    app = FastAPI()
    install(app, {})

    @app.get("/file")
    def file() -> BlobResponse:
        return BlobResponse(store, SHA256, 0, len(CONTENT), {})

    with TestClient(app) as client:
        assert client.get("/file").content == CONTENT
        open_store({"GET": [503, 503, 503]})
        refused = client.get("/file")
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "2")
    assert "the store answers 503" in refused.json()["error"]["message"]


def test_a_listing_that_fails_is_an_error_and_not_a_part(open_store: Open) -> None:
    store = open_store()
    put(store)
    open_store({"list-type": [503] * 3})
    with pytest.raises(StoreFailed):
        list(store.inventory())


def test_a_store_that_is_away_is_not_writable(open_store: Open) -> None:
    store = open_store({"HEAD": [503] * 3})
    assert not store.is_writable()
    assert store.is_writable()


def test_objects_that_are_no_blobs_are_not_in_the_inventory(open_store: Open) -> None:
    store = open_store()
    put(store)
    store.bucket.put(f"blobs/sha256/zz/{SHA256}", b"")
    store.bucket.put("blobs/sha256/README", b"")
    assert [sha256 for sha256, *_ in store.inventory()] == [SHA256]


# Local copies


def test_a_copy_is_fetched_once_and_dropped_when_there_are_too_many(
    open_store: Open, tmp_path: Path
) -> None:
    store = open_store(cache_bytes=len(CONTENT) + 5)
    put(store)
    put(store, b"hello")
    put(store, b"world")
    hello = Sha256(hashlib.sha256(b"hello").hexdigest())
    with store.local(SHA256):
        pass
    store.bucket.delete(key_of(SHA256))  # From now on only a copy can be read.
    with store.local(SHA256) as path, store.local(hello):
        assert path.read_bytes() == CONTENT
        with store.local(Sha256(hashlib.sha256(b"world").hexdigest())):
            assert path.read_bytes() == CONTENT, "dropped while it is used"
    with pytest.raises(FileNotFoundError), store.local(SHA256):
        pass
    kept = tmp_path / "store/cache/kept"
    assert sum(path.stat().st_size for path in kept.iterdir()) <= len(CONTENT) + 5


def test_without_a_cache_a_copy_lasts_as_long_as_its_use(open_store: Open, tmp_path: Path) -> None:
    store = open_store(cache_bytes=0)
    put(store)
    with store.local(SHA256) as path:
        assert path.read_bytes() == CONTENT
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []


def test_other_bytes_than_the_digest_says_are_never_given_to_a_job(
    open_store: Open, tmp_path: Path
) -> None:
    store = open_store(cache_bytes=MiB)
    store.bucket.put(key_of(SHA256), CONTENT[::-1])
    said = f"other bytes under the digest {SHA256}"
    with pytest.raises(StoreFailed, match=said), store.local(SHA256):
        pass
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []


# A hub on a bucket


def test_a_hub_finds_its_blobs_again_and_no_others(
    server: S3Server, bucket: str, tmp_path: Path
) -> None:
    settings = Settings(data_dir=tmp_path / "data", s3_bucket=bucket, min_free_bytes=0)
    with open_hub(settings) as hub:
        stored = hub.store.put([b"hello"])
    with open_hub(settings) as hub:
        assert b"".join(hub.store.open(stored.sha256)) == b"hello"
    elsewhere = settings.model_copy(update={"s3_prefix": "elsewhere"})
    with (
        pytest.raises(CannotStart, match=f"not at s3://{bucket}/elsewhere/; nothing was changed"),
        open_hub(elsewhere),
    ):
        pass
    assert list((server.folder / bucket).glob("elsewhere*")) == []
    with open_hub(elsewhere.model_copy(update={"data_dir": tmp_path / "other"})):
        pass
    with (
        pytest.raises(CannotStart, match="the catalogue describes blob store"),
        open_hub(elsewhere),
    ):
        pass


def test_a_store_is_probed_once_and_again_when_it_is_another(
    server: S3Server, bucket: str, tmp_path: Path
) -> None:
    asked: list[str] = []

    def count(request: Request) -> None:
        asked.append(request.path)

    with proxy_to(server.endpoint, count) as address:
        settings = Settings(data_dir=tmp_path / "data", s3_bucket=bucket, min_free_bytes=0)
        settings = settings.model_copy(update={"s3_endpoint": address})
        with open_hub(settings):
            assert any("/probe/" in path for path in asked)
        asked.clear()
        with open_hub(settings):
            assert not any("/probe/" in path for path in asked)
    with open_hub(settings.model_copy(update={"s3_endpoint": server.endpoint})) as hub:
        assert hub.store.address(SHA256, 60, {}) is None
        with hub.db.read() as session:
            row = session.exec(select(StoreIdentity)).one()
    assert row.probe is not None
    assert server.endpoint in Probe.model_validate_json(row.probe).where


def test_a_store_that_lacks_what_a_hub_needs_keeps_it_from_starting(
    server: S3Server, bucket: str, tmp_path: Path
) -> None:
    def no_lists(request: Request) -> int | None:
        return 501 if "list-type" in request.path else None

    with proxy_to(server.endpoint, no_lists) as address:
        settings = Settings(data_dir=tmp_path / "data", s3_bucket=bucket, s3_endpoint=address)
        said = r"cannot hold a hub: that objects are listed .* fails \(.* the store answers 501\)"
        with pytest.raises(CannotStart, match=said), open_hub(settings):
            pass
    assert [p for p in (server.folder / bucket).rglob("*") if p.is_file()] == []


def test_what_cannot_be_copied_is_sent_again(open_store: Open) -> None:
    store = open_store(can_copy=False)
    handle = store.parts.begin()

    async def send() -> str:
        async def chunks() -> AsyncIterator[bytes]:
            yield CONTENT

        return await store.parts.put(handle, 1, 0, len(CONTENT), chunks())

    store.bucket.copy = None  # type: ignore[assignment,method-assign]
    tag = run(send)
    assert store.parts.finish(handle, [tag], SHA256, len(CONTENT)).size == len(CONTENT)
    assert b"".join(store.open(SHA256)) == CONTENT
    assert list(store.bucket.list("staging/")) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"s3_bucket": "no-such-bucket"}, "there is no such bucket"),
        ({"s3_endpoint": "http://127.0.0.1:9"}, "Could not connect"),
        ({"s3_endpoint": "nonsense"}, "Invalid endpoint"),
        ({"s3_bucket": None, "s3_prefix": "hub"}, "GRAFT_S3_PREFIX needs GRAFT_S3_BUCKET"),
    ],
)
def test_a_bucket_that_cannot_be_used_is_said_in_one_sentence(
    bucket: str, tmp_path: Path, change: dict[str, str | None], reason: str
) -> None:
    settings = Settings(data_dir=tmp_path / "data", s3_bucket=bucket, min_free_bytes=0)
    with pytest.raises(CannotStart, match=reason), open_hub(settings.model_copy(update=change)):
        pass
