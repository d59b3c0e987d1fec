"""Who did what: rows that are only ever added, each holding the hash of the one before.

The database refuses to change or remove a row. Whoever may change the database itself can write
the whole chain anew, which shows only against a hash that was noted elsewhere.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlmodel import Field, Session, SQLModel, col, or_, select

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


@dataclass(frozen=True, slots=True)
class Chain:
    """What `verify` found.

    `broken` is the first row that was changed or follows a removed one. `head` is the hash of the
    last row, to be noted elsewhere; `has_expected` says whether a hash noted earlier is still there.
    """

    rows: int
    head: str
    broken: int | None
    has_expected: bool | None

    @property
    def is_sound(self) -> bool:
        return self.broken is None and self.has_expected is not False


def verify(session: Session, expected: str | None = None) -> Chain:
    """Read every row; a million take seconds."""
    columns = (Audit.id, Audit.at, Audit.user_id, Audit.action, Audit.subject)
    query = select(*columns, Audit.previous, Audit.hash).order_by(col(Audit.id))  # type: ignore[call-overload]
    rows, previous, broken, found = 0, "", None, False
    for row in session.exec(query.execution_options(yield_per=1000)):
        if broken is None and (row.previous != previous or row.hash != _hash(row)):
            broken = row.id
        rows, previous, found = rows + 1, row.hash, found or row.hash == expected
    return Chain(rows, previous, broken, None if expected is None else found)


def entries(
    session: Session,
    *,
    before: int | None = None,
    user_id: int | None = None,
    action: str = "",
    limit: int = 100,
) -> Sequence[Audit]:
    """Newest first, older than `before`; `action` also names a group, `token` all of `token.…`."""
    query = select(Audit)
    if before is not None:
        query = query.where(col(Audit.id) < before)
    if user_id is not None:
        query = query.where(Audit.user_id == user_id)
    if action:
        group = col(Audit.action).startswith(f"{action}.", autoescape=True)
        query = query.where(or_(col(Audit.action) == action, group))
    return session.exec(query.order_by(col(Audit.id).desc()).limit(limit)).all()


def broken_link(session: Session) -> int | None:
    """The id of the first row that was changed or follows a removed one; None if all is well."""
    return verify(session).broken


def _hash(row: Audit) -> str:
    fields = [row.previous, row.at.isoformat(), row.user_id, row.action, row.subject]
    return hashlib.sha256(json.dumps(fields, ensure_ascii=False).encode()).hexdigest()
