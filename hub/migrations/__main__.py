"""`python -m hub.migrations REVISION DESCRIPTION`: print the migration the code still lacks.

Put what it prints into `versions/<REVISION>_<name>.py` and read it before committing.
"""

import re
import sys
import tempfile
from pathlib import Path

from alembic.autogenerate import produce_migrations, render_python_code
from alembic.runtime.migration import MigrationContext

from hub.db import Database
from hub.migrations import is_declared, metadata, migrate

HEAD = '''"""{description}"""

import sqlalchemy as sa
from alembic import op

from hub.db import UTCDateTime

revision = "{revision}"
down_revision = {down!r}
branch_labels = None
depends_on = None


def upgrade() -> None:
'''


def missing_migration(revision: str, description: str) -> str:
    """Source of a migration from the newest one to what the models declare."""
    with tempfile.TemporaryDirectory() as folder:
        database = Database(Path(folder))
        migrate(database)
        with database.writer.connect() as connection:
            context = MigrationContext.configure(
                connection, opts={"render_as_batch": True, "include_name": is_declared}
            )
            down = context.get_current_revision()
            script = produce_migrations(context, metadata())
            assert script.upgrade_ops is not None
            body = render_python_code(script.upgrade_ops)
        database.close()
    body = "\n".join(line for line in body.splitlines() if not line.lstrip().startswith("#"))
    body = re.sub(r"sqlmodel\.sql\.sqltypes\.AutoString\(\)", "sa.String()", body)
    body = body.replace("hub.db.UTCDateTime(timezone=True)", "UTCDateTime()")
    return HEAD.format(revision=revision, description=description, down=down) + body + "\n"


if __name__ == "__main__":
    sys.stdout.write(missing_migration(*sys.argv[1:3]))
