"""Download counts: collected in memory and added up now and then, so that a download never waits
for the catalogue's writer. A crash loses the last seconds of counting."""

from collections import Counter
from threading import Lock

from sqlalchemy import update
from sqlmodel import col

from hub.db import Database
from hub.repos.models import Repo


class Downloads:
    def __init__(self) -> None:
        self._lock = Lock()
        self._waiting: Counter[int] = Counter()

    def count(self, repo: Repo) -> None:
        """One more download of a repo."""
        assert repo.id is not None
        with self._lock:
            self._waiting[repo.id] += 1

    def flush(self, database: Database) -> None:
        """Add what was counted to the rows; repos that are gone by now are passed over."""
        with self._lock:
            waiting, self._waiting = self._waiting, Counter()
        if not waiting:
            return
        with database.write() as session:
            # In one order for all servers, or two would wait for each other's rows.
            for repo_id, n in sorted(waiting.items()):
                session.execute(
                    update(Repo)
                    .where(col(Repo.id) == repo_id)
                    .values(downloads=col(Repo.downloads) + n)
                )
