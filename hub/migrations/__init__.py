"""The schema's history, forward only. `MODELS` lists every module that declares tables."""

from importlib import import_module
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import MetaData
from sqlmodel import SQLModel

from hub.db import Database, wait_for_other_processes
from hub.errors import CannotStart

MODELS = (
    "hub.audit",
    "hub.context",
    "hub.users.models",
    "hub.repos.models",
    "hub.repos.uploads",
    "hub.adapters.models",
    "hub.jobs.models",
    "hub.xet.models",
    "hub.limits.models",
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


def migrate(database: Database) -> None:
    """Bring the schema to this version; CannotStart if a newer version has changed it."""
    config, script = _script()
    with database.writer.connect() as connection, connection.begin():
        wait_for_other_processes(connection)
        present = MigrationContext.configure(connection).get_current_revision()
        if present == script.get_current_head():
            return
        if present is not None and present not in {r.revision for r in script.walk_revisions()}:
            raise CannotStart(
                f"the catalogue was changed by a newer version of Grafthub (schema {present})"
            )
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def require_current(database: Database) -> None:
    """CannotStart unless the schema is this version's; changes nothing."""
    _, script = _script()
    with database.read() as session:
        present = MigrationContext.configure(session.connection()).get_current_revision()
    if present != script.get_current_head():
        raise CannotStart(
            f"the catalogue has schema {present}, this version {script.get_current_head()};"
            " start the hub once to bring it up to date"
        )


def _script() -> tuple[Config, ScriptDirectory]:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    return config, ScriptDirectory.from_config(config)
