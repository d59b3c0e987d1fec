"""The schema's history, forward only. `MODELS` lists every module that declares tables."""

import os
import sqlite3
from contextlib import closing
from functools import cache
from importlib import import_module
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, MetaData, text
from sqlmodel import SQLModel

from hub.blobs import durable
from hub.db import Database, wait_for_others
from hub.errors import CannotStart

MODELS = (
    "hub.audit",
    "hub.context",
    "hub.users.models",
    "hub.repos.models",
    "hub.repos.uploads",
    "hub.adapters.models",
    "hub.jobs.models",
    "hub.upkeep.manifests",
    "hub.xet.models",
    "hub.limits.models",
    "hub.webhooks.models",
)


def metadata() -> MetaData:
    """All tables as the code declares them."""
    for module in MODELS:
        import_module(module)
    return SQLModel.metadata


def is_declared(name: str | None, kind: str, _: object) -> bool:
    """Whether a table in the database is one that the code declares; the text index is not:
    FTS5 keeps it in tables of its own, and each database has another kind.
    """
    return not (kind == "table" and name is not None and name.startswith("adapter_text"))


def migrate(database: Database, backups: Path | None = None, *, to: str = "head") -> None:
    """Bring the schema to this version; CannotStart if a newer version has changed it.

    SQLite's catalogue is copied to the folder `backups` before it is changed.
    """
    script = history()
    with database.writer.connect() as connection:
        with connection.begin():
            present = _present(connection)
        _refuse_newer(present)
        if present == script.get_current_head():
            return
        if database.is_sqlite:
            if present is not None and backups is not None:
                _back_up(connection, backups / f"hub-schema-{present}.sqlite3")
            _upgrade_sqlite(connection, to)
        else:
            _upgrade_postgresql(connection, to)


def require_current(database: Database) -> None:
    """CannotStart unless the schema is this version's; changes nothing."""
    with database.read() as session:
        present = _present(session.connection())
    if present is None:
        raise CannotStart("the database is empty: there is no hub in it")
    _refuse_newer(present)
    head = history().get_current_head()
    if present != head:
        raise CannotStart(
            f"the catalogue has schema {present}, this version {head};"
            " start the hub once to bring it up to date"
        )


def _refuse_newer(present: str | None) -> None:
    if present is not None and present not in {r.revision for r in history().walk_revisions()}:
        raise CannotStart(
            f"the catalogue was changed by a newer version of Grafthub (schema {present})"
        )


@cache
def history() -> ScriptDirectory:
    """Every revision there is, read once: it takes as long as all else of opening a hub."""
    return ScriptDirectory.from_config(_config())


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    return config


def _present(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def _upgrade_sqlite(connection: Connection, to: str) -> None:
    # What SQLite cannot alter, Alembic copies, and dropping the old table would delete all rows
    # that refer to it. The pragma has no effect inside a transaction (sqlite.org/foreignkeys.html).
    driver = connection.connection.driver_connection
    assert isinstance(driver, sqlite3.Connection)
    driver.execute("PRAGMA foreign_keys=OFF")
    try:
        with connection.begin():
            _upgrade(connection, to)
            orphans = connection.execute(text("PRAGMA foreign_key_check")).all()
            assert not orphans, f"a migration left rows that refer to nothing: {orphans[:3]}"
    finally:
        driver.execute("PRAGMA foreign_keys=ON")


def _upgrade_postgresql(connection: Connection, to: str) -> None:
    with connection.begin():
        # A large table takes its time, and so does the server that was there first.
        connection.execute(text("SET LOCAL statement_timeout = 0"))
        connection.execute(text("SET LOCAL lock_timeout = 0"))
        wait_for_others(connection, "migrate")
        _upgrade(connection, to)


def _upgrade(connection: Connection, to: str) -> None:
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, to)


def _back_up(connection: Connection, path: Path) -> None:
    """A whole copy of the catalogue; an older one from the same schema is replaced."""
    driver = connection.connection.driver_connection
    assert isinstance(driver, sqlite3.Connection)
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        temporary.unlink(missing_ok=True)
        with closing(sqlite3.connect(temporary)) as copy:
            driver.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE")
        with temporary.open("rb+") as file:
            durable.sync_file(file.fileno())
        os.replace(temporary, path)
        durable.sync_folder(path.parent)
    except (OSError, sqlite3.Error) as error:
        if temporary.exists():
            temporary.unlink()
        raise CannotStart(
            f"the catalogue needs its backup {path} before it is changed: {error}"
        ) from error
