"""Filling an empty hub, and bringing a backup back."""

import shutil
import time
from pathlib import Path

import httpx2
import pytest

from cli.serve import demo_folders
from hub.context import Hub, open_hub
from hub.demo import seed
from hub.errors import CannotStart
from hub.repos import commits, refs
from hub.repos import service as repos
from hub.settings import Settings
from hub.users.service import ANONYMOUS, Viewer
from tests.fixtures.server import running_hub


def demo_folder(folder: Path) -> Path:
    (folder / "images").mkdir(parents=True)
    (folder / "README.md").write_bytes(b"# Ink\n")
    (folder / "images" / "a.png").write_bytes(b"not a real picture")
    return folder


def paths(hub: Hub, namespace: str, name: str) -> list[str]:
    with hub.db.read() as session:
        repo = repos.get_repo(session, ANONYMOUS, namespace, name)
        return [entry.path for entry in commits.entries(session, refs.resolve(session, repo))]


def messages(hub: Hub, namespace: str, name: str) -> list[str]:
    with hub.db.read() as session:
        repo = repos.get_repo(session, ANONYMOUS, namespace, name)
        found, _ = commits.history(session, repo, refs.resolve(session, repo))
        return [commit.message for commit in found]


def test_seeding_twice_is_seeding_once(hub: Hub, tmp_path: Path) -> None:
    folders = {"demo/ink": demo_folder(tmp_path / "ink")}
    seed(hub, folders)
    seed(hub, folders)
    assert paths(hub, "demo", "ink") == ["README.md", "images/a.png"]
    assert messages(hub, "demo", "ink") == ["Demo catalogue", "initial commit"]


def test_a_deleted_demo_repo_stays_deleted(hub: Hub, admin: Viewer, tmp_path: Path) -> None:
    folders = {"demo/ink": demo_folder(tmp_path / "ink")}
    seed(hub, folders)
    with hub.db.write() as session:
        repos.delete_repo(session, admin, repos.get_repo(session, admin, "demo", "ink"))
    seed(hub, folders)
    with hub.db.read() as session:
        assert repos.list_repos(session, admin) == []


def test_seeding_that_was_interrupted_is_continued(hub: Hub, admin: Viewer, tmp_path: Path) -> None:
    folders = {"demo/ink": demo_folder(tmp_path / "ink"), "demo/wax": tmp_path / "missing"}
    (tmp_path / "missing").mkdir()
    seed(hub, {"demo/wax": tmp_path / "missing"})
    assert paths(hub, "demo", "wax") == []
    (tmp_path / "missing" / "README.md").write_bytes(b"# Wax\n")
    seed(hub, folders)
    assert paths(hub, "demo", "wax") == ["README.md"]
    assert paths(hub, "demo", "ink") == ["README.md", "images/a.png"]


def test_a_catalogue_without_its_blobs_is_refused_and_not_repaired(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data", min_free_bytes=0)
    with open_hub(settings) as hub:
        seed(hub, {"demo/ink": demo_folder(tmp_path / "ink")})
    shutil.move(tmp_path / "data" / "store", tmp_path / "elsewhere")
    with pytest.raises(CannotStart, match="nothing was changed"), open_hub(settings):
        pass
    shutil.move(tmp_path / "elsewhere", tmp_path / "data" / "store")
    with open_hub(settings) as hub:
        assert paths(hub, "demo", "ink") == ["README.md", "images/a.png"]


def test_a_server_shows_the_shipped_catalogue_even_if_it_was_stopped_meanwhile(
    tmp_path: Path,
) -> None:
    with running_hub(tmp_path, demo=True) as first:
        assert httpx2.get(first.url, timeout=60).status_code == 200
    with running_hub(tmp_path, demo=True) as hub:
        shown: set[str] = set()
        while len(shown) < len(demo_folders()):
            time.sleep(0.2)  # Asking costs the server what it needs for publishing.
            found = httpx2.get(f"{hub.url}/api/adapters?limit=100", timeout=60).json()
            shown = {item["repo"] for item in found["items"]}
        assert shown == set(demo_folders())
