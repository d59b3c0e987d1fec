"""Passwords: argon2id hashes, and signing in without telling which names exist."""

from functools import cache
from threading import BoundedSemaphore

from argon2 import PasswordHasher
from argon2.exceptions import VerifyMismatchError
from sqlmodel import Session, select

from hub.audit import record
from hub.db import Database, now
from hub.errors import BadField, Unauthorized
from hub.users import throttle
from hub.users.models import Password, TokenKind, User
from hub.users.names import key_of
from hub.users.service import tokens

MIN_LENGTH, MAX_LENGTH = 12, 256
# RFC 9106's second recommended choice, which is argon2-cffi's default: argon2id, 3 passes, 64 MiB.
HASHER = PasswordHasher()
# One hash takes 64 MiB, and a server has 40 threads.
_AT_ONCE = BoundedSemaphore(2)


def check(text: str, name: str) -> None:
    """BadField with the rule that is broken."""
    if not MIN_LENGTH <= len(text) <= MAX_LENGTH:
        raise BadField(f"a password has {MIN_LENGTH} to {MAX_LENGTH} characters", "password")
    if len(set(text)) < 4 or key_of(name) in text.lower() and len(text) < 2 * len(name) + 4:
        raise BadField("this password is too easy to guess", "password")


def hashed(text: str) -> str:
    """Takes 64 MiB and tens of milliseconds: never inside a transaction."""
    with _AT_ONCE:
        return HASHER.hash(text)


def is_right(database: Database, user: User, text: str) -> bool:
    """Whether this is the user's password; never inside a transaction."""
    with database.read() as session:
        row = session.get(Password, user.id)
    return _verified(row.hash if row is not None else None, text)


def exists(session: Session, user: User | None = None) -> bool:
    """Whether this user, or any at all, can sign in with a password."""
    query = select(Password.user_id)
    if user is not None:
        query = query.where(Password.user_id == user.id)
    return session.exec(query.limit(1)).first() is not None


def store(session: Session, user: User, hash: str) -> None:
    """A new password from `hashed`; every login of the web page ends."""
    assert user.id is not None
    row = session.get(Password, user.id) or Password(user_id=user.id, hash=hash)
    row.hash, row.changed_at = hash, now()
    session.add(row)
    end_sessions(session, user)
    record(session, user.id, "password.change", user.name)


def end_sessions(session: Session, user: User, *, but: int | None = None) -> None:
    """Every login of the web page but one ends."""
    for login in tokens(session, user, TokenKind.SESSION):
        if login.id != but:
            login.revoked_at = now()
            session.add(login)


def sign_in(database: Database, name: str, text: str, address: str) -> User:
    """The user if name and password are right.

    Unauthorized says the same, after the same work, for a wrong password, an unknown name, a
    disabled user and one without a password. TooManyTries before anything is compared.
    """
    keys = throttle.keys_of(name, address)
    throttle.count_try(database, keys)
    with database.read() as session:
        # PostgreSQL cannot even look for a name with NUL.
        named = User.key == key_of(name.replace("\0", "?"))
        user = session.exec(select(User).where(named)).first()
        row = session.get(Password, user.id) if user is not None else None
    known = row.hash if row is not None else None
    is_right = _verified(known, text)
    if user is None or known is None or not is_right:
        raise _wrong()
    better = hashed(text) if HASHER.check_needs_rehash(known) else None
    with database.write() as session:
        now_user, now_row = session.get(User, user.id), session.get(Password, user.id)
        # What was true when the hash was read may be over: disabled, or a new password.
        if now_user is None or now_user.is_disabled or now_row is None or now_row.hash != known:
            raise _wrong()
        if better is not None:
            now_row.hash = better
            session.add(now_row)
        throttle.forget(session, keys.user)
    return now_user


def _verified(known: str | None, text: str) -> bool:
    with _AT_ONCE:
        try:
            # An unknown name costs as much as a known one.
            HASHER.verify(known if known is not None else _nobodys(), text[: MAX_LENGTH + 1])
        except VerifyMismatchError:
            return False
    return known is not None


@cache
def _nobodys() -> str:
    return HASHER.hash("nobody has this password")


def _wrong() -> Unauthorized:
    return Unauthorized("The name or the password is wrong")
