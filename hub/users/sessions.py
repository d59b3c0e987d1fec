"""Logins of the web page: rows beside the access tokens, so that each can be seen and ended."""

import secrets
from datetime import timedelta

from sqlmodel import Session

from hub.audit import record
from hub.db import now
from hub.users.models import Scope, Token, TokenKind, User
from hub.users.service import Viewer, hash_of, viewer_of_token_id

_BROWSERS = ("Edg", "OPR", "Firefox", "Chrome", "Safari")
_NAMES = {"Edg": "Edge", "OPR": "Opera"}
_SYSTEMS = ("Android", "iPhone", "iPad", "Windows", "Macintosh", "Linux")


def start(
    session: Session,
    user: User,
    *,
    how: str,
    days: int,
    agent: str = "",
    address: str = "",
    parent: Viewer | None = None,
) -> Viewer:
    """A new login, with the rights of the token it began with, or all of the user's.

    Its secret is thrown away: only the signed cookie of one browser names the row.
    """
    assert user.id is not None
    row = Token(
        user_id=user.id,
        kind=TokenKind.SESSION,
        name=browser_of(agent),
        hash=hash_of(secrets.token_urlsafe(32)),
        scope=parent.scope if parent is not None and parent.scope is not None else Scope.ADMIN,
        places=sorted(parent.places) if parent is not None and parent.places is not None else None,
        parent_id=parent.token_id if parent is not None else None,
        address=address[:100],
        last_used_at=now(),
        expires_at=now() + timedelta(days=days),
    )
    session.add(row)
    session.flush()
    record(session, user.id, "login", f"{user.name}: {how}, {row.name}")
    assert row.id is not None
    return viewer_of_token_id(session, row.id)


def browser_of(agent: str) -> str:
    """'Firefox on Linux', for people who look for the login that is not theirs."""
    browser = next((_NAMES.get(name, name) for name in _BROWSERS if name in agent), "A browser")
    system = next((name for name in _SYSTEMS if name in agent), None)
    return f"{browser} on {system}".replace("Macintosh", "Mac") if system else browser


def end(session: Session, viewer: Viewer) -> None:
    """The login this request came with, if it is one: a token outlives it."""
    row = session.get(Token, viewer.token_id)
    if row is not None and row.kind == TokenKind.SESSION and row.revoked_at is None:
        row.revoked_at = now()
        session.add(row)
        record(session, row.user_id, "logout", row.name)
