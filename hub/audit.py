"""Who did what: rows that are only ever added, each holding the hash of the one before."""

import hashlib
import json
from datetime import datetime

from sqlmodel import Field, Session, SQLModel, col, select

from hub.db import UTCDateTime, at_the_end, now, wait_for_others


class Audit(SQLModel, table=True):
    __tablename__ = "audit"

    id: int | None = Field(default=None, primary_key=True)
    at: datetime = Field(sa_type=UTCDateTime)
    # No foreign key: the row outlives the user.
    user_id: int | None = None
    action: str
    subject: str
    previous: str
    hash: str = Field(unique=True)


def record(session: Session, user_id: int | None, action: str, subject: str) -> None:
    """Add one row to the chain in the caller's transaction, at its end."""
    row = Audit(at=now(), user_id=user_id, action=action, subject=subject, previous="", hash="")
    at_the_end(session, lambda session: _append(session, row))


def _append(session: Session, row: Audit) -> None:
    wait_for_others(session.connection(), "audit")
    last = session.exec(select(Audit.hash).order_by(col(Audit.id).desc()).limit(1)).first()
    row.previous = last or ""
    row.hash = _hash(row)
    session.add(row)
    session.flush()


def broken_link(session: Session) -> int | None:
    """The id of the first row that was changed or follows a removed one; None if all is well."""
    previous = ""
    for row in session.exec(select(Audit).order_by(col(Audit.id))):
        if row.previous != previous or row.hash != _hash(row):
            return row.id
        previous = row.hash
    return None


def _hash(row: Audit) -> str:
    fields = [row.previous, row.at.isoformat(), row.user_id, row.action, row.subject]
    return hashlib.sha256(json.dumps(fields, ensure_ascii=False).encode()).hexdigest()
