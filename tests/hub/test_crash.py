"""kill -9 at any moment: what was acknowledged is there, and nothing points at missing bytes."""

import base64
import hashlib
import json
import random
import threading
import time
from pathlib import Path

import httpx2
from sqlmodel import select

from hub.audit import broken_link
from hub.context import Hub, open_hub
from hub.repos import service as repos
from hub.repos.models import Blob, CommitEntry
from hub.settings import Settings
from hub.users.service import ANONYMOUS
from tests.fixtures.server import RunningHub, running_hub, start_hub

Ledger = dict[str, bytes]


def commit_files(hub: RunningHub, acknowledged: Ledger, seed: int) -> None:
    """Commit one file after the other until the server is gone; note each one it answered for."""
    rng = random.Random(seed)
    with httpx2.Client(base_url=hub.url, headers=hub.auth, timeout=60) as client:
        for n in range(10_000):
            path, content = f"{seed}/{n}.bin", rng.randbytes(rng.randrange(1, 200_000))
            lines = [
                {"key": "header", "value": {"summary": path}},
                {
                    "key": "file",
                    "value": {
                        "path": path,
                        "content": base64.b64encode(content).decode(),
                        "encoding": "base64",
                    },
                },
            ]
            body = "\n".join(json.dumps(line) for line in lines).encode()
            try:
                answer = client.post("/api/models/admin/ink/commit/main", content=body)
            except httpx2.TransportError:
                return
            assert answer.status_code == 200, answer.text
            acknowledged[path] = content


def check_everything(hub: Hub, acknowledged: Ledger) -> None:
    with hub.db.read() as session:
        repo = repos.get_repo(session, ANONYMOUS, "admin", "ink")
        head = repos.resolve(session, repo)
        found = {entry.path: entry.sha256 for entry in repos.entries(session, head)}
        for path, content in acknowledged.items():
            assert found[path] == hashlib.sha256(content).hexdigest()
        for blob in session.exec(select(Blob)):
            stored = b"".join(hub.store.open(blob.sha256))  # type: ignore[arg-type]
            assert (len(stored), hashlib.sha256(stored).hexdigest()) == (blob.size, blob.sha256)
        blobs = set(session.exec(select(Blob.sha256)))
        assert set(session.exec(select(CommitEntry.sha256))) <= blobs
        history, more = repos.commits(session, repo, head, limit=100_000)
        assert more is None
        assert history[-1].message == "initial commit"
        assert len(found) == len(history) - 1
        assert broken_link(session) is None
    assert not list((hub.settings.data_dir / "store" / "tmp").iterdir())


def test_every_acknowledged_commit_survives_kill_9(tmp_path: Path) -> None:
    acknowledged: Ledger = {}
    with running_hub(tmp_path) as hub:
        body = {"name": "ink"}
        url = f"{hub.url}/api/repos/create"
        assert httpx2.post(url, json=body, headers=hub.auth, timeout=60).status_code == 200
    for round in range(3):
        hub = start_hub(tmp_path)
        writers = [
            threading.Thread(target=commit_files, args=(hub, acknowledged, 10 * round + n))
            for n in range(3)
        ]
        before = len(acknowledged)
        for writer in writers:
            writer.start()
        while len(acknowledged) < before + 10 + 7 * round and writers[0].is_alive():
            time.sleep(0.01)
        hub.kill()
        for writer in writers:
            writer.join()
        with open_hub(Settings(data_dir=tmp_path / "data")) as opened:
            check_everything(opened, acknowledged)
    assert len(acknowledged) >= 30
