"""One writer, readers that cannot write, one server per data folder, a schema that matches."""

import os
import re
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlmodel import Session, select

from hub import db as db_module
from hub.adapters.projection import forget, pending, project
from hub.adapters.service import publish
from hub.context import Hub, look_into_hub, open_hub
from hub.db import Database
from hub.errors import CannotStart, NameTaken
from hub.migrations import is_declared, metadata
from hub.repos import holds
from hub.repos import service as repos
from hub.repos.operations import Add
from hub.settings import Settings
from hub.users import service as users
from hub.users.models import Namespace, User
from hub.users.service import Viewer
from tests.hub.conftest import both_databases, postgresql_only, sqlite_only


@both_databases
def test_the_migrated_schema_is_what_the_code_declares(hub: Hub) -> None:
    with hub.db.writer.connect() as connection:
        options = {"compare_type": True, "include_name": is_declared}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, metadata()) == []


@both_databases
def test_a_start_on_a_newer_schema_is_refused_and_changes_nothing(hub: Hub) -> None:
    with hub.db.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    hub.db.close()
    for look in (open_hub, look_into_hub):
        newer = pytest.raises(CannotStart, match=r"newer version of Grafthub \(schema 9999\)")
        with newer, look(hub.settings):
            pass


@both_databases
def test_a_write_block_that_raises_leaves_nothing(hub: Hub) -> None:
    def half_a_change() -> None:
        with hub.db.write() as session:
            session.add(Namespace(key="x"))
            session.flush()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half_a_change()
    with hub.db.read() as session:
        assert session.get(Namespace, "x") is None


@both_databases
def test_time_stamps_come_back_aware_and_in_utc(hub: Hub) -> None:
    with hub.db.read() as session:
        made = session.exec(select(User.created_at)).one()
    assert str(made.tzinfo) == "UTC"


@both_databases
def test_a_reader_sees_one_moment_of_the_catalogue(hub: Hub) -> None:
    with hub.db.read() as reader:
        before = len(reader.exec(select(Namespace)).all())
        with hub.db.write() as session:
            session.add(Namespace(key="x"))
        assert len(reader.exec(select(Namespace)).all()) == before


@both_databases
def test_a_reader_cannot_write(hub: Hub) -> None:
    with hub.db.read() as reader, pytest.raises(DBAPIError, match=r"read-?only"):
        reader.execute(text("DELETE FROM token"))


@both_databases
def test_of_those_who_take_a_name_at_once_one_gets_it(hub: Hub) -> None:
    def take(n: int) -> bool:
        try:
            with hub.db.write() as session:
                users.create_user(session, "Ada" if n % 2 else "ada")
                return True
        except NameTaken:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(take, range(8))) == 1


@both_databases
def test_those_who_make_one_repo_at_once_get_one_repo(hub: Hub, admin: Viewer) -> None:
    def make(n: int) -> int | None:
        with hub.db.write() as session:
            return repos.create_repo(session, admin, "admin", "ink", exist_ok=True).id

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(make, range(8)))) == 1


@both_databases
def test_those_who_send_the_same_files_at_once_all_succeed(hub: Hub, admin: Viewer) -> None:
    stored = [hub.store.put([bytes([n])], size=1) for n in range(6)]
    names = [f"r{n}" for n in range(8)]
    with hub.db.write() as session:
        for name in names:
            repos.create_repo(session, admin, "admin", name)
    together = threading.Barrier(len(names))

    def send(n: int) -> int:
        # Each in another order, which is where two would wait for each other.
        order = stored[n % 6 :] + stored[: n % 6]
        adds = [Add(f"{i}.safetensors", item, lfs=False) for i, item in enumerate(order)]
        together.wait()
        with hub.db.write() as session:
            holds.hold(session, admin, order[0])
        return publish(hub, admin, "admin", names[n], operations=adds, message="m").repo_id

    def read_anew(repo_id: int) -> None:
        together.wait()
        project(hub, repo_id)

    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(send, range(8)))
        assert len(set(ids)) == 8
        with hub.db.read() as session:
            assert pending(session) == []
        with hub.db.write() as session:
            forget(session)
        assert list(pool.map(read_anew, ids)) == [None] * 8


@postgresql_only
def test_of_two_that_wait_for_each_other_one_starts_again(hub: Hub) -> None:
    with hub.db.write() as session:
        session.add_all([Namespace(key="a"), Namespace(key="b")])
    together = threading.Barrier(2)
    started: list[str] = []

    def lock(keys: str) -> None:
        def steps(session: Session) -> None:
            started.append(keys)
            for key in keys:
                session.exec(select(Namespace).where(Namespace.key == key).with_for_update()).one()
                if len(started) <= 2 and key == keys[0]:
                    together.wait()

        hub.db.change(steps)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lock, ["ab", "ba"])) == [None, None]
    assert len(started) >= 3


def pragma(session: Session, name: str) -> object:
    return session.execute(text(f"PRAGMA {name}")).scalar()


@sqlite_only
def test_sqlite_is_durable_and_its_readers_read_only(hub: Hub) -> None:
    with hub.db.write() as writer, hub.db.read() as reader:
        for session in (writer, reader):
            assert pragma(session, "journal_mode") == "wal"
            assert pragma(session, "synchronous") == 2  # FULL
            assert pragma(session, "foreign_keys") == 1
            assert pragma(session, "trusted_schema") == 0
        assert pragma(writer, "query_only") == 0
        assert pragma(reader, "query_only") == 1


@sqlite_only
def test_a_write_block_keeps_every_other_writer_out_from_its_first_statement(hub: Hub) -> None:
    stranger = sqlite3.connect(hub.settings.data_dir / "hub.sqlite3", timeout=0)
    with hub.db.write() as session:
        session.execute(text("SELECT 1"))
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            stranger.execute("BEGIN IMMEDIATE")
    stranger.close()


@sqlite_only
def test_sqlite_has_one_writer_at_a_time(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(db_module, "WRITER_WAIT_S", 0)
    other = Database.__new__(Database)
    other._writer = db_module._sqlite(hub.settings.data_dir / "hub.sqlite3", writer=True)
    with other.writer.connect() as first:
        first.execute(text("SELECT 1"))
        with pytest.raises(PoolTimeout):
            other.writer.connect()
    other.writer.dispose()


def test_closing_leaves_one_file_without_a_journal(tmp_path: Path) -> None:
    with open_hub(Settings(data_dir=tmp_path)) as hub, hub.db.read() as session:
        session.exec(select(User)).all()
    assert not list(tmp_path.glob("hub.sqlite3-*"))
    with sqlite3.connect(tmp_path / "hub.sqlite3") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


@sqlite_only
def test_a_data_folder_has_one_hub(hub: Hub) -> None:
    with pytest.raises(CannotStart, match="another hub is running"):
        Database(hub.settings.data_dir)


def test_a_catalogue_is_not_opened_with_another_blob_store(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    with open_hub(settings):
        pass
    (tmp_path / "store" / "STORE_ID").write_text("0" * 32)
    with pytest.raises(CannotStart, match=f"is {'0' * 32}"), open_hub(settings):
        pass


def test_a_database_we_do_not_know_is_refused(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, database_url="mysql://localhost/x")  # type: ignore[arg-type]
    with pytest.raises(CannotStart, match=r"mysql; use postgresql://"), open_hub(settings):
        pass


@pytest.mark.parametrize("url", ["postgres", "postgresql://ada:secret@:::/hub"])
def test_an_address_of_a_database_that_is_none_is_refused_without_its_text(
    tmp_path: Path, url: str
) -> None:
    settings = Settings(data_dir=tmp_path, database_url=url)  # type: ignore[arg-type]
    with pytest.raises(CannotStart) as refused, open_hub(settings):
        pass
    assert refused.value.message.startswith("GRAFT_DATABASE_URL is no address such as postgresql:")


def test_an_unreachable_database_is_one_sentence_without_its_password(tmp_path: Path) -> None:
    url = "postgresql://hub:s3cret@127.0.0.1:1/hub"
    settings = Settings(data_dir=tmp_path, database_url=url)  # type: ignore[arg-type]
    with pytest.raises(CannotStart, match=r"127\.0\.0\.1:1") as refused, open_hub(settings):
        pass
    assert "s3cret" not in refused.value.message
    assert "\n" not in refused.value.message
    assert "s3cret" not in repr(settings)


def test_the_first_start_makes_an_admin_and_later_ones_do_not(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    with open_hub(settings) as first:
        assert first.admin_token == (tmp_path / "admin.token").read_text().strip()
        assert re.fullmatch(r"graft_[\w-]{43}", first.admin_token or "")
    with open_hub(settings) as second:
        assert second.admin_token is None
        with second.db.read() as session:
            assert [user.name for user in session.exec(select(User))] == ["admin"]


def test_servers_that_start_together_make_one_schema_and_one_admin(
    tmp_path: Path, postgres_url: str
) -> None:
    code = "from hub.context import open_hub; from hub.settings import Settings; import psycopg\n"
    code += "print('ready', flush=True); input()\n"
    code += "with open_hub(Settings()) as hub: print(hub.admin_token)"
    told = {"GRAFT_DATA_DIR": str(tmp_path), "GRAFT_DATABASE_URL": postgres_url}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parents[2],
            env=os.environ | told,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    tokens = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert sorted(tokens) == ["None", (tmp_path / "admin.token").read_text().strip()]


def test_the_missing_migration_of_a_complete_history_is_empty() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "hub.migrations", "9999", "Nothing."],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.rstrip().endswith("def upgrade() -> None:\n    pass")
