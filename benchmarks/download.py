"""How fast does the hub send and take a large file, next to a server that only calls sendfile(2)?

    python benchmarks/download.py [--gib 2] [--dir FOLDER] [--repeat 5]

Over loopback, from the page cache, one connection. The peer is nginx where it is installed, else a
loop around `socket.sendfile`, which does nothing a server has to do and is thus the harder peer.
The upload goes over Git LFS with SHA-256 and fsync; its peer is `cp` with fsync and `sha256sum`.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

import httpx2

from merge.formats.hashes import sha256_file

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=int, default=2)
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="download-") as name:
        folder = Path(name)
        file = make_file(folder / "large", options.gib)
        size = file.stat().st_size
        with hub(folder) as (url, token), peer(file) as (peer_name, peer_url):
            put = timed(lambda: upload(url, token, file))
            copied = timed(lambda: copy_and_hash(file, folder / "copy"))
            ours, theirs = [], []
            for _ in range(options.repeat):
                theirs.append(timed(lambda: download(peer_url, size)))
                ours.append(timed(lambda: download(f"{url}/admin/large/resolve/main/f", size)))
    print(f"| {options.gib} GiB over loopback | MB/s | of the peer |")
    print("|---|---|---|")
    print(f"| {peer_name} | {size / min(theirs) / 1e6:.0f} | |")
    print(f"| download | {size / min(ours) / 1e6:.0f} | {min(theirs) / min(ours):.2f} |")
    print(f"| cp, fsync, sha256sum | {size / copied / 1e6:.0f} | |")
    print(f"| upload | {size / put / 1e6:.0f} | {copied / put:.2f} |")


def make_file(path: Path, gib: float) -> Path:
    block = os.urandom(2**24)
    with path.open("wb") as file:
        for _ in range(round(gib * 2**6)):
            file.write(block)
    return path


@contextmanager
def hub(folder: Path, *, demo: bool = False) -> Iterator[tuple[str, str]]:
    """A hub of its own on a free port: its address and the administrator's token."""
    what = "--demo" if demo else "--no-demo"
    command = [sys.executable, "-m", "cli", "serve", what, "--port", "0", "--data"]
    with subprocess.Popen(
        [*command, str(folder / "data")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        lines = iter(process.stdout)
        url = next(line for line in lines if line.startswith("Grafthub is at ")).split()[-1]
        next(line for line in lines if line.startswith("Token file: "))
        try:
            yield url, (folder / "data/admin.token").read_text().strip()
        finally:
            process.terminate()


@contextmanager
def peer(file: Path) -> Iterator[tuple[str, str]]:
    """What serves the same file: its name and address."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
        if shutil.which("nginx") is None:
            sender = multiprocessing.Process(target=_send_forever, args=(probe, file), daemon=True)
            sender.start()
            yield "sendfile(2) alone", f"http://127.0.0.1:{port}/"
            sender.terminate()
            return
    config = file.with_name("nginx.conf")
    # Its workers become another user, who may not look into a temporary folder.
    user = "user root;" if os.geteuid() == 0 else ""
    config.write_text(
        f"daemon off; {user} pid {file.parent}/nginx.pid; error_log stderr; events {{}} http {{"
        f" sendfile on; access_log off; server {{ listen 127.0.0.1:{port}; root {file.parent}; }} }}"
    )
    with subprocess.Popen(["nginx", "-c", str(config)], stderr=subprocess.DEVNULL) as process:
        time.sleep(1)
        try:
            yield "nginx", f"http://127.0.0.1:{port}/{file.name}"
        finally:
            process.terminate()


def _send_forever(listener: socket.socket, file: Path) -> None:
    while True:
        connection, _ = listener.accept()
        with connection, file.open("rb") as opened:
            connection.recv(2**16)
            head = f"HTTP/1.1 200 OK\r\nContent-Length: {file.stat().st_size}\r\n\r\n"
            connection.sendall(head.encode())
            connection.sendfile(opened)


def download(url: str, size: int) -> None:
    """As little work as a client can do: the same for both servers."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port)) as connection:
        request = f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n"
        connection.sendall(request.encode())
        buffer = bytearray(2**20)
        head = b""
        while b"\r\n\r\n" not in head:
            head += connection.recv(2**16)
        assert b" 200 " in head.partition(b"\r\n")[0], head
        left = size - len(head.partition(b"\r\n\r\n")[2])
        while left and (count := connection.recv_into(buffer)):
            left -= count
        assert left == 0, f"{left} bytes did not come"


def upload(url: str, token: str, file: Path) -> float:
    """A commit of the file as `f` of a repo with its name; seconds of the request with its bytes."""
    client = httpx2.Client(headers={"Authorization": f"Bearer {token}"}, timeout=600)
    size, digest = file.stat().st_size, sha256_file(file)
    repo = f"{url}/admin/{file.name}"
    made = client.post(f"{url}/api/repos/create", json={"name": file.name})
    if made.status_code != HTTPStatus.CONFLICT:
        made.raise_for_status()
    wanted = {"operation": "upload", "objects": [{"oid": digest, "size": size}]}
    batch = client.post(f"{repo}.git/info/lfs/objects/batch", json=wanted).json()
    with file.open("rb") as opened:
        started = time.perf_counter()
        address = batch["objects"][0]["actions"]["upload"]["href"]
        headers = {"Content-Length": str(size)}
        httpx2.put(address, content=opened, headers=headers, timeout=600).raise_for_status()
        seconds = time.perf_counter() - started
    pointer = {"path": "f", "algo": "sha256", "oid": digest, "size": size}
    lines = [
        {"key": "header", "value": {"summary": file.name}},
        {"key": "lfsFile", "value": pointer},
    ]
    commit = "\n".join(map(json.dumps, lines))
    address = f"{url}/api/models/admin/{file.name}/commit/main"
    client.post(address, content=commit).raise_for_status()
    return seconds


def copy_and_hash(file: Path, copy: Path) -> None:
    """What an upload cannot do without: the client's digest, the bytes on disk, their digest."""
    subprocess.run(["sha256sum", file], check=True, stdout=subprocess.DEVNULL)
    shutil.copyfile(file, copy)
    with copy.open("rb") as opened:
        os.fsync(opened.fileno())
    subprocess.run(["sha256sum", copy], check=True, stdout=subprocess.DEVNULL)


def timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
