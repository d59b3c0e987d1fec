"""Downloads over real sockets: files by sendfile(2) where uvicorn's fast parser and Linux are, and
by bytes elsewhere; the client cannot tell which."""

import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

import httpx2
import pytest
import uvicorn
from anyio import to_thread
from starlette.types import ASGIApp, Receive, Scope, Send

from hub import zerocopy
from hub.adapters.service import publish
from hub.app import create_app
from hub.blobs.store import Sha256
from hub.context import Hub
from hub.repos import commits, refs
from hub.repos import service as repos
from hub.repos.models import Repo
from hub.repos.operations import Add
from hub.users.service import Viewer

MiB = 2**20
DATA = os.urandom(8 * MiB)  # more than the buffers of a connection hold
ADDRESS = "/admin/a/resolve/main/a.safetensors"
WAYS = [("httptools", "uvloop"), ("httptools", "asyncio"), ("h11", "asyncio")]
everywhere = pytest.mark.parametrize("way", WAYS if sys.platform != "win32" else WAYS[1:])


@pytest.fixture(autouse=True)
def a_repo(hub: Hub, admin: Viewer) -> None:
    with hub.db.write() as session:
        repos.create_repo(session, admin, "admin", "a")
    files = {"a.safetensors": DATA, "empty": b""}
    operations = [Add(path, hub.store.put([data]), lfs=False) for path, data in files.items()]
    publish(hub, admin, "admin", "a", operations=operations, message="m")


@contextmanager
def served(app: ASGIApp, way: tuple[str, str]) -> Iterator[str]:
    """Behind uvicorn in a thread."""
    http, loop = way
    config = uvicorn.Config(app, http=http, loop=loop, log_config=None, log_level="warning")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def downloads(hub: Hub, viewer: Viewer) -> int:
    hub.downloads.flush(hub.db)
    return _repo(hub, viewer).downloads


@everywhere
def test_files_and_ranges_over_one_connection(
    hub: Hub, admin: Viewer, way: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    with (
        served(create_app(hub.settings, hub=hub), way) as url,
        httpx2.Client(base_url=url, timeout=30) as client,
    ):
        for _ in range(2):
            assert client.get(ADDRESS).content == DATA
        for asked, (start, end) in {
            "bytes=0-0": (0, 1),
            f"bytes={MiB - 1}-{3 * MiB}": (MiB - 1, 3 * MiB + 1),
            "bytes=-7": (len(DATA) - 7, len(DATA)),
        }.items():
            answer = client.get(ADDRESS, headers={"Range": asked})
            assert answer.status_code == 206
            assert answer.headers["Content-Range"] == f"bytes {start}-{end - 1}/{len(DATA)}"
            assert answer.content == DATA[start:end]
        head = client.head(ADDRESS)
        assert (head.headers["Content-Length"], head.content) == (str(len(DATA)), b"")
        assert client.get("/admin/a/resolve/main/empty").content == b""
        assert client.get("/healthz").status_code == 200
        with ThreadPoolExecutor(4) as threads:
            got = threads.map(lambda _: httpx2.get(url + ADDRESS, timeout=30).content, range(4))
            assert all(each == DATA for each in got)
    assert downloads(hub, admin) == 6
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@everywhere
def test_a_client_that_leaves_or_waits_holds_nobody_up(
    hub: Hub, admin: Viewer, way: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    with served(create_app(hub.settings, hub=hub), way) as url:
        slow, gone = _ask(url), _ask(url)
        assert gone.recv(2**16).startswith(b"HTTP/1.1 200")
        gone.close()
        assert httpx2.get(f"{url}/healthz", timeout=30).status_code == 200
        with slow, slow.makefile("rb") as answer:
            while answer.readline() != b"\r\n":
                pass
            assert answer.read(len(DATA)) == DATA
    assert downloads(hub, admin) == 1
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.skipif(sys.platform != "linux", reason="sends bytes")
@pytest.mark.parametrize("way", WAYS[:2])
def test_a_file_comes_after_what_was_sent_before(way: tuple[str, str], tmp_path: Path) -> None:
    """Bytes that wait in the buffer of the connection, and the next answer on it."""
    path = tmp_path / "file"
    path.write_bytes(DATA[::-1])

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        length = str(3 * len(DATA)).encode()
        start = {"status": 200, "headers": [(b"content-length", length)]}
        await send({"type": "http.response.start", **start})
        await send({"type": "http.response.body", "body": DATA, "more_body": True})
        with FileIO(path) as file:
            part = {"file": file, "offset": 0, "count": len(DATA)}
            await send({"type": zerocopy.ZERO_COPY, **part, "more_body": True})
            await send({"type": zerocopy.ZERO_COPY, **part})

    with (
        served(zerocopy.ZeroCopySend(app), way) as url,
        _ask(url, "/a", "/b") as connection,
        connection.makefile("rb") as opened,
    ):
        answers = opened.read().split(b"HTTP/1.1 200 OK\r\n")
    got = [answer.partition(b"\r\n\r\n")[2] for answer in answers]
    assert got[1:] == [DATA + DATA[::-1] * 2] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="sends bytes")
@pytest.mark.parametrize("way", WAYS[:2])
@pytest.mark.parametrize("paths", [("/a",), ("/a", "/b")])
def test_a_client_that_has_gone_is_let_go(
    way: tuple[str, str], paths: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Before anything was sent, and with another request of its own behind this one, of which
    alone uvicorn says that nobody waits for it."""
    path = tmp_path / "file"
    path.write_bytes(DATA)
    came, left, ended = threading.Event(), threading.Event(), threading.Event()
    told: list[type[Exception]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        came.set()
        await to_thread.run_sync(left.wait)
        if len(paths) == 1:
            while (await receive())["type"] != "http.disconnect":
                pass
        start = {"status": 200, "headers": [(b"content-length", str(len(DATA)).encode())]}
        try:
            await send({"type": "http.response.start", **start})
            with FileIO(path) as file:
                part = {"file": file, "offset": 0, "count": len(DATA)}
                await send({"type": zerocopy.ZERO_COPY, **part})
        except OSError as error:
            told.append(type(error))
        finally:
            ended.set()

    with served(zerocopy.ZeroCopySend(app), way) as url:
        with _ask(url, *paths):
            assert came.wait(30)
        left.set()
        assert ended.wait(30)
    assert len(told) == 1
    assert issubclass(told[0], ConnectionError)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.skipif(sys.platform != "linux", reason="sends bytes")
@pytest.mark.parametrize("is_cached", [True, False])
def test_linux_sends_files(hub: Hub, monkeypatch: pytest.MonkeyPatch, is_cached: bool) -> None:
    """What is not in memory waits for the disk in a thread."""
    sent: list[threading.Thread] = []

    def sendfile(target: int, source: int, offset: int, count: int) -> int:
        sent.append(threading.current_thread())
        return os_sendfile(target, source, offset, count)

    os_sendfile = os.sendfile
    monkeypatch.setattr(os, "sendfile", sendfile)
    if not is_cached:
        monkeypatch.setattr(zerocopy, "read_cached", lambda *_: None)
    with served(create_app(hub.settings, hub=hub), WAYS[0]) as url:
        assert httpx2.get(url + ADDRESS, timeout=30).content == DATA
    assert {"AnyIO" in thread.name for thread in sent} == {not is_cached}


def test_a_file_that_lost_bytes_ends_the_connection(
    hub: Hub, admin: Viewer, caplog: pytest.LogCaptureFixture
) -> None:
    with hub.db.read() as session:
        found = commits.entry(session, refs.resolve(session, _repo(hub, admin)), "a.safetensors")
    path = hub.store.path(Sha256(found.sha256))
    assert path is not None
    path.chmod(0o600)
    path.write_bytes(DATA[:MiB])
    with (
        served(create_app(hub.settings, hub=hub), WAYS[1]) as url,
        pytest.raises(httpx2.RemoteProtocolError),
    ):
        httpx2.get(url + ADDRESS, timeout=30)
    assert "shorter than it was" in caplog.text
    assert downloads(hub, admin) == 0


def _repo(hub: Hub, viewer: Viewer) -> Repo:
    with hub.db.read() as session:
        return repos.get_repo(session, viewer, "admin", "a")


def _ask(url: str, *paths: str) -> socket.socket:
    """A connection with a small buffer, and the requests on their way."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
    made.settimeout(30)
    host, port = url.removeprefix("http://").split(":")
    made.connect((host, int(port)))
    asked = [f"GET {path} HTTP/1.1\r\nHost: {host}\r\n" for path in paths or (ADDRESS,)]
    if paths:
        asked[-1] += "Connection: close\r\n"
    made.sendall("".join(f"{request}\r\n" for request in asked).encode())
    return made
