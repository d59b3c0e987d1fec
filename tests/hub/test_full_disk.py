"""A disk that is really full, catalogue and blobs on it: a small file system of its own."""

import hashlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from hub.context import open_hub
from hub.settings import Settings
from hub.upkeep.fsck import fsck, is_sound
from tests.fixtures.server import RunningHub, running_hub, start_hub
from tests.hub.test_crash import commit_file, commit_lfs_file

DISK, BALLAST = 16 * 2**20, 6 * 2**20
SIZES = (400_000, 50_000, 5_000, 500, 1)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ("-t", "tmpfs", "-o", f"size={DISK}", "none", str(folder))
    if subprocess.run(["mount", *options], capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(client: httpx2.Client) -> tuple[dict[str, bytes], list[tuple[str, bytes]]]:
    """Commit ever smaller files until not even the smallest is taken: those that were, and not."""
    taken, refused = {}, []
    for size in SIZES:
        for n in range(10_000):
            path, content = f"{size}/{n}", hashlib.shake_128(f"{size} {n}".encode()).digest(size)
            try:
                (commit_lfs_file if n % 2 else commit_file)(client, "ink", path, content)
            except AssertionError as error:
                if "disk is full" not in str(error):
                    raise
                refused.append((path, content))
                break
            taken[path] = content
    return taken, refused


def require(client: httpx2.Client, taken: dict[str, bytes]) -> None:
    for path, content in taken.items():
        assert client.get(f"/admin/ink/resolve/main/{path}").content == content


def client_of(hub: RunningHub) -> httpx2.Client:
    return httpx2.Client(base_url=hub.url, headers=hub.auth, timeout=60)


@pytest.mark.slow
def test_a_full_disk_takes_nothing_and_loses_nothing(disk: Path) -> None:
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(BALLAST))
    hub = start_hub(disk, workers=0, min_free_bytes=0)
    with client_of(hub) as client:
        assert client.post("/api/repos/create", json={"name": "ink"}).status_code == 200
        taken, refused = fill(client)
        assert len(refused) == len(SIZES)
        require(client, taken)
        answer = client.post("/api/repos/create", json={"name": "other"})
        assert answer.status_code == 507
    hub.kill()
    with running_hub(disk, workers=0, min_free_bytes=0) as hub, client_of(hub) as client:
        require(client, taken)
        assert client.post("/api/repos/create", json={"name": "other"}).status_code == 507
    ballast.unlink()
    with running_hub(disk, workers=0, min_free_bytes=0) as hub, client_of(hub) as client:
        require(client, taken)
        for path, content in refused:
            commit_file(client, "ink", path, content)
            taken[path] = content
        require(client, taken)
    with open_hub(Settings(data_dir=disk / "data", min_free_bytes=0)) as opened:
        findings = list(fsck(opened, full=True))
        assert is_sound(findings), findings
