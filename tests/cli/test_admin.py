"""`graft admin`: upkeep from the command line on a real data folder."""

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

from sqlmodel import select

from hub.adapters.models import Adapter
from hub.context import open_hub
from hub.settings import Settings
from hub.users import service as users
from tests.fixtures.catalogue import publish_files
from tests.fixtures.server import running_hub

ROOT = Path(__file__).parents[2]


def reindex(data: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cli", "admin", "reindex", "--data", str(data)]
    return subprocess.run(
        command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_reindex_writes_the_catalogue_again(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data", min_free_bytes=0)
    with open_hub(settings) as hub:
        assert hub.admin_token is not None
        with hub.db.read() as session:
            admin = users.viewer_of(session, hub.admin_token)
        publish_files(hub, admin, "admin/a", {"a.safetensors": b"\xff" * 9})
        with hub.db.write() as session:
            session.delete(session.exec(select(Adapter)).one())
    done = reindex(tmp_path / "data")
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 repo read anew\n", "")
    with open_hub(settings) as hub, hub.db.read() as session:
        assert session.exec(select(Adapter.path)).one() == "a.safetensors"


def test_reindex_of_nothing_and_beside_a_running_hub_is_one_sentence(tmp_path: Path) -> None:
    nothing = reindex(tmp_path / "none")
    assert nothing.returncode == 1
    assert nothing.stderr == f"error: there is no hub in {tmp_path}/none\n"
    assert not (tmp_path / "none").exists()
    with running_hub(tmp_path) as hub:
        busy = reindex(hub.data_dir)
    assert busy.returncode == 1
    assert busy.stderr == f"error: another hub is running on {hub.data_dir}\n"


def run(data: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cli", "admin", *arguments, "--data", str(data)]
    return subprocess.run(
        command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_the_audit_log_is_listed_and_verified_beside_a_running_hub(tmp_path: Path) -> None:
    with running_hub(tmp_path) as hub:
        listed = run(hub.data_dir, "audit", "list", "--action", "token")
        assert listed.stdout.split()[-3:] == ["first", "start", "(admin)"]
        sound = run(hub.data_dir, "audit", "verify")
        assert sound.stdout.startswith("2 rows are as they were written; the last hash is ")
        noted = sound.stdout.split()[-1]
        assert run(hub.data_dir, "audit", "verify", "--expect", noted).returncode == 0
        other = run(hub.data_dir, "audit", "verify", "--expect", "0" * 64)
        assert (other.returncode, "was cut off or written anew" in other.stderr) == (1, True)
    with closing(sqlite3.connect(hub.data_dir / "hub.sqlite3")) as connection, connection:
        connection.execute("DROP TRIGGER audit_no_update")
        connection.execute("UPDATE audit SET subject = 'x' WHERE id = 1")
    broken = run(hub.data_dir, "audit", "verify")
    assert (broken.returncode, broken.stdout) == (1, "")
    assert broken.stderr == "error: row 1 was changed, or the row before it was removed\n"


def test_whoever_runs_the_hub_makes_a_token_for_a_way_back_in(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    with open_hub(settings) as hub, hub.db.write() as session:
        ada = users.create_user(session, "ada")
        ada.is_disabled = True
    made = run(tmp_path / "data", "token", "ADMIN", "--days", "2")
    with open_hub(settings) as hub, hub.db.read() as session:
        viewer = users.viewer_of(session, made.stdout.strip())
        assert viewer.is_admin
    assert run(tmp_path / "data", "token", "ada").stderr == "error: ada is disabled\n"
    assert "there is no user 'eve'" in run(tmp_path / "data", "token", "eve").stderr
