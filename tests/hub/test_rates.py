"""Rate limits: who is one caller, what a refusal says, and bodies that stop arriving."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import pytest
from huggingface_hub.utils._http import parse_ratelimit_headers
from starlette.testclient import TestClient

from hub.app import create_app
from hub.context import Hub
from hub.limits.rates import MAX_CALLERS, Buckets
from tests.fixtures.server import RunningHub, running_hub
from tests.hub.conftest import bearer, make_user

OUTSIDE = "203.0.113.7"


@contextmanager
def client_of(hub: Hub, address: str = OUTSIDE, **settings: Any) -> Iterator[TestClient]:
    changed = hub.settings.model_copy(update={"requests_per_address": 3, **settings})
    app = create_app(changed, hub=hub)
    with TestClient(app, base_url="http://127.0.0.1:8470", client=(address, 1)) as client:
        yield client


def statuses(
    client: TestClient | httpx2.Client, n: int, path: str = "/api/adapters", **request: Any
) -> list[int]:
    return [client.get(path, **request).status_code for _ in range(n)]


def test_a_refusal_says_when_to_come_back_in_words_that_clients_read(hub: Hub) -> None:
    with client_of(hub) as client:
        first = parse_ratelimit_headers(client.get("/api/adapters").headers)
        assert first is not None
        assert (first.remaining, first.limit, first.window_seconds) == (2, 3, 60)
        assert statuses(client, 3) == [200, 200, 429]
        refused = client.get("/api/adapters")
        assert refused.json()["error"]["code"] == "TooManyRequests"
        assert refused.headers["X-Content-Type-Options"] == "nosniff"
        assert 1 <= int(refused.headers["Retry-After"]) <= 20  # three a minute
        found = parse_ratelimit_headers(refused.headers)
        assert found is not None
        assert (found.remaining, found.reset_in_seconds) == (0, int(refused.headers["Retry-After"]))


def test_probes_and_static_files_are_free(hub: Hub) -> None:
    with client_of(hub) as client:
        assert statuses(client, 5, "/healthz") == [200] * 5
        assert statuses(client, 5, "/static/files/x/y.css") == [404] * 5


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.9.1", "::1"])
def test_this_machine_is_not_limited(hub: Hub, address: str) -> None:
    with client_of(hub, address) as client:
        assert statuses(client, 6) == [200] * 6
        assert "RateLimit" not in client.get("/api/adapters").headers


def test_a_token_that_works_counts_for_itself(hub: Hub) -> None:
    _, ada = make_user(hub, "ada")
    _, bob = make_user(hub, "bob")
    with client_of(hub, requests_per_token=5) as client:
        # The first request of a token still counts for its address: nobody knows it yet.
        assert statuses(client, 7, headers=bearer(ada)) == [200] * 6 + [429]
        assert statuses(client, 6, headers=bearer(bob)) == [200] * 6
        assert statuses(client, 2) == [200, 429]


@pytest.mark.parametrize("path", ["/api/adapters", "/api/nothing", "/api/agent-harnesses"])
def test_made_up_tokens_are_limited_by_where_they_come_from(hub: Hub, path: str) -> None:
    with client_of(hub) as client:
        found = [
            client.get(path, headers=bearer(f"graft_{n}")).status_code
            for n in range(10)
            for _ in range(2)
        ]
        assert found[3:] == [429] * 17


def test_neighbours_in_one_ipv6_network_are_one_caller(hub: Hub) -> None:
    app = create_app(hub.settings.model_copy(update={"requests_per_address": 3}), hub=hub)
    found = []
    for n in range(5):
        address = f"2001:db8:1:2::{n}"
        with TestClient(app, base_url="http://127.0.0.1", client=(address, 1)) as client:
            found += statuses(client, 1)
    assert found == [200, 200, 200, 429, 429]


def test_no_limit_is_a_limit_of_zero(hub: Hub) -> None:
    with client_of(hub, requests_per_address=0) as client:
        assert statuses(client, 6) == [200] * 6


def test_a_bucket_fills_again() -> None:
    moment = 0.0
    buckets = Buckets(lambda: moment)
    assert [buckets.take("a", 60).wait_s for _ in range(61)] == [0] * 60 + [1]
    assert buckets.take("b", 60).wait_s == 0
    moment = 2.0
    assert [buckets.take("a", 60).wait_s for _ in range(3)] == [0, 0, 1]
    moment = 10_000.0
    assert buckets.take("a", 60).remaining == 59


def test_callers_are_remembered_up_to_a_number() -> None:
    buckets = Buckets(lambda: 0.0)
    assert [buckets.take("first", 1).wait_s for _ in range(2)] == [0, 60]
    for n in range(MAX_CALLERS):
        buckets.take(str(n), 1)
    assert buckets.take("first", 1).wait_s == 0


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    folder = tmp_path_factory.mktemp("rates")
    with running_hub(folder, requests_per_address=50, requests_at_once=2, idle_s=1) as running:
        yield running


def test_behind_a_proxy_the_address_is_the_forwarded_one(site: RunningHub) -> None:
    with httpx2.Client(base_url=site.url) as client:
        found = statuses(client, 120, headers={"X-Forwarded-For": "198.51.100.1"})
        assert found[:50] == [200] * 50
        assert 429 in found
        assert statuses(client, 1, headers={"X-Forwarded-For": "198.51.100.2"}) == [200]


def unfinished(site: RunningHub, address: str, extra: str = "") -> socket.socket:
    """A connection that announces a body of 100 bytes and sends 3."""
    host, port = site.url.removeprefix("http://").split(":")
    opened = socket.create_connection((host, int(port)), timeout=30)
    head = f"POST /api/validate-yaml HTTP/1.1\r\nHost: {host}\r\nX-Forwarded-For: {address}\r\n"
    head += f"Content-Type: application/json\r\n{extra}Content-Length: 100\r\n\r\n{{  "
    opened.sendall(head.encode())
    return opened


def test_a_body_that_stops_arriving_ends_with_408(site: RunningHub) -> None:
    with unfinished(site, "198.51.100.3") as connection:
        answer = b""
        while piece := connection.recv(4096):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"nothing more of the body came for 1 s" in answer


def test_a_streamed_upload_that_stops_ends_with_408_and_leaves_nothing(site: RunningHub) -> None:
    body = {"name": "slow"}
    assert httpx2.post(f"{site.url}/api/repos/create", json=body, headers=site.auth).is_success
    host, port = site.url.removeprefix("http://").split(":")
    start = b'{"key": "header", "value": {"summary": "s"}}\n{"key": "file", "value": {"content": "'
    start += b"QUJD" * 2**19
    head = f"POST /api/models/admin/slow/commit/main HTTP/1.1\r\nHost: {host}\r\n"
    head += f"Authorization: {site.auth['Authorization']}\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head.encode() + f"{len(start):x}\r\n".encode() + start + b"\r\n")
        answer = connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert not list((site.data_dir / "store" / "tmp").iterdir())
    assert "Traceback" not in site.log.read_text()


def test_a_caller_has_few_requests_open_at_once(site: RunningHub) -> None:
    address = "198.51.100.4"
    headers = {"X-Forwarded-For": address}
    with unfinished(site, address), unfinished(site, address):
        for _ in range(40):  # until both are being read
            answer = httpx2.get(f"{site.url}/api/adapters", headers=headers)
            if answer.status_code == 429:
                break
    assert answer.json()["error"]["message"] == "more than 2 requests at once; try again in 1 s"
