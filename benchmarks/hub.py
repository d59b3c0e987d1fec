"""How much of the machine's own speed is left when a hub stands in between?

    python benchmarks/hub.py [--mib 1024] [--dir FOLDER] [--seconds 5] [--repeat 3]

Metadata reads by one client and by 50 at once, next to uvicorn with an application that answers
the same bytes from memory. Upload over Git LFS with SHA-256 and fsync, next to `sha256sum` and to
`cp` with fsync. Download next to nginx where it is installed, else next to a loop around
sendfile(2), by one client and by 50 at once. All over loopback, each pair in turns.
"""

import argparse
import asyncio
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from download import download, hub, make_file, peer, timed, upload

CLIENTS = 50
APP = """
import sys, uvicorn
body = open(sys.argv[1], "rb").read()
async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    start = {"type": "http.response.start", "status": 200}
    await send(start | {"headers": [(b"content-length", str(len(body)).encode())]})
    await send({"type": "http.response.body", "body": body})
uvicorn.run(app, port=int(sys.argv[2]), log_level="error", lifespan="off")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    os.environ["GRAFT_REQUESTS_PER_ADDRESS"] = "0"  # What is measured is no abuse.
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="hub-") as name:
        folder = Path(name)
        file = make_file(folder / "large.safetensors", options.mib / 1024)
        size = file.stat().st_size
        with hub(folder) as (url, token):
            rows = _uploads(url, token, file, options.repeat)
            rows += _metadata(f"{url}/api/models/admin/large", folder, options)
            with peer(file) as (peer_name, peer_url):
                ours = f"{url}/admin/large/resolve/main/f"
                rows += _downloads(ours, peer_url, peer_name, size, options.repeat)
    print("| | hub | peer | of the peer |")
    print("|---|---|---|---|")
    for what, here, there, unit, peer_name in rows:
        print(
            f"| {what} | {here:.0f} {unit} | {peer_name}: {there:.0f} {unit} | {here / there:.2f} |"
        )


Row = tuple[str, float, float, str, str]


def _uploads(url: str, token: str, file: Path, repeat: int) -> list[Row]:
    size = file.stat().st_size / 1e6
    copy = file.with_name("copy")
    hashed, copied = [], []
    for _ in range(repeat):
        hashed.append(_run("sha256sum", file))
        copied.append(_run("sh", "-c", 'cp "$0" "$1" && sync "$1"', file, copy))
        copy.unlink()
    put = timed(lambda: upload(url, token, file))
    what = "upload (the client's digest, LFS, the hub's digest, fsync)"
    return [
        (what, size / put, size / min(hashed), "MB/s", "sha256sum"),
        ("", size / put, size / min(copied), "MB/s", "cp, fsync"),
    ]


def _run(*command: str | Path) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def _downloads(ours: str, theirs: str, peer_name: str, size: int, repeat: int) -> list[Row]:
    rows: list[Row] = []
    for clients in (1, CLIENTS):
        here, there = [], []
        for _ in range(repeat):
            there.append(_at_once(clients, theirs, size))
            here.append(_at_once(clients, ours, size))
        total = clients * size / 1e6
        what = f"download, {clients} at once" if clients > 1 else "download"
        rows.append((what, total / min(here), total / min(there), "MB/s", peer_name))
    return rows


def _at_once(clients: int, url: str, size: int) -> float:
    """How long it takes until all of them have the file."""
    threads = [threading.Thread(target=download, args=(url, size)) for _ in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started


def _metadata(url: str, folder: Path, options: argparse.Namespace) -> list[Row]:
    import httpx2

    answer = folder / "answer.json"
    answer.write_bytes(httpx2.get(url).raise_for_status().content)
    rows: list[Row] = []
    with _bare(answer) as bare:
        for clients in (1, CLIENTS):
            here, there = [], []
            for _ in range(options.repeat):
                there.append(asyncio.run(_reads(bare, clients, options.seconds)))
                here.append(asyncio.run(_reads(url, clients, options.seconds)))
            what = f"metadata reads, {clients} at once" if clients > 1 else "metadata reads"
            peer_name = "uvicorn from memory"
            rows.append((what, statistics.median(here), statistics.median(there), "/s", peer_name))
    return rows


@contextmanager
def _bare(answer: Path) -> Iterator[str]:
    """uvicorn that answers these bytes to everything."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with subprocess.Popen([sys.executable, "-c", APP, str(answer), str(port)]) as process:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/"
        process.terminate()


async def _reads(url: str, clients: int, seconds: float) -> float:
    """Answers a second, over connections that stay open."""
    parts = urlsplit(url)
    request = f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode()
    until = time.perf_counter() + seconds

    async def read() -> int:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        n = 0
        while time.perf_counter() < until:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                raise SystemExit(f"{url} answers {head.splitlines()[0].decode()}")
            length = next(x for x in head.lower().split(b"\r\n") if x.startswith(b"content-length"))
            await reader.readexactly(int(length.split(b":")[1]))
            n += 1
        writer.close()
        return n

    return sum(await asyncio.gather(*(read() for _ in range(clients)))) / seconds


if __name__ == "__main__":
    main()
