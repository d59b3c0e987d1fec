"""What needs a look inside the hub: download counts, abandoned downloads, what a refusal leaves."""

import json
import os

import anyio
import pytest
from starlette.testclient import TestClient

from hub.adapters.service import publish
from hub.blobs.store import Stored
from hub.context import Hub
from hub.hf import content
from hub.repos import commits, refs
from hub.repos import service as repos
from hub.repos.operations import Add
from hub.users.service import Viewer
from tests.hub.conftest import bearer, make_user


@pytest.fixture
def weights(hub: Hub, admin: Viewer) -> Stored:
    """admin/a with a file of weights and a card."""
    with hub.db.write() as session:
        repos.create_repo(session, admin, "admin", "a")
    stored = hub.store.put([b"weights" * 1000])
    card = hub.store.put([b"# a\n"])
    operations = [Add("a.safetensors", stored, lfs=True), Add("README.md", card, lfs=False)]
    publish(hub, admin, "admin", "a", operations=operations, message="m")
    return stored


def downloads(hub: Hub, viewer: Viewer) -> int:
    hub.downloads.flush(hub.db)
    with hub.db.read() as session:
        return repos.get_repo(session, viewer, "admin", "a").downloads


@pytest.mark.usefixtures("weights")
def test_whole_downloads_of_weights_are_counted(
    hub: Hub, admin: Viewer, client: TestClient
) -> None:
    address = "/admin/a/resolve/main/a.safetensors"
    assert client.get(address).content == b"weights" * 1000
    assert downloads(hub, admin) == 1
    assert client.get(address, headers={"Range": "bytes=0-9"}).status_code == 206
    etag = client.head(address).headers["ETag"]
    assert client.get(address, headers={"If-None-Match": etag}).status_code == 304
    assert client.get("/admin/a/resolve/main/README.md").content == b"# a\n"
    assert downloads(hub, admin) == 1
    assert client.get(address, headers={"Range": "bytes=0-"}).status_code == 206
    assert downloads(hub, admin) == 2


@pytest.mark.parametrize("is_cached", [True, False])
def test_a_blob_is_sent_in_pieces_from_memory_or_disk(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, is_cached: bool
) -> None:
    """Both ways of reading: the one that asks Linux not to wait, and the one that every system has."""
    monkeypatch.setattr(content, "PIECE", 1000)
    if not is_cached:
        monkeypatch.setattr(content, "read_cached", lambda *_: None)
    data = os.urandom(2345)
    stored = hub.store.put([data])

    async def read(start: int, end: int) -> list[bytes]:
        found = content.read_blob(hub.store, stored.sha256, start, end)
        return [bytes(piece) async for piece in found]

    assert anyio.run(read, 0, 2345) == [data[:1000], data[1000:2000], data[2000:]]
    assert anyio.run(read, 999, 1001) == [data[999:1001]]
    path = hub.store.path(stored.sha256)
    assert path is not None
    path.chmod(0o600)
    path.write_bytes(data[:1500])
    with pytest.raises(OSError, match="shorter than it was"):
        anyio.run(read, 0, 2345)


def test_head_reads_no_blob(hub: Hub, client: TestClient, weights: Stored) -> None:
    hub.store.delete(weights.sha256)
    answer = client.head("/admin/a/resolve/main/a.safetensors")
    assert (answer.status_code, answer.headers["Content-Length"]) == (200, "7000")
    assert answer.headers["ETag"] == f'"{weights.sha256}"'


def test_a_private_file_is_not_for_caches(hub: Hub, admin: Viewer, client: TestClient) -> None:
    with hub.db.write() as session:
        repos.create_repo(session, admin, "admin", "p", private=True)
    stored = hub.store.put([b"x"])
    publish(hub, admin, "admin", "p", operations=[Add("x.html", stored, lfs=False)], message="m")
    answer = client.get("/admin/p/resolve/main/x.html", headers=bearer(hub.admin_token))
    assert answer.headers["Cache-Control"] == "private, no-store"
    assert answer.headers["Content-Type"] == "application/octet-stream"
    assert answer.headers["Content-Disposition"].startswith("attachment;")


def test_a_name_with_line_breaks_cannot_enter_a_header(client: TestClient) -> None:
    answer = client.get("/api/models/admin/x%0D%0AX-Evil:%201")
    assert answer.status_code == 401
    assert "X-Evil" not in answer.headers
    answer = client.delete("/api/nothing%0D%0AX-Evil:%201%01%1b")
    assert answer.status_code == 501
    assert "X-Evil" not in answer.headers
    assert answer.headers["X-Error-Message"].isprintable()


LINES = [
    {"key": "header", "value": {"summary": "s"}},
    {"key": "file", "value": {"path": "x.txt", "content": "eA==", "encoding": "base64"}},
]


def test_a_token_revoked_or_read_only_commits_nothing(hub: Hub, client: TestClient) -> None:
    _, reader = make_user(hub, "reader", scope="read")  # type: ignore[arg-type]
    body = "\n".join(map(json.dumps, LINES))
    for token, status in ((reader, 403), ("graft_unknown", 401)):
        answer = client.post("/api/models/admin/a/commit/main", content=body, headers=bearer(token))
        assert answer.status_code == status
    assert client.post("/api/models/admin/a/commit/main", content=body).status_code == 401


@pytest.mark.usefixtures("weights")
def test_a_commit_of_no_header_of_too_much_or_of_something_else(
    hub: Hub, admin: Viewer, client: TestClient
) -> None:
    def post(*lines: object) -> tuple[int, str]:
        body = "\n".join(map(json.dumps, lines))
        answer = client.post(
            "/api/models/admin/a/commit/main", content=body, headers=bearer(hub.admin_token)
        )
        return answer.status_code, answer.headers.get("X-Error-Message", "")

    assert post(LINES[1]) == (400, "a commit has a header line")
    unknown = {"key": "teleport", "value": {}}
    assert post(LINES[0], unknown) == (400, "line 2: this hub knows no operation 'teleport'")
    bad_oid = {"key": "lfsFile", "value": {"path": "y", "oid": "xyz"}}
    assert post(LINES[0], bad_oid)[0] == 400
    assert post({"key": "header", "value": {"summary": ""}}, LINES[1])[0] == 422
    assert post(*LINES) == (200, "")
    copy = {"key": "copyFile", "value": {"path": "c.txt", "srcPath": "x.txt"}}
    assert post(LINES[0], copy) == (200, "")
    with hub.db.read() as session:
        repo = repos.get_repo(session, admin, "admin", "a")
        paths = [entry.path for entry in commits.entries(session, refs.resolve(session, repo))]
    assert paths == ["README.md", "a.safetensors", "c.txt", "x.txt"]


def test_a_cursor_of_ours_only(client: TestClient) -> None:
    for cursor in (
        "x",
        "WzEsMl0x",
        "WzEsMl0",
        "WyIyMDI0LTAxLTAxIiwyXQ",
        "WyJ4IiwyXQ",
        "W251bGwsMV0",
        "%00",
        "e30",
    ):
        answer = client.get(f"/api/models?cursor={cursor}")
        assert answer.status_code in (200, 400), cursor
        assert answer.headers.get("X-Error-Code", "BadRequest") == "BadRequest"


@pytest.mark.usefixtures("weights")
def test_text_that_no_database_keeps_is_refused(hub: Hub, client: TestClient) -> None:
    headers = bearer(hub.admin_token)
    for address in (
        "/admin/a/resolve/main/%00",
        "/admin/a/resolve/%00/a.safetensors",
        "/api/models/admin/a%00",
        "/api/models/admin/a/tree/main/%00",
        "/api/models/admin/a/refs%00",
        "/api/models?search=%00",
        "/api/models?author=%00",
        "/api/models?search=%ff%fe",
        "/admin/a.git/info/lfs/objects/%00",
    ):
        assert 200 <= client.get(address, headers=headers).status_code < 500, address
    for body in (
        '{"name": "x\\u0000"}',
        '{"name": "x\\ud800"}',
        '{"name": "x", "organization": "\\u0000"}',
    ):
        answer = client.post(
            "/api/repos/create",
            content=body,
            headers=headers | {"Content-Type": "application/json"},
        )
        assert answer.status_code == 422, body
        assert "is expected" in answer.json()["error"] or "surrogates" in answer.json()["error"]
    for summary in ("\\u0000", "\\ud800"):
        lines = f'{{"key": "header", "value": {{"summary": "{summary}"}}}}\n{json.dumps(LINES[1])}'
        answer = client.post("/api/models/admin/a/commit/main", content=lines, headers=headers)
        assert answer.status_code == 400
    answer = client.post(
        "/api/models/admin/a/paths-info/main", content=b"\xff\x00=1&paths=%00&paths=%ff"
    )
    assert answer.json() == []
