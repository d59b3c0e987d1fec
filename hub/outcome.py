"""What became of a transaction when its connection broke during COMMIT on PostgreSQL.

The server keeps the fate of every recent transaction under the number it gave it
(PostgreSQL documentation, "Transaction ID and Snapshot Information Functions", pg_xact_status).
So the number is asked for before the COMMIT, and looked up over another connection if no answer
to it arrives. Nothing is ever done twice on a guess.
"""

import logging
import time
from typing import Any

from psycopg import Connection, OperationalError
from sqlalchemy import Engine, text
from sqlalchemy.exc import DataError
from sqlalchemy.exc import OperationalError as SQLAlchemyOperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlmodel import Session

from hub.errors import OutcomeUnknown

log = logging.getLogger(__name__)

LOOK_FOR_S = 30.0
_PATIENCE_S = 2.0
_PAUSE_S = 0.1


def commit(session: Session, engine: Engine) -> None:
    """COMMIT; when this returns the transaction is committed.

    OperationalError when it is not, OutcomeUnknown when nobody could be asked for `LOOK_FOR_S`.
    """
    # Read-only blocks have no number, and nothing to lose.
    number = session.scalar(text("SELECT pg_current_xact_id_if_assigned()::text"))
    connection = session.connection().connection.driver_connection
    assert isinstance(connection, Connection)
    pid = connection.info.backend_pid
    try:
        connection.commit()
    except OperationalError as error:
        lost = connection.closed
        # The rows that the block has in its hands stay readable for whoever called.
        session.expunge_all()
        session.invalidate()
        if lost and number is not None and _was_committed(engine, number, pid):
            log.warning("transaction %s was committed although its connection broke", number)
            return
        raise SQLAlchemyOperationalError("COMMIT", None, error) from error


def _was_committed(engine: Engine, number: str, pid: int) -> bool:
    started = time.monotonic()
    while time.monotonic() - started < LOOK_FOR_S:
        try:
            status = _ask(engine, number)
            if status != "in progress":
                return bool(status == "committed")
            if time.monotonic() - started > _PATIENCE_S:
                # Behind a broken network the server waits for a COMMIT that never comes.
                _ask(engine, number, end=pid)
        except DataError:
            # A number in the future: this server took over from the one that gave it.
            return False
        except (SQLAlchemyOperationalError, PoolTimeout):
            log.warning("asking for the outcome of transaction %s", number, exc_info=True)
        time.sleep(_PAUSE_S)
    raise OutcomeUnknown(
        "the database was lost while it saved this, so whether it did is not known;"
        " look before you repeat it"
    )


def _ask(engine: Engine, number: str, end: int | None = None) -> Any:
    with engine.connect() as connection:
        if end is not None:
            # Only the session that still has this transaction: its process id may be another's.
            statement = text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE pid = :pid AND backend_xid = xid(CAST(:number AS xid8))"
            )
            return connection.scalar(statement, {"pid": end, "number": number})
        statement = text("SELECT pg_xact_status(CAST(:number AS xid8))")
        return connection.scalar(statement, {"number": number})
