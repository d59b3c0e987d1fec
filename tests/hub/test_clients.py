"""One story with every major version of huggingface_hub, with and without hf_xet, and with curl."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.fixtures.clients import client_environment
from tests.fixtures.server import RunningHub, running_hub

STORY = Path(__file__).with_name("client_story.py")
# The last of each major version before the one that the other tests use.
VERSIONS = {"0": "huggingface_hub==0.36.2", "1": "huggingface_hub==1.33.0"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    with running_hub(tmp_path_factory.mktemp("clients"), workers=0) as hub:
        yield hub


def python_of(version: str) -> Path:
    if version == "2":
        return Path(sys.executable)
    try:
        return client_environment(f"client-{version}", VERSIONS[version])
    except subprocess.CalledProcessError as error:
        # pip says this of a network that is not there; anything else is a failure.
        if "Failed to establish a new connection" not in error.stderr:
            raise AssertionError(error.stderr) from error
        pytest.skip(f"{VERSIONS[version]} cannot be installed: the package index is not reached")


def bytes_sent(hub: RunningHub) -> int:
    """How many files the hub has answered with, so far."""
    text = httpx2.get(f"{hub.url}/metrics", headers=hub.auth).text
    counts = re.findall(r'requests_total\{route="[^"]*resolve[^"]*",method="GET".*\} (\d+)', text)
    return sum(map(int, counts))


@pytest.mark.parametrize(
    ("version", "has_xet"),
    [
        ("0", False),
        ("1", True),
        ("2", False),
        # `test_xet_client` has the present version's.
        pytest.param("0", True, marks=pytest.mark.slow),
        pytest.param("1", False, marks=pytest.mark.slow),
    ],
)
def test_every_major_client_tells_the_same_story(
    hub: RunningHub, tmp_path: Path, version: str, has_xet: bool
) -> None:
    environment = {name: value for name, value in os.environ.items() if name[:3] != "HF_"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment.pop("PYTHONPATH", None)
    if not has_xet:
        environment["HF_HUB_DISABLE_XET"] = "1"
    repo = f"admin/story-{version}-{'xet' if has_xet else 'lfs'}"
    command = [str(python_of(version)), str(STORY), hub.url, hub.admin_token, repo, str(tmp_path)]
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as story:
        assert story.stdin is not None
        assert story.stdout is not None
        assert story.stderr is not None
        if story.stdout.readline() != "DOWNLOADED\n":
            pytest.fail(story.stderr.read())
        before = bytes_sent(hub)
        assert before > 0
        story.stdin.write("\n")
        story.stdin.flush()
        assert story.stdout.readline() == "AGAIN\n", story.stderr.read()
        assert bytes_sent(hub) == before, "a second snapshot_download asked for files again"
        rest, errors = story.communicate("\n", timeout=120)
    assert rest.startswith(f"DONE {version}."), errors


def test_curl_resumes_in_the_middle(hub: RunningHub, tmp_path: Path) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    content = os.urandom(3_000_000)
    repo = f"{hub.url}/api/models/admin/curled"
    httpx2.post(f"{hub.url}/api/repos/create", json={"name": "curled"}, headers=hub.auth)
    lines = [
        {"key": "header", "value": {"summary": "one"}},
        {"key": "file", "value": {"path": "a.bin", "content": base64.b64encode(content).decode()}},
    ]
    body = "\n".join(json.dumps(line) for line in lines)
    httpx2.post(f"{repo}/commit/main", content=body, headers=hub.auth).raise_for_status()
    address, part = f"{hub.url}/admin/curled/resolve/main/a.bin", tmp_path / "a.bin"
    part.write_bytes(content[:1_000_000])
    subprocess.run([curl, "-sfL", "-C", "-", "-o", str(part), address], check=True)
    assert part.read_bytes() == content
    done = subprocess.run([curl, "-sf", "-r", "10-19", address], check=True, capture_output=True)
    assert done.stdout == content[10:20]
    tail = subprocess.run([curl, "-sf", "-r", "-5", address], check=True, capture_output=True)
    assert tail.stdout == content[-5:]
    beyond = ["-s", "-o", "/dev/null", "-w", "%{http_code}", "-r", "3000000-", address]
    assert subprocess.run([curl, *beyond], check=True, capture_output=True).stdout == b"416"
