"""Links that work once: to make an account, or to set a new password."""

import secrets
from datetime import timedelta

from sqlmodel import Session, select

from hub.audit import record
from hub.db import now
from hub.errors import InvitationNotFound
from hub.users import passwords
from hub.users.models import Invitation, Membership, Organization, Role, User
from hub.users.service import create_user, hash_of

DAYS = 7


def invite(
    session: Session,
    by: User,
    *,
    organization: Organization | None = None,
    role: Role = Role.WRITER,
) -> str:
    """The code of a link with which one person makes an account."""
    where = "" if organization is None else f"{organization.name} ({role})"
    record(session, by.id, "invitation.make", where)
    row = _row(by)
    if organization is not None:
        row.organization_id, row.role = organization.id, role
    return _handed_out(session, row)


def reset(session: Session, by: User, user: User) -> str:
    """The code of a link with which a user sets a new password."""
    record(session, by.id, "password.reset", user.name)
    row = _row(by)
    row.user_id = user.id
    return _handed_out(session, row)


def find(session: Session, code: str, *, to_use: bool = False) -> Invitation:
    """InvitationNotFound if it is unknown, used or too old, or if who made it is disabled.

    Whoever uses it locks it, which a reader may not on PostgreSQL.
    """
    query = select(Invitation).where(Invitation.hash == hash_of(code))
    if to_use:
        query = query.with_for_update()
    row = session.exec(query).first()
    if row is None or row.used_at is not None or row.expires_at <= now():
        raise _gone()
    by = session.get(User, row.created_by)
    if by is None or by.is_disabled or not by.is_admin:
        raise _gone()
    return row


def accept(
    session: Session, code: str, name: str, full_name: str, password_hash: str | None
) -> User:
    """The new user, or the one whose password is new; NameTaken, BadName, InvitationNotFound."""
    row = find(session, code, to_use=True)
    if row.user_id is not None:
        user = session.get_one(User, row.user_id)
        # A link for a new password is for nothing else.
        if user.is_disabled or password_hash is None:
            raise _gone()
    else:
        user = create_user(session, name, full_name=full_name)
        if row.organization_id is not None:
            assert user.id is not None
            assert row.role is not None
            member = Membership(
                user_id=user.id, organization_id=row.organization_id, role=Role(row.role)
            )
            session.add(member)
    if password_hash is not None:
        passwords.store(session, user, password_hash)
    row.used_at = now()
    session.add(row)
    record(session, user.id, "invitation.accept", user.name)
    return user


def _row(by: User) -> Invitation:
    assert by.id is not None
    return Invitation(hash="", created_by=by.id, expires_at=now() + timedelta(days=DAYS))


def _handed_out(session: Session, row: Invitation) -> str:
    code = secrets.token_urlsafe(24)
    row.hash = hash_of(code)
    session.add(row)
    session.flush()
    return code


def _gone() -> InvitationNotFound:
    return InvitationNotFound("this link was used already, or is too old: ask for a new one")
