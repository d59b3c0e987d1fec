"""What keeps a blob: every table that points at one, and what points without a foreign key.

A table that refers to `blob.sha256` keeps the blob unless its rows go with it (ON DELETE CASCADE),
so a table added later is known here by itself, and the database refuses what this would miss.
"""

from collections.abc import Callable, Collection
from typing import Any

from sqlalchemy import Column
from sqlmodel import Session, SQLModel, col, select

from hub.db import now
from hub.jobs.models import TERMINAL, Job
from hub.repos.models import Blob
from hub.repos.uploads import Upload

# Digests kept by something else than a row with a foreign key. Add to it what comes later.
KEEPERS: list[Callable[[Session], Collection[str]]] = []


def referring_columns() -> list[Column[Any]]:
    """The columns whose rows keep a blob."""
    blob = SQLModel.metadata.tables[Blob.__tablename__].c.sha256
    return [
        key.parent
        for table in SQLModel.metadata.sorted_tables
        for key in table.foreign_keys
        if key.column is blob and (key.ondelete or "").upper() != "CASCADE"
    ]


def is_referenced(session: Session, sha256: str) -> bool:
    """Whether anything keeps this blob."""
    return bool(referenced(session, [sha256]))


def referenced(session: Session, digests: Collection[str]) -> set[str]:
    """Those of a few hundred `digests` that something keeps."""
    found: set[str] = set()
    for column in referring_columns():
        found.update(session.scalars(select(column).where(column.in_(digests)).distinct()))
    for keeper in KEEPERS:
        found.update(keeper(session))
    return found.intersection(digests)


def _inputs_of_jobs(session: Session) -> set[str]:
    """A job reads its inputs when its turn comes, whatever became of their repos meanwhile."""
    requests = session.exec(select(Job.request).where(col(Job.state).not_in(TERMINAL)))
    return {
        sha256
        for request in requests
        for item in request.get("inputs", ())
        for sha256 in item["files"].values()
    }


def _uploads(session: Session) -> set[str]:
    """Bytes that are coming may be here already, without a row for them."""
    return set(session.exec(select(Upload.sha256).where(col(Upload.expires_at) > now())))


KEEPERS += [_inputs_of_jobs, _uploads]
