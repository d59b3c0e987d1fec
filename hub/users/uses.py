"""When tokens were last used: noted in memory and written now and then, so that no request waits
for the catalogue's writer. A crash loses the last seconds."""

from datetime import datetime
from threading import Lock

from sqlalchemy import update
from sqlmodel import col

from hub.db import Database, now
from hub.users.models import Token


class Uses:
    def __init__(self) -> None:
        self._lock = Lock()
        self._waiting: dict[int, datetime] = {}

    def note(self, token_id: int | None) -> None:
        """A request was made with this token."""
        if token_id is not None:
            with self._lock:
                self._waiting[token_id] = now()

    def flush(self, database: Database) -> None:
        """Write what was noted."""
        with self._lock:
            waiting, self._waiting = self._waiting, {}
        if not waiting:
            return
        with database.write() as session:
            # In one order for all servers, or two would wait for each other's rows.
            for token_id, moment in sorted(waiting.items()):
                row = update(Token).where(col(Token.id) == token_id)
                session.execute(row.values(last_used_at=moment))
