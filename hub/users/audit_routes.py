"""`/api/audit`: who did what, and whether somebody changed what is written; for administrators."""

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel
from sqlmodel import Session, col, select

from hub import audit
from hub.audit import Audit
from hub.deps import ReadSession, ViewerDep
from hub.users import service as users
from hub.users.models import User

router = APIRouter(prefix="/api/audit", tags=["users"])


class AuditEntry(BaseModel):
    """`user` is None for what nobody did by name: the hub itself, a command, a refused login."""

    id: int
    at: datetime
    user: str | None
    action: str
    subject: str
    hash: str


class AuditPage(BaseModel):
    items: list[AuditEntry]
    next_before: int | None


class AuditChain(BaseModel):
    rows: int
    head: str
    broken: int | None
    has_expected: bool | None


@router.get("")
def list_entries(
    viewer: ViewerDep,
    session: ReadSession,
    user: str | None = None,
    action: Annotated[str, Query(max_length=100)] = "",
    before: Annotated[int | None, Query(ge=1, lt=2**63)] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> AuditPage:
    """Newest first; `before` is the last id of the page before."""
    viewer.require_admin()
    return page_of(session, user=user, action=action, before=before, limit=limit)


@router.get("/verify")
def verify(
    viewer: ViewerDep,
    session: ReadSession,
    expect: Annotated[str | None, Query(max_length=64)] = None,
) -> AuditChain:
    """Recompute every hash; `expect` is a head that was noted earlier and must still be there."""
    viewer.require_admin()
    return AuditChain.model_validate(audit.verify(session, expect), from_attributes=True)


def page_of(
    session: Session, *, user: str | None, action: str, before: int | None, limit: int
) -> AuditPage:
    """UserNotFound."""
    user_id = users.find_user(session, user).id if user else None
    rows = audit.entries(session, before=before, user_id=user_id, action=action, limit=limit + 1)
    names = _names(session, {row.user_id for row in rows})
    items = [_entry(row, names) for row in rows[:limit]]
    return AuditPage(items=items, next_before=items[-1].id if len(rows) > limit else None)


def _names(session: Session, ids: set[int | None]) -> dict[int | None, str]:
    query = select(User).where(col(User.id).in_([n for n in ids if n is not None]))
    return {user.id: user.name for user in session.exec(query)}


def _entry(row: Audit, names: dict[int | None, str]) -> AuditEntry:
    assert row.id is not None
    return AuditEntry(
        id=row.id,
        at=row.at,
        user=names.get(row.user_id),
        action=row.action,
        subject=row.subject,
        hash=row.hash,
    )
