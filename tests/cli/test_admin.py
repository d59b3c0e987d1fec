"""`graft admin`: upkeep from the command line on a real data folder."""

import subprocess
import sys
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
