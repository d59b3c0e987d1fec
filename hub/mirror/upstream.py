"""Reading another hub over its Hugging Face protocol, and nothing else that is on the network.

The operator named the upstream, so it may be anywhere. Where it redirects to is not the operator's
word: that has to be https, and every address of its name public. The connection goes to the
address that was checked, so a name that answers differently the next time leads nowhere.
"""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from ipaddress import IPv6Address, ip_address
from ssl import SSLContext
from typing import Any
from urllib.parse import quote, urlsplit

import httpx2

from hub.errors import RepoNotFound, UpstreamFailed

MAX_JSON_BYTES = 64 * 2**20
MAX_REDIRECTS = 5
MAX_PAGES = 1000
TIMEOUT_S = 10.0
# A stream that gives nothing for this long is over.
SILENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """`sha256` is known of LFS files; of the others the git object id is the promise."""

    path: str
    size: int
    git_oid: str
    sha256: str | None


@dataclass(frozen=True, slots=True)
class RemoteRepo:
    commit: str
    is_private: bool


class Upstream:
    """`token` goes to the upstream's own origin only."""

    def __init__(self, url: str, token: str | None = None) -> None:
        self.url = url.rstrip("/")
        self._token = token

    def info(self, repo: str) -> RemoteRepo:
        """The repo as it is at `main` now. RepoNotFound, UpstreamFailed."""
        with self._answer(f"{self.url}/api/models/{repo}/revision/main") as answer:
            found = _json(answer)
        try:
            is_private = bool(found["private"] or found.get("gated"))
            return RemoteRepo(_commit(found["sha"]), is_private)
        except (KeyError, TypeError, ValueError) as error:
            raise UpstreamFailed(f"{self.url} does not answer as a hub does") from error

    def files(self, repo: str, commit: str) -> list[RemoteFile]:
        """All files of a commit."""
        found: list[RemoteFile] = []
        address: str | None = f"{self.url}/api/models/{repo}/tree/{commit}?recursive=true"
        for _ in range(MAX_PAGES):
            if address is None:
                return found
            with self._answer(address) as answer:
                page = _json(answer)
                following = answer.links.get("next", {}).get("url")
            # A page elsewhere would get around the rule for redirects.
            path = following and urlsplit(following)
            address = f"{_origin_of(self.url)}{path.path}?{path.query}" if path else None
            try:
                found += [_file(item) for item in page if item["type"] == "file"]
            except (KeyError, TypeError, ValueError) as error:
                raise UpstreamFailed(f"{self.url} does not answer as a hub does") from error
        raise UpstreamFailed(f"{repo} has more pages of files than {MAX_PAGES}")

    @contextmanager
    def download(
        self, repo: str, commit: str, file: RemoteFile, should_stop: Callable[[], bool]
    ) -> Iterator[Iterator[bytes]]:
        """The bytes of a file, no more than were promised; whoever keeps them checks the digest."""

        def chunks(answer: httpx2.Response) -> Iterator[bytes]:
            left = file.size
            for chunk in answer.iter_raw(2**18):
                left -= len(chunk)
                if left < 0:
                    raise UpstreamFailed(f"{repo}: {file.path} is longer than was promised")
                if should_stop():
                    raise UpstreamFailed("the hub stops")
                yield chunk

        with self._answer(f"{self.url}/{repo}/resolve/{commit}/{quote(file.path)}") as answer:
            yield chunks(answer)

    @contextmanager
    def _answer(self, address: str) -> Iterator[httpx2.Response]:
        """The answer of an address, followed by hand: each hop is checked before it is taken."""
        timeout = httpx2.Timeout(TIMEOUT_S, read=SILENCE_S)
        try:
            with httpx2.Client(timeout=timeout, trust_env=False, verify=certificates()) as client:
                for _ in range(MAX_REDIRECTS + 1):
                    with self._sent(client, address) as answer:
                        if answer.is_redirect and "Location" in answer.headers:
                            address = str(httpx2.URL(address).join(answer.headers["Location"]))
                            continue
                        _require_success(answer, self.url)
                        yield answer
                        return
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            raise UpstreamFailed(f"{self.url} does not answer: {error}") from error
        raise UpstreamFailed(f"{self.url} redirects more than {MAX_REDIRECTS} times")

    @contextmanager
    def _sent(self, client: httpx2.Client, address: str) -> Iterator[httpx2.Response]:
        headers = {"Accept-Encoding": "identity", "User-Agent": "grafthub mirror"}
        if _origin_of(address) == _origin_of(self.url):
            if self._token is not None:
                headers["Authorization"] = f"Bearer {self._token}"
            with client.stream("GET", address, headers=headers) as answer:
                yield answer
            return
        url = httpx2.URL(address)
        if url.scheme != "https" or not url.host:
            raise UpstreamFailed(f"{self.url} redirects to {_shown(address)}, which is not https")
        to = pinned(url)
        with client.stream(
            "GET", to.url, headers=headers | to.headers, extensions=to.extensions
        ) as answer:
            yield answer


@dataclass(frozen=True, slots=True)
class Pinned:
    """What a request needs to reach a name at an address that was checked."""

    url: httpx2.URL
    headers: dict[str, str]
    extensions: dict[str, str]


def pinned(url: httpx2.URL) -> Pinned:
    """UpstreamFailed unless every address of the name is public."""
    checked = public_address(url.host, url.port or (443 if url.scheme == "https" else 80))
    host = url.netloc.decode("ascii").rpartition("@")[2]
    return Pinned(url.copy_with(host=checked), {"Host": host}, {"sni_hostname": url.host})


def public_address(host: str, port: int) -> str:
    """An address of the host to connect to, after every one of them was found public.

    UpstreamFailed.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UpstreamFailed(f"{host} has no address") from error
    addresses = [str(item[4][0]).partition("%")[0] for item in found]
    for address in addresses:
        if not is_public(address):
            raise UpstreamFailed(f"{host} is {address}, which is no public address")
    return addresses[0]


@cache
def certificates() -> SSLContext:
    """Whom connections trust, read once: it takes 20 ms."""
    return httpx2.create_ssl_context(trust_env=False)


def is_public(address: str) -> bool:
    """Whether everybody on the internet would reach the same machine there."""
    ip = ip_address(address)
    if isinstance(ip, IPv6Address):
        # Addresses that carry another one inside lead to that one.
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip.sixtofour is not None or ip.teredo is not None or address.startswith("64:ff9b:"):
            return False
    return ip.is_global and not ip.is_multicast


def _origin_of(address: str) -> str:
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc}".lower()


def _shown(address: str) -> str:
    """Without the query, which may be a signature."""
    return address.partition("?")[0][:200]


def _require_success(answer: httpx2.Response, url: str) -> None:
    if answer.status_code in (401, 403, 404):
        raise RepoNotFound(f"{url} has no such repo or file, or does not show it to this hub")
    if answer.status_code != 200:
        raise UpstreamFailed(f"{url} answers with status {answer.status_code}")
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        raise UpstreamFailed(f"{url} sends compressed what was asked for as it is")


def _json(answer: httpx2.Response) -> Any:
    body = bytearray()
    for chunk in answer.iter_raw(2**16):
        body += chunk
        if len(body) > MAX_JSON_BYTES:
            raise UpstreamFailed(f"an answer has more than {MAX_JSON_BYTES // 2**20} MiB")
    try:
        return httpx2.Response(200, content=bytes(body)).json()
    except (ValueError, RecursionError) as error:
        raise UpstreamFailed("the upstream answers with something else than JSON") from error


def _file(item: Any) -> RemoteFile:
    lfs = item.get("lfs")
    sha256 = _hex(lfs["oid"], 64) if lfs else None
    if not isinstance(item["path"], str) or not isinstance(item["size"], int) or item["size"] < 0:
        raise ValueError("not a file")
    return RemoteFile(item["path"], item["size"], _hex(item["oid"], 40), sha256)


def _commit(text: Any) -> str:
    return _hex(text, 40)


def _hex(text: Any, digits: int) -> str:
    if not isinstance(text, str) or len(text) != digits or set(text) - set("0123456789abcdef"):
        raise ValueError(f"not {digits} hex digits")
    return text
