"""Every step of an upload, a job and a collection, ended in every way, in real processes:
run, start again, check, repeat, compare with a run that nothing happened to."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from hub import failpoints
from hub.adapters.service import publish
from hub.context import open_hub
from hub.db import now
from hub.repos import service as repos
from hub.repos.operations import Add
from hub.settings import Settings
from hub.upkeep import gc
from hub.users import service as users
from tests.fixtures.forge import ALL, LARGE, SMALL, sha
from tests.fixtures.malformed import entry, frame

ROOT = Path(__file__).parents[2]
ACTIONS = ("kill", "raise", "nospace")
# The rest of the matrix takes minutes: `make test-slow`.
ALWAYS = {("U3", "nospace"), ("U7", "raise"), ("J3", "kill"), ("J8", "kill")}
KEPT = frame({"a": entry()}, bytes(16))
DUE, OLD = b"condemned before", b"condemned now"


class Forge:
    """Runs scenarios in processes of their own."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def run(self, scenario: str, data: Path, failpoint: str | None = None) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {"scenario": scenario, "data": str(data), "failpoint": failpoint}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        result: dict[str, Any] = json.loads(self._process.stdout.readline())
        return result

    def done(self, scenario: str, data: Path) -> Any:
        """The answer of a scenario that nothing happens to."""
        result = self.run(scenario, data)
        assert result["status"] == 0
        return result["answer"]


@pytest.fixture(scope="module")
def forge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forge]:
    log = tmp_path_factory.mktemp("forge") / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fixtures.forge"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    yield Forge(process)
    process.communicate(timeout=30)


@pytest.fixture(scope="module")
def template(first_start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub with one file that was acknowledged, one blob condemned nine days from now, one not."""
    data = tmp_path_factory.mktemp("template") / "data"
    shutil.copytree(first_start, data)
    with open_hub(Settings(data_dir=data, min_free_bytes=0)) as hub:
        with hub.db.read() as session:
            admin = users.viewer_of(session, (data / "admin.token").read_text().strip())
        for name, content in (("ink", KEPT), ("gone", DUE), ("later", OLD)):
            with hub.db.write() as session:
                repos.create_repo(session, admin, "admin", name)
            add = Add(f"{name}.safetensors", hub.store.put([content]), lfs=False)
            publish(hub, admin, "admin", name, operations=[add], message="add")
        for name in ("gone", "later"):
            with hub.db.write() as session:
                repo = repos.get_repo(session, admin, "admin", name)
                repos.delete_repo(session, admin, repo)
            if name == "gone":
                moment = now() + timedelta(days=8)
                planned = replace(gc.plan(hub, moment), orphans=gc.Blobs({}))
                gc.collect(hub, planned, confirm=ALL, without_backup=True, moment=moment)
    return data


@pytest.fixture
def data(template: Path, tmp_path: Path) -> Path:
    shutil.copytree(template, tmp_path / "data")
    return tmp_path / "data"


def sound(forge: Forge, data: Path) -> dict[str, Any]:
    """After a new start: no error, and the acknowledged file is there."""
    seen: dict[str, Any] = forge.done("check", data)
    assert [finding for finding in seen["findings"] if finding["severity"] == "error"] == []
    assert seen["files"]["admin/ink"]["ink.safetensors"] == sha(KEPT)
    assert seen["temporary"] == []
    return seen


def cases(letter: str) -> list[Any]:
    points = [name for name in failpoints.POINTS if name[0] == letter]
    return [
        pytest.param(point, action, marks=() if _is_quick(point, action) else pytest.mark.slow)
        for point in points
        for action in ACTIONS
    ]


def _is_quick(point: str, action: str) -> bool:
    return (point, action) in ALWAYS or (action == "kill" and point[0] != "J")


def faulted(result: dict[str, Any], action: str) -> None:
    """That the fault was there: a test whose point is never reached would prove nothing."""
    if action == "kill":
        assert result["status"] == -signal.SIGKILL


@pytest.mark.parametrize(("point", "action"), cases("U"))
def test_an_upload_that_ends_anywhere_is_whole_or_not_there(
    forge: Forge, data: Path, point: str, action: str
) -> None:
    result = forge.run("upload", data, f"{point}:{action}")
    faulted(result, action)
    if action != "kill":
        assert result["answer"][0] >= 500
        if action == "nospace" and point not in ("U9", "U10"):
            assert result["answer"][0] == 507
    files = sound(forge, data)["files"]["admin/ink"]
    assert ("large.bin" in files) == ("small.txt" in files) == (point == "U10")
    again = forge.done("upload", data)
    assert again[0] == 200
    seen = sound(forge, data)
    assert seen["files"]["admin/ink"] == {
        "ink.safetensors": sha(KEPT),
        "small.txt": sha(SMALL),
        "large.bin": sha(LARGE),
        "commits": "3",
    }
    assert seen["blobs"] == sorted(map(sha, (KEPT, DUE, OLD, SMALL, LARGE)))
    assert forge.done("upload", data) == again


@pytest.mark.slow
@pytest.mark.parametrize("point", ["U1", "U5", "U8"])
def test_the_second_file_of_a_commit_breaks_as_cleanly(
    forge: Forge, data: Path, point: str
) -> None:
    faulted(forge.run("upload", data, f"{point}:kill:2"), "kill")
    assert "small.txt" not in sound(forge, data)["files"]["admin/ink"]
    assert forge.done("upload", data)[0] == 200
    sound(forge, data)


@pytest.mark.parametrize(("point", "action"), cases("G"))
def test_a_collection_that_ends_anywhere_is_finished_by_the_next(
    forge: Forge, data: Path, point: str, action: str
) -> None:
    result = forge.run("collect", data, f"{point}:{action}")
    assert result["status"] != 0
    faulted(result, action)
    sound(forge, data)
    for _ in range(2):
        forge.done("collect", data)
    seen = sound(forge, data)
    # What was condemned now goes in a run a day later.
    assert seen["blobs"] == sorted((sha(KEPT), sha(OLD)))


@pytest.mark.slow
@pytest.mark.parametrize("point", ["G1", "G2", "G3", "G4", "G5"])
def test_the_same_bytes_can_be_published_after_a_broken_collection(
    forge: Forge, data: Path, point: str
) -> None:
    forge.run("collect", data, f"{point}:kill")
    with open_hub(Settings(data_dir=data, min_free_bytes=0)) as hub:
        with hub.db.read() as session:
            admin = users.viewer_of(session, (data / "admin.token").read_text().strip())
        add = Add("again.txt", hub.store.put([DUE]), lfs=False)
        publish(hub, admin, "admin", "ink", operations=[add], message="again")
    forge.done("collect", data)
    assert sound(forge, data)["files"]["admin/ink"]["again.txt"] == sha(DUE)


@pytest.mark.parametrize(("point", "action"), cases("J"))
def test_a_job_that_ends_anywhere_has_one_result(
    forge: Forge, data: Path, point: str, action: str
) -> None:
    if point == "J1":
        result = forge.run("submit", data, f"{point}:{action}")
        assert result["status"] != 0
        assert forge.done("work", data) == []
        sound(forge, data)
        forge.done("submit", data)
    else:
        forge.done("submit", data)
        result = forge.run("work", data, f"{point}:{action}")
        faulted(result, action)
        sound(forge, data)
    assert forge.done("work", data) == ["succeeded"]
    seen = sound(forge, data)
    assert seen["scratch"] == []
    files = seen["files"]["admin/result"]
    assert sorted(files) == ["README.md", "commits", "merged.safetensors"]
    assert files["commits"] == "2"


def test_an_unknown_failpoint_is_refused() -> None:
    for text in ("U99:kill", "U1:explode"):
        with pytest.raises(ValueError, match="names no point or no action"):
            failpoints.arm(text)


def test_every_point_is_in_the_code_once() -> None:
    code = "".join(path.read_text() for path in (ROOT / "hub").rglob("*.py"))
    for point in failpoints.POINTS:
        assert code.count(f'reach("{point}")') == 1, point
