"""How much of the machine's own speed is left when a hub stands in between?

    python benchmarks/hub.py [--mib 1024] [--dir FOLDER] [--seconds 1.5] [--repeat 3] [--most-s 10]
                             [--database postgresql://USER@HOST/AN_EMPTY_DATABASE]

Reads of metadata by one client and by 50 at once, next to FastAPI with one row of SQLite: the same
bytes, found by their name and sent. Upload over Git LFS with SHA-256 and fsync, next to `sha256sum`
and to `cp` with fsync: the request with the bytes alone, and all that a client does, its own digest
included. Download next to nginx where it is installed, else next to a loop around sendfile(2), by
one client and, of a file 16 times smaller, by 50 at once. All over loopback, each pair in turns, at
least once and again while `--repeat` and `--most-s` seconds a pair allow it.
"""

import argparse
import asyncio
import os
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
from download import download, hub, make_file, peer, upload

from cli.serve import demo_folders

CLIENTS = 50
SMALLER = 16  # what 50 clients have of the large file
APP = """
import sqlite3, sys
import uvicorn
from fastapi import FastAPI, Request, Response

app = FastAPI()
found = sqlite3.connect(sys.argv[1], check_same_thread=False)

@app.api_route("/{path:path}", methods=["GET", "HEAD"])
async def read(request: Request, path: str) -> Response:
    row = found.execute("SELECT body FROM answer WHERE path = ?", (path,)).fetchone()
    return Response(row[0], media_type="application/json")

uvicorn.run(app, port=int(sys.argv[2]), log_level="error")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--most-s", type=float, default=10)
    parser.add_argument("--database")
    options = parser.parse_args()
    if options.database is not None:
        os.environ["GRAFT_DATABASE_URL"] = options.database
    os.environ["GRAFT_REQUESTS_PER_ADDRESS"] = "0"  # What is measured is no abuse.
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="hub-") as name:
        folder = Path(name)
        large = make_file(folder / "large", options.mib / 1024)
        small = make_file(folder / "small", max(options.mib / SMALLER, 16) / 1024)
        with hub(folder, demo=True) as (url, token):
            adapters = _seeded(url)
            rows = _uploads(url, token, large, options)
            upload(url, token, small)
            rows += _metadata(url, token, adapters, folder, options)
            for file, clients in ((large, 1), (small, CLIENTS)):
                with peer(file) as (peer_name, theirs):
                    ours = f"{url}/admin/{file.name}/resolve/main/f"
                    rows.append(_downloads(ours, theirs, peer_name, file, clients, options))
    print(f"Load average of the minute before, on {os.cpu_count()} cores: {before:.1f}")
    print("| | hub | peer | of the peer |")
    print("|---|---|---|---|")
    for what, here, there, unit, peer_name in rows:
        print(
            f"| {what} | {here:.0f} {unit} | {peer_name}: {there:.0f} {unit} | {here / there:.2f} |"
        )


Row = tuple[str, float, float, str, str]


def _rounds(options: argparse.Namespace) -> Iterator[int]:
    """At least one, then more while there is time for them."""
    started = time.perf_counter()
    for n in range(options.repeat):
        if n and (n + 1) / n * (time.perf_counter() - started) > options.most_s:
            return
        yield n


def _uploads(url: str, token: str, file: Path, options: argparse.Namespace) -> list[Row]:
    copy = file.with_name("copy")
    hashed, copied, sent, whole = [], [], [], []
    with tempfile.TemporaryDirectory(dir=file.parent) as name:
        for n in _rounds(options):
            # A file that is here would not be sent again.
            fresh = make_file(Path(name) / "large", options.mib / 1024) if n else file
            hashed.append(_run("sha256sum", file))
            copied.append(_run("sh", "-c", 'cp "$0" "$1" && sync "$1"', file, copy))
            copy.unlink()
            started = time.perf_counter()
            sent.append(upload(url, token, fresh))
            whole.append(time.perf_counter() - started)
    size = file.stat().st_size / 1e6
    alone, everything = "upload, the bytes: SHA-256, fsync", "upload, with the client's own digest"
    return [
        (alone, size / min(sent), size / min(hashed), "MB/s", "sha256sum"),
        (alone, size / min(sent), size / min(copied), "MB/s", "cp, fsync"),
        (everything, size / min(whole), size / min(hashed), "MB/s", "sha256sum"),
    ]


def _run(*command: str | Path) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def _downloads(
    ours: str, theirs: str, peer_name: str, file: Path, clients: int, options: argparse.Namespace
) -> Row:
    size = file.stat().st_size
    here, there = [], []
    for _ in _rounds(options):
        there.append(_at_once(clients, theirs, size))
        here.append(_at_once(clients, ours, size))
    total = clients * size / 1e6
    what = f"download, {clients} at once" if clients > 1 else "download"
    return what, total / min(here), total / min(there), "MB/s", peer_name


def _at_once(clients: int, url: str, size: int) -> float:
    """How long it takes until all of them have the file."""
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        for done in [threads.submit(download, url, size) for _ in range(clients)]:
            done.result()
    return time.perf_counter() - started


def _seeded(url: str) -> int:
    """How many adapters there are once the demo catalogue is complete."""
    while len(httpx2.get(f"{url}/api/models?limit=1000").json()) < len(demo_folders()):
        time.sleep(1)
    time.sleep(1)
    total: int = httpx2.get(f"{url}/api/adapters").json()["total"]
    return total


@dataclass(frozen=True)
class Read:
    """A request that is repeated, and by how many clients at once."""

    what: str
    path: str
    method: str = "GET"
    token: str | None = None
    clients: int = 1


def _metadata(
    url: str, token: str, adapters: int, folder: Path, options: argparse.Namespace
) -> list[Row]:
    info = "/api/models/admin/large"
    reads = [
        Read("a repo and its files", info),
        Read(f"the same, {CLIENTS} at once", info, clients=CLIENTS),
        Read("the same, with a token", info, token=token),
        Read("files of a revision", f"{info}/tree/main"),
        Read("HEAD of a file", "/admin/large/resolve/main/f", method="HEAD"),
        Read("who has this token", "/api/whoami-v2", token=token),
        Read(f"search, {adapters} adapters", "/api/adapters"),
    ]
    with sqlite3.connect(folder / "answers.sqlite3") as answers:
        answers.execute("CREATE TABLE answer (path TEXT PRIMARY KEY, body BLOB)")
        for path, read in {read.path: read for read in reads}.items():
            headers = _auth(read.token)
            answer = httpx2.request(read.method, url + path, headers=headers).raise_for_status()
            answers.execute("INSERT INTO answer VALUES (?, ?)", (path[1:], answer.content))
    rows: list[Row] = []
    with _bare(folder / "answers.sqlite3") as bare:
        for read in reads:
            here, there = [], []
            for _ in _rounds(options):
                there.append(asyncio.run(_answers(bare, read, options.seconds)))
                here.append(asyncio.run(_answers(url, read, options.seconds)))
            peer_name = "FastAPI, one row of SQLite"
            medians = statistics.median(here), statistics.median(there)
            rows.append((f"reads: {read.what}", *medians, "/s", peer_name))
    return rows


def _auth(token: str | None) -> dict[str, str]:
    return {} if token is None else {"Authorization": f"Bearer {token}"}


@contextmanager
def _bare(answers: Path) -> Iterator[str]:
    """What FastAPI leaves of a read that needs one row."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with subprocess.Popen([sys.executable, "-c", APP, str(answers), str(port)]) as process:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                time.sleep(0.1)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


async def _answers(url: str, what: Read, seconds: float) -> float:
    """Answers a second, over connections that stay open."""
    parts = urlsplit(url)
    headers = {"Host": parts.netloc, **_auth(what.token)}
    lines = [f"{what.method} {what.path} HTTP/1.1", *(f"{n}: {v}" for n, v in headers.items())]
    request = "\r\n".join([*lines, "", ""]).encode()
    until = time.perf_counter() + seconds

    async def read() -> int:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        n = 0
        while time.perf_counter() < until:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                said = head.splitlines()[0].decode()
                raise SystemExit(f"{url}{what.path} answers {said}")
            length = next(x for x in head.lower().split(b"\r\n") if x.startswith(b"content-length"))
            if what.method == "GET":
                await reader.readexactly(int(length.split(b":")[1]))
            n += 1
        writer.close()
        return n

    return sum(await asyncio.gather(*(read() for _ in range(what.clients)))) / seconds


if __name__ == "__main__":
    main()
