"""Every step of an upload, a job and a collection, ended in every way, in real processes:
run, start again, check, repeat, compare with a run that nothing happened to.

On one machine (SQLite and a folder) and on servers (PostgreSQL and a bucket of rclone's).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.engine import make_url

from hub import failpoints
from hub.adapters.service import publish
from hub.context import Hub, open_hub
from hub.db import now
from hub.repos import service as repos
from hub.repos.operations import Add
from hub.settings import Settings
from hub.upkeep import gc
from hub.users import service as users
from tests.fixtures.forge import ALL, FROM_XET, LARGE, SMALL, XORB, sha
from tests.fixtures.malformed import entry, frame
from tests.fixtures.postgres import PostgresServer
from tests.fixtures.s3 import ACCESS_KEY, SECRET_KEY, S3Server, serve_s3

ROOT = Path(__file__).parents[2]
LOCAL, SERVERS = "local", "servers"
ACTIONS = {
    LOCAL: ("kill", "raise", "nospace"),
    SERVERS: ("kill", "raise", "nospace", "nodatabase", "nobucket"),
}
# The rest of the matrix takes minutes: `make test-slow`.
ALWAYS = {
    (LOCAL, "U3", "nospace"),
    (LOCAL, "U7", "raise"),
    (LOCAL, "J3", "kill"),
    (LOCAL, "J8", "kill"),
    (LOCAL, "X4", "kill"),
    (SERVERS, "S4", "kill"),
    (SERVERS, "S5", "nodatabase"),
    (SERVERS, "U9", "kill"),
    (SERVERS, "U10", "nodatabase"),
    (SERVERS, "G4", "kill"),
    (SERVERS, "X2", "raise"),
}
KEPT = frame({"a": entry()}, bytes(16))
DUE, OLD = b"condemned before", b"condemned now"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}


@dataclass(frozen=True)
class Case:
    """A hub that scenarios may break; `settings` say where its parts are."""

    settings: dict[str, str]

    @contextmanager
    def opened(self) -> Iterator[Hub]:
        with pytest.MonkeyPatch.context() as environment:
            for name, value in CREDENTIALS.items():
                environment.setenv(name, value)
            with open_hub(Settings.model_validate({**self.settings, "min_free_bytes": 0})) as hub:
                yield hub

    @property
    def admin_token(self) -> str:
        return (Path(self.settings["data_dir"]) / "admin.token").read_text().strip()


class Forge:
    """Runs scenarios in processes of their own."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def run(self, scenario: str, case: Case, failpoint: str | None = None) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {"scenario": scenario, "settings": case.settings, "failpoint": failpoint}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        result: dict[str, Any] = json.loads(self._process.stdout.readline())
        return result

    def done(self, scenario: str, case: Case) -> Any:
        """The answer of a scenario that nothing happens to."""
        result = self.run(scenario, case)
        assert result["status"] == 0
        return result["answer"]


@pytest.fixture(scope="module")
def forge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forge]:
    log = tmp_path_factory.mktemp("forge") / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fixtures.forge"],
            cwd=ROOT,
            env=os.environ | CREDENTIALS,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    yield Forge(process)
    process.communicate(timeout=30)


def fill(case: Case) -> None:
    """One file that was acknowledged, one blob condemned nine days from now, one not."""
    with case.opened() as hub:
        with hub.db.read() as session:
            admin = users.viewer_of(session, case.admin_token)
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


class Machine:
    """A filled hub on one machine, of which there are copies."""

    def __init__(self, first_start: Path, data: Path) -> None:
        self._data = data
        shutil.copytree(first_start, data)
        fill(Case({"data_dir": str(data)}))

    @contextmanager
    def fresh(self, data: Path) -> Iterator[Case]:
        shutil.copytree(self._data, data)
        yield Case({"data_dir": str(data)})


class Servers:
    """A filled hub on servers: copies of its database and folder, and one bucket for all."""

    def __init__(self, postgres: PostgresServer, url: str, s3: S3Server, data: Path) -> None:
        self._postgres, self._data, self._client = postgres, data, s3.client()
        self._template = make_url(url).database or ""
        self._settings = {"s3_bucket": "hub", "s3_endpoint": s3.endpoint, "s3_region": "us-east-1"}
        s3.make_bucket("hub")
        fill(Case({"data_dir": str(data), "database_url": url} | self._settings))
        self._objects = {key: self._read(key) for key in self._keys()}

    @contextmanager
    def fresh(self, data: Path) -> Iterator[Case]:
        shutil.copytree(self._data, data)
        there = self._keys()
        for key in there - self._objects.keys():
            self._client.delete_object(Bucket="hub", Key=key)
        for key in self._objects.keys() - there:
            self._client.put_object(Bucket="hub", Key=key, Body=self._objects[key])
        with self._postgres.fresh(self._template) as url:
            yield Case({"data_dir": str(data), "database_url": url} | self._settings)

    def _keys(self) -> set[str]:
        listed = self._client.list_objects_v2(Bucket="hub").get("Contents", [])
        return {found["Key"] for found in listed}

    def _read(self, key: str) -> bytes:
        content: bytes = self._client.get_object(Bucket="hub", Key=key)["Body"].read()
        return content


@pytest.fixture(scope="module")
def machine(first_start: Path, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(first_start, tmp_path_factory.mktemp("template") / "data")


@pytest.fixture(scope="module")
def servers(
    postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("servers")
    (folder / "s3").mkdir()
    with ExitStack() as stack:
        s3 = stack.enter_context(serve_s3(folder / "s3"))
        url = stack.enter_context(postgres_server.fresh())
        yield Servers(postgres_server, url, s3, folder / "data")


@pytest.fixture
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Case]:
    """Its parameter says where."""
    name = {LOCAL: "machine", SERVERS: "servers"}[request.param]
    template: Machine | Servers = request.getfixturevalue(name)
    with template.fresh(tmp_path / "data") as case:
        yield case


def sound(forge: Forge, case: Case) -> dict[str, Any]:
    """After a new start: no error, no row of bytes that are gone, and the acknowledged file."""
    seen: dict[str, Any] = forge.done("check", case)
    worse = [f for f in seen["findings"] if f["severity"] == "error" or f["code"] == "lost-orphan"]
    assert worse == []
    assert seen["files"]["admin/ink"]["ink.safetensors"] == sha(KEPT)
    assert seen["temporary"] == []
    return seen


def cases(letter: str) -> pytest.MarkDecorator:
    found = []
    for where, actions in ACTIONS.items():
        for point in points(where, letter):
            for action in actions:
                marks = () if is_quick(where, point, action) else (pytest.mark.slow,)
                found.append(pytest.param(where, point, action, marks=marks))
    return pytest.mark.parametrize(("case", "point", "action"), found, indirect=["case"])


def points(where: str, letter: str) -> list[str]:
    if letter == "U":
        commit = ["U9", "U10"]
        bucket = [name for name in failpoints.POINTS if name[0] == "S"]
        folder = [name for name in failpoints.POINTS if name[0] == "U" and name not in commit]
        return (folder if where == LOCAL else bucket) + commit
    return [name for name in failpoints.POINTS if name[0] == letter]


def is_quick(where: str, point: str, action: str) -> bool:
    is_short = where == LOCAL and point[0] in "UG" and action == "kill"
    return is_short or (where, point, action) in ALWAYS


everywhere = pytest.mark.parametrize("case", [LOCAL, SERVERS], indirect=True)


def faulted(result: dict[str, Any], action: str) -> None:
    """That the fault was there: a test whose point is never reached would prove nothing."""
    assert result["reached"]
    if action == "kill":
        assert result["status"] == -signal.SIGKILL


def refused(answer: list[Any], action: str) -> bool:
    """Whether an upload was; one that lost a server for a moment may still have been done."""
    assert answer[0] == 200 or answer[0] >= 500
    assert answer[0] != 200 or action in ("nodatabase", "nobucket")
    return bool(answer[0] != 200)


@cases("U")
def test_an_upload_that_ends_anywhere_is_whole_or_not_there(
    forge: Forge, case: Case, point: str, action: str
) -> None:
    result = forge.run("upload", case, f"{point}:{action}")
    faulted(result, action)
    was_refused = action == "kill" or refused(result["answer"], action)
    if action == "nospace" and point[0] == "U" and point not in ("U9", "U10"):
        assert result["answer"][0] == 507
    files = sound(forge, case)["files"]["admin/ink"]
    assert ("large.bin" in files) == ("small.txt" in files)
    assert ("small.txt" in files) == (point == "U10" or not was_refused)
    again = forge.done("upload", case)
    assert again[0] == 200
    seen = sound(forge, case)
    assert seen["files"]["admin/ink"] == {
        "ink.safetensors": sha(KEPT),
        "small.txt": sha(SMALL),
        "large.bin": sha(LARGE),
        "commits": "3",
    }
    assert seen["blobs"] == sorted(map(sha, (KEPT, DUE, OLD, SMALL, LARGE)))
    assert forge.done("upload", case) == again


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "point"),
    [(LOCAL, "U1"), (LOCAL, "U5"), (LOCAL, "U8"), (SERVERS, "S1"), (SERVERS, "S5")],
    indirect=["case"],
)
def test_the_second_file_of_a_commit_breaks_as_cleanly(
    forge: Forge, case: Case, point: str
) -> None:
    faulted(forge.run("upload", case, f"{point}:kill:2"), "kill")
    assert "small.txt" not in sound(forge, case)["files"]["admin/ink"]
    assert forge.done("upload", case)[0] == 200
    sound(forge, case)


@cases("X")
def test_a_xet_upload_that_ends_anywhere_goes_on(
    forge: Forge, case: Case, point: str, action: str
) -> None:
    result = forge.run("xet", case, f"{point}:{action}")
    faulted(result, action)
    was_refused = action == "kill" or refused(result["answer"], action)
    assert ("xet.bin" in sound(forge, case)["files"]["admin/ink"]) != was_refused
    again = forge.done("xet", case)
    assert again[0] == 200
    seen = sound(forge, case)
    assert seen["files"]["admin/ink"]["xet.bin"] == sha(FROM_XET)
    assert seen["blobs"] == sorted([*map(sha, (KEPT, DUE, OLD, FROM_XET, XORB.data))])
    assert forge.done("xet", case) == again


@cases("G")
def test_a_collection_that_ends_anywhere_is_finished_by_the_next(
    forge: Forge, case: Case, point: str, action: str
) -> None:
    result = forge.run("collect", case, f"{point}:{action}")
    faulted(result, action)
    assert action in ("nodatabase", "nobucket") or result["status"] != 0
    sound(forge, case)
    for _ in range(2):
        forge.done("collect", case)
    seen = sound(forge, case)
    # What was condemned now goes in a run a day later.
    assert seen["blobs"] == sorted((sha(KEPT), sha(OLD)))


@pytest.mark.slow
@pytest.mark.parametrize("point", ["G1", "G2", "G3", "G4", "G5"])
@everywhere
def test_the_same_bytes_can_be_published_after_a_broken_collection(
    forge: Forge, case: Case, point: str
) -> None:
    faulted(forge.run("collect", case, f"{point}:kill"), "kill")
    with case.opened() as hub:
        with hub.db.read() as session:
            admin = users.viewer_of(session, case.admin_token)
        add = Add("again.txt", hub.store.put([DUE]), lfs=False)
        publish(hub, admin, "admin", "ink", operations=[add], message="again")
    forge.done("collect", case)
    assert sound(forge, case)["files"]["admin/ink"]["again.txt"] == sha(DUE)


@cases("J")
def test_a_job_that_ends_anywhere_has_one_result(
    forge: Forge, case: Case, point: str, action: str
) -> None:
    if point == "J1":
        result = forge.run("submit", case, f"{point}:{action}")
        faulted(result, action)
        was_refused = result["answer"] is None
        assert was_refused or action == "nobucket"
        sound(forge, case)
        if was_refused:
            assert forge.done("work", case) == []
            forge.done("submit", case)
    else:
        forge.done("submit", case)
        result = forge.run("work", case, f"{point}:{action}")
        faulted(result, action)
        sound(forge, case)
    over = []
    if result["answer"] == ["failed"] and action == "nobucket":
        # A store that stays away ends a job, which its user can start again.
        over = ["failed"]
        forge.done("submit", case)
    assert sorted(forge.done("work", case)) == [*over, "succeeded"]
    # A worker's folder on PostgreSQL outlives it until a start after its lease.
    assert sorted(forge.done("work", case)) == [*over, "succeeded"]
    seen = sound(forge, case)
    assert seen["scratch"] == []
    files = seen["files"]["admin/result"]
    assert sorted(files) == ["README.md", "commits", "merged.safetensors"]
    assert files["commits"] == "2"


@pytest.mark.slow
@pytest.mark.parametrize("case", [LOCAL], indirect=True)
@pytest.mark.parametrize("point", ["U6", "U7", "U8"])
def test_a_result_that_was_becoming_a_blob_becomes_one(
    forge: Forge, case: Case, point: str
) -> None:
    forge.done("submit", case)
    faulted(forge.run("work", case, f"{point}:kill"), "kill")
    sound(forge, case)
    assert forge.done("work", case) == ["succeeded"]
    seen = sound(forge, case)
    assert seen["scratch"] == []
    assert seen["files"]["admin/result"]["commits"] == "2"


def test_an_unknown_failpoint_is_refused() -> None:
    for text in ("U99:kill", "U1:explode"):
        with pytest.raises(ValueError, match="names no point or no action"):
            failpoints.arm(text)


def test_every_point_is_in_the_code_once() -> None:
    code = "".join(path.read_text() for path in (ROOT / "hub").rglob("*.py"))
    for point in failpoints.POINTS:
        assert code.count(f'reach("{point}")') == 1, point
