"""What `graft doctor` finds, on real folders, databases and buckets."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlmodel import select
from typer.testing import CliRunner

from cli.__main__ import app
from cli.console import CommandError
from hub import doctor
from hub.context import open_hub
from hub.db import now
from hub.doctor import SKEW, Level, can_corrupt, examine, file_system_of
from hub.errors import CannotStart
from hub.repos import service as repos
from hub.repos.models import Event
from hub.settings import Settings
from hub.users import service as users
from tests.fixtures.s3 import serve_s3


def found(settings: Settings) -> dict[str, list[tuple[str, str]]]:
    """The level and the message of every finding, by check."""
    checks: dict[str, list[tuple[str, str]]] = {}
    for finding in examine(settings):
        checks.setdefault(finding.check, []).append((finding.level, finding.message))
    return checks


def failed(settings: Settings) -> list[str]:
    return [f.message for f in examine(settings) if f.level == Level.FAILED]


@pytest.fixture
def settings(tmp_path: Path, first_start: Path) -> Settings:
    """Of a hub that was started once."""
    made = Settings(data_dir=tmp_path / "data", min_free_bytes=0)
    with open_hub(made):
        pass
    return made


def test_a_good_hub_has_no_failures_and_is_not_changed(settings: Settings) -> None:
    before = {p: p.stat().st_mtime_ns for p in settings.data_dir.rglob("*") if p.is_file()}
    checks = found(settings)
    assert failed(settings) == []
    assert checks["catalogue"][0][0] == checks["store"][0][0] == Level.OK
    assert checks["browser"] == [(Level.OK, "none is needed here; only the tests use Chromium")]
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_hub_can_be_examined_while_it_runs(settings: Settings) -> None:
    with open_hub(settings):
        assert failed(settings) == []


def test_a_folder_without_a_hub_is_no_failure(tmp_path: Path) -> None:
    checks = found(Settings(data_dir=tmp_path / "new" / "data", min_free_bytes=0))
    assert checks["catalogue"] == [(Level.NOTE, "there is none yet; the first start makes it")]
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made_is_found(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "data"):
        refused = failed(Settings(data_dir=path, min_free_bytes=0))
        assert refused == [f"{tmp_path / 'file'} is a file"]


def test_a_catalogue_that_is_no_database_is_one_sentence(settings: Settings) -> None:
    path = settings.data_dir / "hub.sqlite3"
    path.write_bytes(b"not a database, of which nothing can be read")
    said = f"cannot open the catalogue {path}: file is not a database"
    assert failed(settings) == [said]
    with pytest.raises(CannotStart, match="file is not a database"), open_hub(settings):
        pass
    result = CliRunner().invoke(app, ["admin", "fsck", "--data", str(settings.data_dir)])
    assert isinstance(result.exception, CommandError)
    assert str(result.exception) == said


def test_a_folder_that_everybody_can_read_is_found(settings: Settings) -> None:
    assert "secrets" not in found(settings)  # The first start made it for one user.
    settings.data_dir.chmod(0o755)
    ((level, said),) = found(settings)["secrets"]
    assert level == Level.WARNING
    assert said.endswith(f"chmod 750 {settings.data_dir}")


def test_another_store_than_the_catalogues_is_found(settings: Settings) -> None:
    (settings.data_dir / "store" / "STORE_ID").write_text("0" * 32 + "\n")
    assert [m for m in failed(settings) if "the catalogue describes blob store" in m]


def test_secrets_that_others_can_read_are_found(settings: Settings) -> None:
    path = settings.data_dir / "secret.key"
    path.chmod(0o644)
    assert failed(settings) == [f"others can read {path}: chmod 600 {path}"]


def test_a_full_disk_is_found(settings: Settings) -> None:
    full = settings.model_copy(update={"min_free_bytes": 2**60})
    assert [m for m in failed(full) if "uploads are refused below" in m]


def test_a_clock_that_went_back_is_found(settings: Settings) -> None:
    with open_hub(settings) as hub:
        token = (settings.data_dir / "admin.token").read_text().strip()
        with hub.db.write() as session:
            repos.create_repo(session, users.viewer_of(session, token), "admin", "ink")
        with hub.db.write() as session:
            session.exec(select(Event)).one().created_at = now() + 10 * SKEW
    assert [m for m in failed(settings) if "which is in the future" in m]


def test_a_clock_that_is_not_the_disks_is_found(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600)
    (said,) = failed(settings)
    assert said.startswith("this machine and the file system differ by 3")


@pytest.mark.parametrize(
    ("line", "level"),
    [
        ("36 35 98:0 / {folder} rw - ext4 /dev/sda rw", Level.OK),
        ("36 35 98:0 / {folder} rw,noatime master:1 - nfs4 server:/x rw", Level.FAILED),
        ("36 35 98:0 / {folder} rw - fuse.sshfs host: rw", Level.FAILED),
        ("36 35 98:0 / {folder} rw - tmpfs tmpfs rw", Level.WARNING),
    ],
)
def test_the_kind_of_the_file_system_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, level: Level
) -> None:
    mounts = tmp_path / "mountinfo"
    root = "1 0 98:0 / / rw - xfs /dev/root rw"
    folder = tmp_path / "a b"
    folder.mkdir()
    escaped = str(folder).replace(" ", "\\040")
    mounts.write_text(root + "\n" + line.format(folder=escaped) + "\n")
    kind = line.split(" - ")[1].split()[0]
    assert file_system_of(folder, mounts) == kind
    assert file_system_of(tmp_path, mounts) == "xfs"
    assert file_system_of(tmp_path, tmp_path / "nothing") is None
    monkeypatch.setattr(doctor, "file_system_of", lambda _: kind)
    checks = found(Settings(data_dir=folder, min_free_bytes=0))
    assert checks["file system"][0][0] == level


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ((3, 6, 23), False),
        ((3, 7, 0), True),
        ((3, 40, 1), True),
        ((3, 44, 5), True),
        ((3, 44, 6), False),
        ((3, 50, 6), True),
        ((3, 50, 7), False),
        ((3, 51, 2), True),
        ((3, 51, 3), False),
        ((3, 52, 0), False),
    ],
)
def test_the_versions_of_sqlite_that_can_corrupt_are_known(
    version: tuple[int, int, int], expected: bool
) -> None:
    assert can_corrupt(version) is expected


def test_postgresql_is_examined_too(postgres_url: str, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data", min_free_bytes=0)
    settings = settings.model_copy(update={"database_url": SecretStr(postgres_url)})
    with open_hub(settings):
        pass
    checks = found(settings)
    assert checks["catalogue"][0][0] == Level.OK
    said = "fsync is off: what was acknowledged can be lost with the power"
    assert (Level.FAILED, said) in checks["PostgreSQL"]  # as the tests' server is set
    assert (Level.OK, "this machine and the database agree") in checks["clock"]
    assert "SQLite" not in checks


def test_a_database_that_is_away_is_one_finding(tmp_path: Path) -> None:
    url = SecretStr("postgresql://nobody@127.0.0.1:9/none")
    settings = Settings(data_dir=tmp_path, database_url=url, min_free_bytes=0)
    (said,) = failed(settings)
    assert said.startswith("cannot reach the database at 127.0.0.1:9")


def test_a_bucket_is_tried_and_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_s3(tmp_path / "s3") as server:
        folder = server.make_bucket("bucket")
        server.use(monkeypatch)
        settings = Settings(data_dir=tmp_path / "data", s3_bucket="bucket", min_free_bytes=0)
        checks = found(settings)
        assert [path for path in folder.rglob("*") if path.is_file()] == []
        assert (Level.OK, "objects come back as they were sent") in checks["bucket"]
        assert [m for level, m in checks["bucket"] if level == Level.NOTE and "SHA-256" in m]
        assert failed(settings) == []
        missing = settings.model_copy(update={"s3_bucket": "missing"})
        assert [m for m in failed(missing) if "there is no such bucket" in m]


def test_the_command_prints_and_fails(settings: Settings) -> None:
    data = ["--data", str(settings.data_dir)]
    run = CliRunner().invoke(app, ["doctor", *data])
    assert run.exit_code == 0, run.stdout
    assert "catalogue     it can be read" in run.stdout
    os.chmod(settings.data_dir / "secret.key", 0o644)
    run = CliRunner().invoke(app, ["doctor", *data, "--json"])
    assert isinstance(run.exception, CommandError)
    assert str(run.exception).startswith("1 of ")
    answer: list[dict[str, Any]] = json.loads(run.stdout)
    assert {item["level"] for item in answer} >= {"ok", "failed"}
