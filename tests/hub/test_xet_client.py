"""huggingface_hub with hf_xet against a real server process: large files, in every way they go."""

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import numpy as np
import pytest
from huggingface_hub import HfApi
from sqlmodel import select

from hub.blobs.store import Sha256
from hub.context import open_hub
from hub.xet.models import Xorb
from tests.fixtures.s3 import serve_s3
from tests.fixtures.server import RunningHub, running_hub, settings_of, start_hub
from tests.hub.conftest import make_user

MiB = 2**20
XORBS = 'route="/xet/{cache}/v1/xorbs/{prefix}/{xorb}",method="POST",status="200"'
LFS = 'route="/{namespace}/{name}.git/info/lfs/objects/{oid}",method="PUT",status="200"'

Client = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def ada(folder: Path) -> str:
    """A token of a user who is not the administrator; made before the server starts."""
    with open_hub(settings_of(folder)) as hub:
        return make_user(hub, "ada")[1]


@pytest.fixture(scope="module")
def hub(folder: Path, ada: str) -> Iterator[RunningHub]:
    with running_hub(folder, max_regular_bytes=MiB, workers=0) as hub:
        yield hub


def environment(hub: RunningHub, home: Path, token: str | None = None) -> dict[str, str]:
    """As a user would have it: only HF_ENDPOINT and HF_TOKEN say where and who."""
    told = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": token or hub.admin_token}
    return os.environ | told


def script(repo: str, path: Path) -> list[str]:
    """Upload a file or a folder, as a pull request if PROPOSE is set, and print the commit."""
    code = f"""
import os
from pathlib import Path
from huggingface_hub import HfApi
api, path = HfApi(), Path({str(path)!r})
how = {{"repo_id": {repo!r}, "create_pr": "PROPOSE" in os.environ}}
api.create_repo({repo!r}, exist_ok=True)
if path.is_dir():
    made = api.upload_folder(folder_path=path, **how)
else:
    made = api.upload_file(path_or_fileobj=path, path_in_repo=path.name, **how)
print(made.oid)
"""
    return [sys.executable, "-c", code]


@pytest.fixture
def upload(hub: RunningHub, tmp_path: Path) -> Client:
    """The clients of one test share a cache, as those of one machine do."""

    def run(
        repo: str, path: Path, token: str | None = None, **extra: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            script(repo, path),
            check=False,
            env=environment(hub, tmp_path / "hf", token) | extra,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def weights(size: int, seed: int) -> bytes:
    """Like a trained file: its bytes can be packed by group."""
    return np.random.default_rng(seed).standard_normal(size // 4).astype(np.float32).tobytes()


def count(hub: RunningHub, route: str) -> int:
    text = httpx2.get(f"{hub.url}/metrics", headers=hub.auth, timeout=60).text
    line = next((line for line in text.splitlines() if route in line), "} 0")
    return int(line.rsplit(" ", 1)[1])


def same(hub: RunningHub, repo: str, file: Path, token: str | None = None) -> bool:
    """Whether a plain download has the file's bytes, and its metadata their digest."""
    address = f"{hub.url}/{repo}/resolve/main/{file.name}"
    headers = {"Authorization": f"Bearer {token or hub.admin_token}"}
    answer = httpx2.get(address, headers=headers, timeout=60).raise_for_status()
    assert not any(name.startswith("x-xet") for name in answer.headers)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert answer.headers["ETag"] == f'"{digest}"'
    return hashlib.sha256(answer.content).hexdigest() == digest


def test_a_folder_goes_up_whole_and_the_second_time_not_at_all(
    hub: RunningHub, upload: Client, tmp_path: Path
) -> None:
    files = tmp_path / "in"
    files.mkdir()
    (files / "random.safetensors").write_bytes(os.urandom(5 * MiB + 3))
    (files / "trained.safetensors").write_bytes(weights(8 * MiB, 1))
    (files / "zeros.bin").write_bytes(bytes(4 * MiB))
    (files / "small.txt").write_text("small")
    done = upload("admin/folder", files)
    assert done.returncode == 0, done.stderr
    # Nobody is told to switch anything off.
    assert "xet" not in done.stderr.lower()
    api = HfApi(endpoint=hub.url, token=hub.admin_token)
    assert api.model_info("admin/folder").sha == done.stdout.strip()
    for file in files.iterdir():
        if file.suffix != ".txt":
            assert same(hub, "admin/folder", file)
    sent = count(hub, XORBS)
    assert sent >= 1
    again = upload("admin/folder", files)
    assert again.stdout == done.stdout, again.stderr
    other = upload("admin/folder-2", files)
    assert other.returncode == 0, other.stderr
    assert same(hub, "admin/folder-2", files / "trained.safetensors")
    assert count(hub, XORBS) == sent
    assert count(hub, LFS) == 0


def test_a_changed_file_sends_what_changed(hub: RunningHub, upload: Client, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    first = os.urandom(12 * MiB)
    file.write_bytes(first)
    assert upload("admin/changed", file).returncode == 0
    file.write_bytes(first[: 6 * MiB] + os.urandom(1000) + first[6 * MiB :])
    before = blobs(hub)
    done = upload("admin/changed", file)
    assert done.returncode == 0, done.stderr
    assert same(hub, "admin/changed", file)
    rebuilt = hashlib.sha256(file.read_bytes()).hexdigest()
    new = {name: size for name, size in blobs(hub).items() if name not in before}
    assert new.pop(rebuilt) == 12 * MiB + 1000
    assert 0 < sum(new.values()) < MiB


def blobs(hub: RunningHub) -> dict[str, int]:
    """Sizes by digest; the server goes on running."""
    folder = hub.data_dir / "store/blobs"
    return {path.name: path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def test_without_xet_the_same_file_goes_over_lfs(
    hub: RunningHub, upload: Client, tmp_path: Path
) -> None:
    file = tmp_path / "lfs.safetensors"
    file.write_bytes(os.urandom(3 * MiB))
    before = count(hub, LFS)
    done = upload("admin/over-lfs", file, HF_HUB_DISABLE_XET="1")
    assert done.returncode == 0, done.stderr
    assert same(hub, "admin/over-lfs", file)
    assert count(hub, LFS) == before + 1
    # And now with Xet, which finds that the file is there.
    assert upload("admin/over-lfs", file).stdout == done.stdout


def test_two_users_of_one_machine_do_not_share_what_was_sent(
    hub: RunningHub, upload: Client, tmp_path: Path, ada: str
) -> None:
    file = tmp_path / "shared.safetensors"
    file.write_bytes(os.urandom(3 * MiB))
    assert upload("admin/mine", file).returncode == 0
    sent = count(hub, XORBS)
    done = upload("ada/hers", file, token=ada)
    assert done.returncode == 0, done.stderr
    assert count(hub, XORBS) == sent + 1
    assert same(hub, "ada/hers", file, token=ada)


def test_who_may_not_write_is_told_so(
    hub: RunningHub, upload: Client, tmp_path: Path, ada: str
) -> None:
    file = tmp_path / "forbidden.safetensors"
    file.write_bytes(os.urandom(3 * MiB))
    assert upload("admin/closed", file).returncode == 0
    done = upload("admin/closed", file, token=ada)
    assert done.returncode != 0
    assert "403" in done.stderr


def test_a_reader_proposes_a_large_file(
    hub: RunningHub, upload: Client, tmp_path: Path, ada: str
) -> None:
    file = tmp_path / "proposed.safetensors"
    file.write_bytes(os.urandom(3 * MiB))
    HfApi(endpoint=hub.url, token=hub.admin_token).create_repo("admin/open")
    done = upload("admin/open", file, token=ada, PROPOSE="1")
    assert done.returncode == 0, done.stderr
    address = f"{hub.url}/admin/open/resolve/refs%2Fpr%2F1/{file.name}"
    assert httpx2.get(address, timeout=60).content == file.read_bytes()


def test_a_killed_upload_goes_on_where_it_was(
    hub: RunningHub, upload: Client, tmp_path: Path
) -> None:
    file = tmp_path / "killed.safetensors"
    file.write_bytes(os.urandom(100 * MiB))
    api = HfApi(endpoint=hub.url, token=hub.admin_token)
    api.create_repo("admin/killed")
    before = count(hub, XORBS)
    with subprocess.Popen(
        script("admin/killed", file),
        env=environment(hub, tmp_path / "hf"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as client:
        try:
            wait_for_a_xorb(hub, client, before)
        finally:
            client.kill()
    assert api.list_repo_files("admin/killed") == []
    done = upload("admin/killed", file)
    assert done.returncode == 0, done.stderr
    assert same(hub, "admin/killed", file)


def test_a_hub_that_is_killed_in_the_middle_is_waited_for(tmp_path: Path) -> None:
    file = tmp_path / "waits.safetensors"
    file.write_bytes(os.urandom(100 * MiB))
    hub = start_hub(tmp_path / "hub", max_regular_bytes=MiB, workers=0)
    client = subprocess.Popen(
        script("admin/waits", file),
        env=environment(hub, tmp_path / "hf"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for_a_xorb(hub, client, 0)
        hub.kill()
        hub = start_hub(
            tmp_path / "hub", max_regular_bytes=MiB, workers=0, port=hub.url.rsplit(":")[-1]
        )
        _, errors = client.communicate(timeout=300)
        assert client.returncode == 0, errors
        assert same(hub, "admin/waits", file)
    finally:
        client.kill()
        client.communicate()
        hub.stop()


def wait_for_a_xorb(hub: RunningHub, client: "subprocess.Popen[str]", before: int) -> None:
    while count(hub, XORBS) == before:
        assert client.poll() is None
        time.sleep(0.01)


def test_after_a_loss_of_xorbs_the_second_try_works(tmp_path: Path) -> None:
    """A client takes for sent what it sent before; the hub gives it an address it does not know."""
    first, second = tmp_path / "first.bin", tmp_path / "second.bin"
    first.write_bytes(os.urandom(3 * MiB))
    second.write_bytes(first.read_bytes() + os.urandom(3 * MiB))

    def upload(hub: RunningHub, file: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            script("admin/lost", file),
            check=False,
            env=environment(hub, tmp_path / "hf"),
            capture_output=True,
            text=True,
            timeout=300,
        )

    with running_hub(tmp_path / "hub", max_regular_bytes=MiB, workers=0) as hub:
        assert upload(hub, first).returncode == 0
    with open_hub(settings_of(tmp_path / "hub")) as opened, opened.db.read() as session:
        for xorb in session.exec(select(Xorb)):
            opened.store.delete(Sha256(xorb.sha256))
    with running_hub(
        tmp_path / "hub", max_regular_bytes=MiB, workers=0, port=hub.url.rsplit(":")[-1]
    ) as hub:
        refused = upload(hub, second)
        assert refused.returncode != 0
        assert "400" in refused.stderr
        done = upload(hub, second)
        assert done.returncode == 0, done.stderr
        assert same(hub, "admin/lost", second)
        assert same(hub, "admin/lost", first)


def test_blobs_and_xorbs_may_lie_in_a_bucket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "bucket.safetensors"
    file.write_bytes(weights(9 * MiB, 2) + os.urandom(3 * MiB))
    with serve_s3(tmp_path / "s3") as server:
        server.make_bucket("bucket")
        server.use(monkeypatch)
        with running_hub(
            tmp_path / "hub", max_regular_bytes=MiB, workers=0, s3_bucket="bucket"
        ) as hub:
            for _ in range(2):
                done = subprocess.run(
                    script("admin/bucket", file),
                    check=False,
                    env=environment(hub, tmp_path / "hf"),
                    capture_output=True,
                    text=True,
                    timeout=300,
                )
                assert done.returncode == 0, done.stderr
            assert count(hub, XORBS) == 1
            assert same(hub, "admin/bucket", file)
