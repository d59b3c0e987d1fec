"""kill -9 at any moment: what was acknowledged is there, and nothing points at missing bytes."""

import base64
import hashlib
import json
import random
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest

from hub.context import Hub, open_hub
from hub.repos import commits, refs
from hub.repos import service as repos
from hub.upkeep.fsck import fsck, is_sound
from hub.users import service as users
from tests.fixtures.s3 import serve_s3
from tests.fixtures.server import RunningHub, running_hub, settings_of, start_hub

# Acknowledged files: repo -> path -> digest.
Ledger = dict[str, dict[str, str]]
WRITERS = 3


def commit_files(hub: RunningHub, acknowledged: dict[str, str], name: str, writer: int) -> None:
    """Commit one file after the other until the server is gone; note each one it answered for.

    The first writer sends its files over Git LFS, the others within their commits.
    """
    rng = random.Random(f"{name} {writer}")
    commit = commit_lfs_file if writer == 0 else commit_file
    with httpx2.Client(base_url=hub.url, headers=hub.auth, timeout=60) as client:
        for n in range(10_000):
            path, content = f"{writer}/{n}.bin", rng.randbytes(rng.randrange(1, 200_000))
            try:
                commit(client, name, path, content)
            except httpx2.TransportError:
                return
            acknowledged[path] = sha(content)


def commit_file(client: httpx2.Client, name: str, path: str, content: bytes) -> None:
    encoded = base64.b64encode(content).decode()
    commit_line(client, name, "file", {"path": path, "content": encoded, "encoding": "base64"})


def commit_lfs_file(client: httpx2.Client, name: str, path: str, content: bytes) -> None:
    lfs = {"oid": sha(content), "size": len(content)}
    batch = {"operation": "upload", "transfers": ["basic"], "objects": [lfs]}
    answer = client.post(f"/admin/{name}.git/info/lfs/objects/batch", json=batch)
    assert answer.status_code == 200, answer.text
    address = answer.json()["objects"][0]["actions"]["upload"]["href"]
    answer = client.put(address, content=content)
    assert answer.status_code == 200, answer.text
    commit_line(client, name, "lfsFile", {"path": path, "algo": "sha256"} | lfs)


def commit_line(client: httpx2.Client, name: str, key: str, file: dict[str, Any]) -> None:
    lines = [
        {"key": "header", "value": {"summary": file["path"]}},
        {"key": key, "value": file},
    ]
    body = "\n".join(json.dumps(line) for line in lines)
    answer = client.post(f"/api/models/admin/{name}/commit/main", content=body)
    assert answer.status_code == 200, answer.text


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def check_repo(hub: Hub, name: str, acknowledged: dict[str, str]) -> None:
    """Nothing that was answered for is missing; each writer may have one more that was not."""
    token = (hub.settings.data_dir / "admin.token").read_text().strip()
    with hub.db.read() as session:
        repo = repos.get_repo(session, users.viewer_of(session, token), "admin", name)
        head = refs.resolve(session, repo)
        found = {entry.path: entry.sha256 for entry in commits.entries(session, head)}
        assert found.items() >= acknowledged.items()
        assert len(found) <= len(acknowledged) + WRITERS
        history, more = commits.history(session, repo, head, limit=100_000)
        assert more is None
        assert history[-1].message == "initial commit"
        assert len(found) == len(history) - 1


def kill_rounds(folder: Path, rounds: int, seed: int, **settings: Any) -> int:
    """Kill the server so many times while clients commit; how many commits were acknowledged.

    Every round is killed up to half a second after its first 0 to 3 commits were answered.
    """
    rng = random.Random(seed)
    ledger: Ledger = {}
    with running_hub(folder, workers=0, **settings):
        pass
    opened = settings_of(folder, **settings)
    for round in range(rounds):
        name = f"r{round}"
        hub = start_hub(folder, workers=0, **settings)
        made = httpx2.post(
            f"{hub.url}/api/repos/create", json={"name": name}, headers=hub.auth, timeout=60
        )
        assert made.status_code == 200
        acknowledged = ledger[name] = {}
        writers = [
            threading.Thread(target=commit_files, args=(hub, acknowledged, name, n))
            for n in range(WRITERS)
        ]
        for writer in writers:
            writer.start()
        while len(acknowledged) < round % 4 and writers[0].is_alive():
            time.sleep(0.01)
        time.sleep(rng.random() / 2)
        hub.kill()
        for writer in writers:
            writer.join()
        with open_hub(opened) as after:
            check_repo(after, name, acknowledged)
            # Every byte is read now and then, all lengths and references each time.
            findings = list(fsck(after, full=round % 50 == 0))
            assert is_sound(findings), findings
    with open_hub(opened) as after:
        for name, acknowledged in ledger.items():
            check_repo(after, name, acknowledged)
        findings = list(fsck(after, full=True))
        assert is_sound(findings), findings
    if opened.database_url is None:  # Others may share the folder; theirs stay for a day.
        assert not list((folder / "data" / "store" / "tmp").iterdir())
    return sum(len(paths) for paths in ledger.values())


def test_every_acknowledged_commit_survives_kill_9(tmp_path: Path) -> None:
    assert kill_rounds(tmp_path, 4, seed=1) >= 6


def test_every_acknowledged_commit_survives_kill_9_on_postgresql(
    tmp_path: Path, postgres_url: str
) -> None:
    assert kill_rounds(tmp_path, 2, seed=2, database_url=postgres_url) >= 1


@pytest.mark.slow
@pytest.mark.timeout(2 * 3600)
def test_every_acknowledged_commit_survives_kill_9_five_hundred_times(tmp_path: Path) -> None:
    assert kill_rounds(tmp_path, 500, seed=3) >= 750


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("blobs", ["in a folder", "in a bucket"])
def test_every_acknowledged_commit_survives_kill_9_fifty_times_on_postgresql(
    tmp_path: Path, postgres_url: str, monkeypatch: pytest.MonkeyPatch, blobs: str
) -> None:
    settings = {"database_url": postgres_url}
    with ExitStack() as stack:
        if blobs == "in a bucket":
            (tmp_path / "s3").mkdir()
            s3 = stack.enter_context(serve_s3(tmp_path / "s3"))
            s3.use(monkeypatch)
            s3.make_bucket("hub")
            settings |= {"s3_bucket": "hub", "s3_endpoint": s3.endpoint}
        assert kill_rounds(tmp_path, 50, seed=4, **settings) >= 75
