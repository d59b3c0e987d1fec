"""Attacks of docs/security.md on a real server, some with bytes that no client would send."""

import hashlib
import socket
from collections.abc import Iterator

import httpx2
import pytest

from tests.fixtures.server import RunningHub, running_hub


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    with running_hub(tmp_path_factory.mktemp("threats"), workers=0) as running:
        create = {"name": "ink", "private": True}
        made = httpx2.post(running.url + "/api/repos/create", json=create, headers=running.auth)
        assert made.is_success
        yield running


def raw(site: RunningHub, request: bytes, *, finish: bool = True) -> bytes:
    """What the server sends until it closes; `finish` False ends our side in the middle."""
    host, port = site.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(request.replace(b"HOST", f"{host}:{port}".encode()))
        if not finish:
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
        return answer


SPELLINGS = [
    b"../../../../etc/passwd",
    b"%2e%2e/%2e%2e/%2e%2e/etc/passwd",
    b"%252e%252e%252fetc%252fpasswd",
    b"..%2f..%2f..%2fetc%2fpasswd",
    b"..%5c..%5cetc%5cpasswd",
    b"%c0%ae%c0%ae/%c0%ae%c0%ae/etc/passwd",
    b"..;/..;/etc/passwd",
    b"a#/../../etc/passwd",
    b"%00/etc/passwd",
    b"//etc/passwd",
    b"file:///etc/passwd",
]
PREFIXES = [b"/", b"/static/files/x/", b"/admin/ink/resolve/main/", b"/admin/ink/blob/main/"]
PREFIXES += [b"/static/thumbs/", b"/api/models/admin/ink/tree/main/", b"/api/adapters/admin/ink/"]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_n2_no_spelling_of_a_path_leaves_the_hub(site: RunningHub, prefix: bytes) -> None:
    token = site.auth["Authorization"].encode()
    for spelling in SPELLINGS:
        head = b"GET " + prefix + spelling + b" HTTP/1.1\r\nHost: HOST\r\nConnection: close\r\n"
        answer = raw(site, head + b"Authorization: " + token + b"\r\n\r\n")
        status = int(answer.split(b" ", 2)[1])
        assert 400 <= status < 500 or status == 501, (spelling, answer[:300])
        assert b"root:" not in answer


AMBIGUOUS = {
    "length and chunks": b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two lengths": b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcde",
    "an unknown coding": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "a blank before the colon": b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "a signed length": b"Content-Length: +4\r\n\r\nabcd",
    "a folded header": b"X-A: b\r\n Transfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n",
    "a chunk with a sign": b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n",
}


@pytest.mark.parametrize("what", AMBIGUOUS)
def test_h11_a_request_that_could_be_read_in_two_ways_is_refused(
    site: RunningHub, what: str
) -> None:
    smuggled = b"GET /healthz HTTP/1.1\r\nHost: HOST\r\nConnection: close\r\n\r\n"
    head = b"POST /api/validate-yaml HTTP/1.1\r\nHost: HOST\r\n"
    answer = raw(site, head + AMBIGUOUS[what] + smuggled)
    assert answer.startswith(b"HTTP/1.1 4"), answer[:300]
    assert answer.count(b"HTTP/1.1 ") == 1, answer


def upload_address(site: RunningHub, content: bytes) -> str:
    oid = hashlib.sha256(content).hexdigest()
    batch = {"operation": "upload", "objects": [{"oid": oid, "size": len(content)}]}
    address = f"{site.url}/admin/ink.git/info/lfs/objects/batch"
    answer = httpx2.post(address, json=batch, headers=site.auth).json()
    return str(answer["objects"][0]["actions"]["upload"]["href"])


def test_h12_a_body_shorter_than_it_says_stores_nothing(site: RunningHub) -> None:
    content = b"x" * 100_000
    path = upload_address(site, content).removeprefix(site.url).encode()
    head = b"PUT " + path + b" HTTP/1.1\r\nHost: HOST\r\nContent-Length: 100000\r\n\r\n"
    raw(site, head + content[:50_000], finish=False)
    assert upload_address(site, content)  # still asked for
    store = site.data_dir / "store"
    assert not [p for p in store.rglob("*") if p.is_file() and p.stat().st_size >= 50_000]


def test_a8_an_upload_address_is_good_for_nothing_else(site: RunningHub) -> None:
    content = b"secret bytes"
    href = upload_address(site, content)
    assert httpx2.put(href, content=content).is_success
    for method in ("GET", "POST", "DELETE", "PATCH"):
        assert httpx2.request(method, href).status_code in (401, 404, 405, 501), method
    signature = href.partition("signature=")[2]
    for address in ("/api/whoami-v2", "/admin/ink", "/api/models/admin/ink"):
        found = httpx2.get(f"{site.url}{address}", params={"signature": signature})
        assert found.status_code in (401, 404)
        bearer = {"Authorization": f"Bearer {signature}"}
        assert httpx2.get(site.url + address, headers=bearer).status_code == 401


def test_a6_no_secret_is_in_the_log_or_an_error(site: RunningHub) -> None:
    secret, made_up = site.admin_token, "graft_" + "A" * 43
    texts = [
        httpx2.get(f"{site.url}/api/models/x/y?token={secret}").text,
        httpx2.get(f"{site.url}/api/jobs/{secret}", headers=site.auth).text.replace(secret, ""),
        httpx2.get(f"{site.url}/api/whoami-v2", headers={"Authorization": made_up}).text,
        httpx2.get(f"{site.url}/api/tokens", headers={"Authorization": f"Bearer {made_up}"}).text,
        httpx2.get(f"{site.url}/api/tokens", headers=site.auth).text,
        httpx2.put(upload_address(site, b"abc"), content=b"ab").text,
        httpx2.post(f"{site.url}/login", data={"token": made_up}).text,
    ]
    for text in [*texts, site.log.read_text()]:
        assert secret not in text
        assert made_up not in text
        assert "signature=" not in text
