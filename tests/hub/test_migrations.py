"""Every schema this project ever had is brought to the present one with its rows, on both databases.

The rows are made up from the schema itself, so a new migration is tested from all older ones
without a line here; a migration that changes values says so in `CHANGED`.
"""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlmodel import select

from hub import migrations
from hub.context import open_hub
from hub.db import Database
from hub.errors import CannotStart
from hub.migrations import history, is_declared, metadata, migrate
from hub.settings import Settings
from hub.users.models import User

REVISIONS = [script.revision for script in reversed(list(history().walk_revisions()))]
Rows = dict[str, list[dict[str, Any]]]

# Values that a migration reads, and what it makes of them: (revision, table, column).
CHANGED = {("0004", "token", "scope"): ("write", "admin")}
MOMENT = datetime(2026, 1, 2, 3, 4, 5)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """Without a table."""
    url = request.getfixturevalue("postgres_url") if request.param == "postgresql" else None
    opened = Database(tmp_path, url)
    yield opened
    opened.close()


def tables_of(database: Database) -> list[sa.Table]:
    """As they are in the database, each after those it refers to."""
    found = sa.MetaData()
    with database.writer.connect() as connection:
        found.reflect(connection)
    ours = [t for t in found.sorted_tables if is_declared(t.name, "table", None)]
    return [table for table in ours if table.name != "alembic_version"]


def rows_of(database: Database) -> Rows:
    with database.read() as session:
        return {
            table.name: [dict(row._mapping) for row in session.execute(sa.select(table))]
            for table in tables_of(database)
        }


def value(database: Database, table: sa.Table, column: sa.Column[Any], n: int) -> Any:
    for _, name, its_column in CHANGED:
        if (table.name, column.name) == (name, its_column):
            return next(old for key, (old, _) in CHANGED.items() if key[1:] == (name, its_column))
    if column.foreign_keys:
        (key,) = column.foreign_keys
        return value(database, key.column.table, key.column, n)
    made: dict[type, Any] = {
        bool: bool(n % 2),
        int: n,
        float: n / 2,
        str: f"{column.name} {n}",
        bytes: bytes([n]),
        datetime: MOMENT if database.is_sqlite else MOMENT.replace(tzinfo=UTC),
    }
    if isinstance(column.type, sa.JSON):
        return {"n": n}
    return made[column.type.python_type]


def fill(database: Database) -> Rows:
    """Two rows in every table, every column with a value."""
    with database.write() as session:
        for table in tables_of(database):
            for n in (1, 2):
                row = {c.name: value(database, table, c, n) for c in table.columns}
                session.execute(table.insert().values(row))
    return rows_of(database)


def expected(start: str, table: str, row: dict[str, Any], columns: set[str]) -> dict[str, Any]:
    """What a row of an older schema is now, in the columns that are left."""
    new = {name: content for name, content in row.items() if name in columns}
    for (revision, its_table, column), (old, now) in CHANGED.items():
        if its_table == table and start < revision and new.get(column) == old:
            new[column] = now
    return new


def differences(database: Database) -> list[Any]:
    with database.writer.connect() as connection:
        options = {"compare_type": True, "include_name": is_declared}
        context = MigrationContext.configure(connection, opts=options)
        return list(compare_metadata(context, metadata()))


@pytest.mark.parametrize("start", REVISIONS)
def test_every_row_of_an_older_schema_is_there_afterwards(database: Database, start: str) -> None:
    migrate(database, to=start)
    before = fill(database)
    assert all(len(rows) == 2 for rows in before.values())
    migrate(database)
    after = rows_of(database)
    for table, rows in before.items():
        for row in rows:
            columns = set(after[table][0])
            wanted = expected(start, table, row, columns)
            assert wanted in [{name: r[name] for name in wanted} for r in after[table]], table
    assert differences(database) == []


def test_there_is_one_history_and_its_files_say_their_number() -> None:
    scripts = list(history().walk_revisions())
    assert len(history().get_heads()) == 1
    for script in scripts:
        assert Path(script.path).name.startswith(f"{script.revision}_")
    assert sorted(REVISIONS) == REVISIONS


def test_ids_that_are_never_used_again_stay_so(tmp_path: Path) -> None:
    """Alembic's copy of a table forgets AUTOINCREMENT unless it is told, and compares it never."""
    database = Database(tmp_path)
    migrate(database)
    with database.read() as session:
        made = dict(session.execute(sa.text("SELECT name, sql FROM sqlite_master")).all())
    database.close()
    lasting = [
        table.name
        for table in metadata().tables.values()
        if table.dialect_options["sqlite"]["autoincrement"]
    ]
    assert {"repo", "adapter"} <= set(lasting)
    assert [name for name in lasting if "AUTOINCREMENT" not in made[name]] == []


def test_a_table_that_is_copied_keeps_what_refers_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite deletes what refers to a dropped table, unless it is told not to in time."""
    database = Database(tmp_path)
    migrate(database, to=REVISIONS[0])
    before = fill(database)

    def copy_repo(connection: sa.Connection, to: str) -> None:
        operations = Operations(MigrationContext.configure(connection))
        with operations.batch_alter_table("repo", recreate="always") as table:
            table.add_column(sa.Column("new", sa.Integer(), server_default="7"))

    monkeypatch.setattr(migrations, "_upgrade", copy_repo)
    migrate(database)
    after = rows_of(database)
    assert {row.pop("new") for row in after["repo"]} == {7}
    assert after == before
    with database.write() as session:
        assert session.scalar(sa.text("PRAGMA foreign_keys")) == 1
    database.close()


def test_a_migration_that_loses_what_others_refer_to_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(tmp_path)
    migrate(database, to=REVISIONS[0])
    before = fill(database)
    monkeypatch.setattr(
        migrations,
        "_upgrade",
        lambda connection, to: connection.execute(sa.text("DELETE FROM repo")),
    )
    with pytest.raises(AssertionError, match="rows that refer to nothing"):
        migrate(database)
    assert rows_of(database) == before
    database.close()


def test_sqlite_is_copied_before_it_is_changed(tmp_path: Path) -> None:
    database = Database(tmp_path)
    migrate(database, tmp_path / "backups", to=REVISIONS[0])
    assert not (tmp_path / "backups").exists()  # There was nothing to lose.
    before = fill(database)
    migrate(database, tmp_path / "backups")
    database.close()
    (copy,) = (tmp_path / "backups").iterdir()
    assert copy.name == f"hub-schema-{REVISIONS[0]}.sqlite3"
    (tmp_path / "old").mkdir()
    copy.rename(tmp_path / "old" / "hub.sqlite3")
    restored = Database(tmp_path / "old")
    assert rows_of(restored) == before
    migrate(restored)
    restored.close()


def test_a_catalogue_that_cannot_be_copied_is_not_changed(tmp_path: Path) -> None:
    database = Database(tmp_path)
    migrate(database, to=REVISIONS[0])
    before = fill(database)
    (tmp_path / "backups").write_text("in the way")
    with pytest.raises(CannotStart, match=r"needs its backup .*hub-schema-0001\.sqlite3"):
        migrate(database, tmp_path / "backups")
    assert rows_of(database) == before
    database.close()


def test_a_hub_of_the_first_schema_starts_with_its_users(tmp_path: Path) -> None:
    """Through the front door: the store of a real first start, the catalogue of the first schema."""
    settings = Settings(data_dir=tmp_path)
    with open_hub(settings) as hub:
        store_id = hub.store.id
    (tmp_path / "hub.sqlite3").unlink()
    database = Database(tmp_path)
    migrate(database, to=REVISIONS[0])
    moment = "2026-01-02 03:04:05"
    with database.write() as session:
        for statement in (
            "INSERT INTO store_identity VALUES (:store_id)",
            "INSERT INTO namespace VALUES ('ada', :moment)",
            "INSERT INTO user VALUES (1, 'Ada', 'ada', '', true, false, :moment)",
        ):
            session.execute(sa.text(statement), {"store_id": store_id, "moment": moment})
    database.close()
    with open_hub(settings) as hub, hub.db.read() as session:
        assert hub.admin_token is None
        assert session.exec(select(User.name)).all() == ["Ada"]
    assert (tmp_path / "backups" / f"hub-schema-{REVISIONS[0]}.sqlite3").is_file()
