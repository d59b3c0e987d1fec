"""A hub that mirrors another one: both real processes, and upstreams that misbehave."""

import hashlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from hub.context import Hub
from hub.errors import DigestMismatch, RepoNotFound, UpstreamFailed
from hub.mirror.service import Mirror
from hub.mirror.upstream import Upstream, is_public
from hub.repos import service as repos
from hub.users.service import Viewer
from tests.cli.test_repos import Shell
from tests.fixtures.catalogue import lora_bytes
from tests.fixtures.server import RunningHub, running_hub
from tests.hub.conftest import bearer

COMMIT = "a" * 40


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    with running_hub(tmp_path_factory.mktemp("upstream"), max_regular_bytes=1000) as hub:
        yield hub


def _api(hub: RunningHub) -> HfApi:
    return HfApi(endpoint=hub.url, token=hub.admin_token, headers={"X-Graft-Upload": "lfs"})


def _publish(upstream: RunningHub, repo: str, weights: bytes, *, private: bool = False) -> str:
    api = _api(upstream)
    namespace = repo.partition("/")[0]
    httpx2.post(
        f"{upstream.url}/api/organizations", json={"name": namespace}, headers=upstream.auth
    )
    api.create_repo(repo, private=private, exist_ok=True)
    operations = [
        CommitOperationAdd("README.md", b"---\ntags: [ink]\n---\n# Ink\n"),
        CommitOperationAdd("sub/ink.safetensors", weights),
    ]
    return api.create_commit(repo, operations, commit_message="first").oid


def test_a_repo_is_fetched_on_first_use_kept_and_served_when_the_upstream_is_away(
    tmp_path: Path,
) -> None:
    weights = lora_bytes(tmp_path, seed=1)
    with running_hub(tmp_path / "up") as up:
        at = _publish(up, "acme/ink", weights)
        settings = {"mirror_url": up.url, "mirror_hours": 1e-9}
        with running_hub(tmp_path / "here", **settings) as here:
            api = _api(here)
            anonymous = HfApi(endpoint=here.url, token=False)
            with pytest.raises(RepositoryNotFoundError):
                anonymous.model_info("acme/ink")
            info = api.model_info("acme/ink")
            assert {s.rfilename for s in info.siblings or []} >= {
                "README.md",
                "sub/ink.safetensors",
            }
            title = api.list_repo_commits("acme/ink")[0].title
            assert title == f"Mirror of {up.url}/acme/ink at {at}"
            # The catalogue knows it, and those without a token may read it now.
            found = httpx2.get(f"{here.url}/api/adapters?q=ink").json()["items"]
            assert [item["repo"] for item in found] == ["acme/ink"]
            up.stop()
            place = f"{here.url}/acme/ink/resolve/main/sub/ink.safetensors"
            assert httpx2.get(place).content == weights
            assert anonymous.model_info("acme/ink").sha == info.sha
            with pytest.raises(HfHubHTTPError) as refused:
                api.model_info("acme/other")
            assert refused.value.response.status_code == 502


def test_graft_admin_mirror_brings_what_is_new(upstream: RunningHub, tmp_path: Path) -> None:
    _publish(upstream, "team/ink", lora_bytes(tmp_path, seed=2))
    with running_hub(tmp_path / "here", mirror_url=upstream.url) as here:
        shell = Shell(tmp_path, {"GRAFT_ENDPOINT": here.url, "GRAFT_TOKEN": here.admin_token})
        first = json.loads(shell.ok("admin", "mirror", "hf://team/ink", "--json"))
        assert first["repo"] == "team/ink"
        again = json.loads(shell.ok("admin", "mirror", "team/ink", "--json"))
        assert again == first
        newer = lora_bytes(tmp_path, seed=3)
        at = (
            _api(upstream)
            .create_commit(
                "team/ink",
                [
                    CommitOperationAdd("ink2.safetensors", newer),
                    CommitOperationDelete("sub/ink.safetensors"),
                ],
                commit_message="second",
            )
            .oid
        )
        assert at in shell.ok("admin", "mirror", "team/ink")
        files = _api(here).list_repo_files("team/ink")
        assert "ink2.safetensors" in files
        assert "sub/ink.safetensors" not in files
        got = httpx2.get(f"{here.url}/team/ink/resolve/main/ink2.safetensors")
        assert got.content == newer
        assert "has no such repo" in shell.refused("admin", "mirror", "team/nothing")
        assert "user or organisation of this hub" in shell.refused("admin", "mirror", "admin/x")


def test_what_only_the_token_may_read_stays_private(upstream: RunningHub, tmp_path: Path) -> None:
    _publish(upstream, "secret/ink", lora_bytes(tmp_path, seed=4), private=True)
    settings = {"mirror_url": upstream.url, "mirror_token": upstream.admin_token}
    with running_hub(tmp_path / "here", **settings) as here:
        assert _api(here).model_info("secret/ink").private
        users = httpx2.post(f"{here.url}/api/users", json={"name": "ada"}, headers=here.auth)
        token = users.json()["token"]
        for headers in ({}, {"Authorization": f"Bearer {token}"}):
            answer = httpx2.get(f"{here.url}/api/models/secret/ink", headers=headers)
            assert answer.status_code in (401, 404)


def test_nobody_but_the_mirror_writes_to_a_mirrored_namespace(
    upstream: RunningHub, tmp_path: Path
) -> None:
    _publish(upstream, "theirs/ink", lora_bytes(tmp_path, seed=5))
    with running_hub(tmp_path / "here", mirror_url=upstream.url) as here:
        users = httpx2.post(f"{here.url}/api/users", json={"name": "ada"}, headers=here.auth)
        ada = HfApi(endpoint=here.url, token=users.json()["token"])
        assert ada.model_info("theirs/ink").sha
        with pytest.raises(HfHubHTTPError) as refused:
            ada.create_commit(
                "theirs/ink", [CommitOperationDelete("README.md")], commit_message="no"
            )
        assert refused.value.response.status_code == 403


# Upstreams that no hub is


Answer = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def _server(answer: Answer) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _send(request: BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: str) -> None:
    request.send_response(status)
    request.send_header("Content-Length", str(len(body)))
    for name, value in headers.items():
        request.send_header(name.replace("_", "-"), value)
    request.end_headers()
    request.wfile.write(body)


def _hub_with(content: bytes, promised: bytes, *, lfs: bool) -> Answer:
    """A hub of one file that promises some bytes and sends others."""
    item: dict[str, Any] = {
        "type": "file",
        "path": "x.bin",
        "size": len(promised),
        "oid": hashlib.sha1(b"blob %d\0" % len(promised) + promised).hexdigest(),
    }
    if lfs:
        item["lfs"] = {"oid": hashlib.sha256(promised).hexdigest(), "size": len(promised)}

    def answer(request: BaseHTTPRequestHandler) -> None:
        if "/tree/" in request.path:
            _send(request, json.dumps([item]).encode())
        elif "/revision/" in request.path:
            _send(request, json.dumps({"sha": COMMIT, "private": False}).encode())
        else:
            _send(request, content)

    return answer


@pytest.mark.parametrize("lfs", [True, False])
def test_other_bytes_than_promised_are_not_kept(hub: Hub, admin: Viewer, lfs: bool) -> None:
    with _server(_hub_with(b"evil", b"good", lfs=lfs)) as url:
        mirror = Mirror(hub, Upstream(url))
        with pytest.raises(DigestMismatch):
            mirror.fetch(admin, "acme/x")
        mirror.close()
    with hub.db.read() as session, pytest.raises(RepoNotFound):
        repos.get_repo(session, admin, "acme", "x")


def test_more_bytes_than_promised_end_the_download(hub: Hub, admin: Viewer) -> None:
    with _server(_hub_with(b"good and more", b"good", lfs=True)) as url:
        mirror = Mirror(hub, Upstream(url))
        with pytest.raises(UpstreamFailed, match=r"x\.bin is longer than was promised"):
            mirror.fetch(admin, "acme/x")
        mirror.close()


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("http://example.org/x", "not https"),
        ("https://127.0.0.1/x", "no public address"),
        ("https://localhost/x", "no public address"),
        ("https://[::1]/x", "no public address"),
        ("https://[::ffff:10.0.0.1]/x", "no public address"),
        ("https://169.254.169.254/latest/meta-data", "no public address"),
        ("https://2130706433/x", "no public address"),
        ("https://0x7f.1/x", "no public address"),
        ("file:///etc/passwd", "not https"),
    ],
)
def test_h3_redirects_to_what_is_not_public_are_not_followed(target: str, why: str) -> None:
    with (
        _server(lambda request: _send(request, b"", 302, Location=target)) as url,
        pytest.raises(UpstreamFailed, match=why),
    ):
        Upstream(url).info("acme/x")


def test_h3_redirects_without_end_are_given_up() -> None:
    with (
        _server(lambda request: _send(request, b"", 302, Location="/again")) as url,
        pytest.raises(UpstreamFailed, match="redirects more than 5 times"),
    ):
        Upstream(url).info("acme/x")


def test_h2_the_address_that_was_checked_is_the_one_connected_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = iter(["93.184.215.14", "127.0.0.1"])
    asked: list[Any] = []
    real, connect = socket.getaddrinfo, socket.create_connection

    def resolve(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        if host == "flips.example":
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]
        return real(host, port, *args, **kwargs)

    def connecting(address: Any, *args: Any, **kwargs: Any) -> socket.socket:
        asked.append(address)
        if address[0] != "127.0.0.1":
            raise ConnectionRefusedError
        return connect(address, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "create_connection", connecting)
    with (
        _server(lambda r: _send(r, b"", 302, Location="https://flips.example/x")) as url,
        pytest.raises(UpstreamFailed),
    ):
        Upstream(url).info("acme/x")
    assert asked[-1] == ("93.184.215.14", 443)


def test_h6_the_token_goes_to_the_upstream_only() -> None:
    seen: list[str | None] = []

    def answer(request: BaseHTTPRequestHandler) -> None:
        seen.append(request.headers["Authorization"])
        _send(request, json.dumps({"sha": COMMIT, "private": False}).encode())

    with _server(answer) as url:
        Upstream(url, "hf_secret").info("acme/x")
        other = url.replace("127.0.0.1", "localhost")
        with (
            _server(lambda r: _send(r, b"", 302, Location=f"{other}/x")) as first,
            pytest.raises(UpstreamFailed),
        ):
            Upstream(first, "hf_secret").info("acme/x")
    assert seen == ["Bearer hf_secret"]


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        ("100.64.0.1", False),
        ("192.168.1.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("fc00::1", False),
        ("fe80::1", False),
        ("2002:7f00:1::", False),
        ("2001:0:53aa:64c:0:0:80ff:fffe", False),
        ("64:ff9b::7f00:1", False),
        ("::ffff:93.184.215.14", True),
    ],
)
def test_h1_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(address) is public


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"sha": "x", "private": false}', b"{}"])
def test_answers_that_no_hub_gives_are_refused(body: bytes) -> None:
    with _server(lambda request: _send(request, body)) as url, pytest.raises(UpstreamFailed):
        Upstream(url).info("acme/x")


def test_a_hub_without_an_upstream_says_so(hub: Hub, client: Any) -> None:
    answer = client.post("/api/mirrors", json={"repo": "a/b"}, headers=bearer(hub.admin_token))
    assert answer.status_code == 501
    assert "GRAFT_MIRROR_URL" in answer.json()["error"]["message"]
