"""The catalogue is lost, the blobs are there: what the manifests say comes back."""

import shutil
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlmodel import select
from typer.testing import CliRunner

from cli.__main__ import app
from hub.adapters.service import publish
from hub.blobs.store import Sha256
from hub.context import Hub, open_hub
from hub.limits.models import Quota
from hub.repos import commits, refs
from hub.repos import service as repos
from hub.repos.models import Blob, Redirect, Ref
from hub.repos.operations import Add
from hub.upkeep import gc
from hub.upkeep.fsck import fsck, is_sound
from hub.upkeep.manifests import MAGIC, Manifest, pack, write_missing, write_recent
from hub.upkeep.rebuild import NotEmpty, rebuild
from hub.users.models import NameTombstone, User
from hub.users.service import ANONYMOUS, Viewer
from tests.hub.conftest import both_databases, make_user


def commit(hub: Hub, viewer: Viewer, full_name: str, path: str, content: bytes) -> str:
    namespace, name = full_name.split("/")
    with hub.db.write() as session:
        repos.create_repo(session, viewer, namespace, name, exist_ok=True)
    add = Add(path, hub.store.put([content]), lfs=path.endswith(".bin"))
    return publish(hub, viewer, namespace, name, operations=[add], message=path).id


def state(hub: Hub, viewer: Viewer) -> object:
    """Everything that is promised to come back."""
    with hub.db.read() as session:
        there = sorted(repos.list_repos(session, viewer), key=lambda repo: repo.key)
        history = {
            repo.full_name: [
                (made.id, made.message, made.author, made.created_at, [
                    entry.model_dump() for entry in commits.entries(session, made)
                ])
                for made in commits.history(session, repo, refs.resolve(session, repo))[0]
            ]
            for repo in there
        }  # fmt: skip
        names = [(repo.id, repo.full_name, repo.private, repo.head) for repo in there]
        pointing = sorted(
            (r.repo_id, r.kind, r.name, r.commit_id) for r in session.exec(select(Ref))
        )
        stones = select(NameTombstone.type, NameTombstone.key, User.name)
        reserved = sorted(session.exec(stones.join(User)).all())
        moved = sorted((r.type, r.key, r.repo_id) for r in session.exec(select(Redirect)))
        return names, history, pointing, reserved, moved


def lose_catalogue(hub: Hub) -> None:
    if hub.settings.database_url is not None:
        with hub.db.writer.begin() as connection:
            connection.execute(text("DROP SCHEMA public CASCADE"))
            connection.execute(text("CREATE SCHEMA public"))
    hub.db.close()
    for path in hub.settings.data_dir.glob("hub.sqlite3*"):
        path.unlink()


def admin_of(hub: Hub) -> Viewer:
    from hub.users import service as users

    token = (hub.settings.data_dir / "admin.token").read_text().strip()
    with hub.db.read() as session:
        return users.viewer_of(session, token)


@pytest.fixture
def full(hub: Hub, admin: Viewer) -> Hub:
    """Repos of two users, one private, one moved, one deleted; a tag and a branch."""
    ada, _ = make_user(hub, "ada")
    commit(hub, admin, "admin/ink", "a.txt", b"a")
    first = commit(hub, admin, "admin/ink", "b.bin", b"b" * 5000)
    commit(hub, ada, "ada/oil", "c.txt", b"c")
    commit(hub, admin, "admin/gone", "d.txt", b"d")
    write_missing(hub)
    with hub.db.write() as session:
        ink = repos.get_repo(session, admin, "admin", "ink")
        refs.create_tag(session, admin, ink, "v1", first)
        refs.create_branch(session, admin, ink, "dev")
        oil = repos.get_repo(session, ada, "ada", "oil")
        repos.update_settings(session, ada, oil, private=True)
        repos.move_repo(session, ada, oil, "ada", "water")
        repos.delete_repo(session, admin, repos.get_repo(session, admin, "admin", "gone"))
    commit(hub, admin, "admin/ink", "e.txt", b"e")
    return hub


@both_databases
def test_everything_a_manifest_says_comes_back(full: Hub, admin: Viewer) -> None:
    write_missing(full)
    before = state(full, admin)
    lose_catalogue(full)
    command = ["admin", "reindex", "--from-blobs", "--data", str(full.settings.data_dir)]
    done = CliRunner().invoke(app, command)
    assert (done.exit_code, done.stdout) == (
        0,
        "2 repos and 6 commits are back\n2 repos read anew\n",
    )
    with open_hub(full.settings) as again:
        assert state(again, admin_of(again)) == before
        assert is_sound(fsck(again, full=True))
        with again.db.read() as session:
            assert session.get_one(Quota, "admin").used_bytes == 5002
            water = repos.moved_to(session, admin_of(again), "ada", "oil")
            assert water is not None
            assert water.full_name == "ada/water"
            assert not repos.is_unused(session, "admin/gone")
            assert [r.full_name for r in repos.list_repos(session, ANONYMOUS)] == ["admin/ink"]
        commit(again, admin_of(again), "admin/new", "f.txt", b"f")
        assert write_missing(again) > 0
        assert write_missing(again) == 0


@both_databases
def test_manifests_are_written_once_and_follow_changes(hub: Hub, admin: Viewer) -> None:
    commit(hub, admin, "admin/ink", "a.txt", b"a")
    assert write_recent(hub) == 3
    assert write_missing(hub) == 0
    with hub.db.write() as session:
        refs.create_tag(session, admin, repos.get_repo(session, admin, "admin", "ink"), "v1")
    assert write_missing(hub) == 1
    with hub.db.write() as session:
        repos.delete_repo(session, admin, repos.get_repo(session, admin, "admin", "ink"))
    assert write_recent(hub) == 1  # that its name is reserved
    assert write_missing(hub) == 1  # that it is gone
    assert write_missing(hub) == 0
    with hub.db.read() as session:
        subjects = sorted(row.subject for row in session.exec(select(Manifest)))
        assert subjects == ["names/admin", "repo/1"]
    commit(hub, admin, "admin/ink", "a.txt", b"a")
    assert write_missing(hub) == 4  # and that it is not any more
    assert gc.plan(hub).n == 0


def test_what_only_looks_like_a_manifest_changes_nothing(full: Hub, admin: Viewer) -> None:
    write_missing(full)
    forged = pack(full, {"kind": "deleted", "repo": 1, "version": 99})
    forged = forged[: len(MAGIC)] + b"0" * 64 + forged[len(MAGIC) + 64 :]
    commit(full, admin, "admin/ink", "forged.txt", forged)
    write_missing(full)
    before = state(full, admin)
    lose_catalogue(full)
    with open_hub(full.settings) as again:
        assert rebuild(again).unsigned == 1
        assert state(again, admin_of(again)) == before


def test_a_commit_without_its_bytes_is_left_out_and_named(full: Hub, admin: Viewer) -> None:
    write_missing(full)
    with full.db.read() as session:
        water = repos.get_repo(session, admin, "ada", "water")
        head = refs.resolve(session, water)
        (entry,) = commits.entries(session, head)
    lose_catalogue(full)
    full.store.delete(Sha256(entry.sha256))
    with open_hub(full.settings) as again:
        made = rebuild(again)
        assert made.lost_commits == (head.id,)
        assert made.lost_repos == ("ada/water",)
        assert [found for found in fsck(again) if found.promise == "I2"] == []


def test_a_catalogue_with_repos_is_never_rebuilt_over(full: Hub, admin: Viewer) -> None:
    before = state(full, admin)
    with pytest.raises(NotEmpty, match="only where it is empty"):
        rebuild(full)
    assert state(full, admin) == before


def test_another_hub_cannot_read_the_manifests(full: Hub, tmp_path: Path) -> None:
    write_missing(full)
    shutil.copytree(full.settings.data_dir / "store", tmp_path / "other" / "store")
    changes = {"data_dir": tmp_path / "other", "database_url": None}
    settings = full.settings.model_copy(update=changes)
    with open_hub(settings) as other:
        made = rebuild(other)
        assert made.repos == 0
        assert made.unsigned > 5
        with other.db.read() as session:
            assert session.exec(select(Blob)).all() == []
