"""Users, their tokens, and what a request may do."""

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import bindparam
from sqlalchemy.orm import aliased
from sqlmodel import Session, col, select

from hub.audit import record
from hub.db import insert_once, now
from hub.errors import (
    BadField,
    BadName,
    Forbidden,
    LastAdmin,
    NameTaken,
    Unauthorized,
    UserNotFound,
)
from hub.users.models import (
    Membership,
    Namespace,
    Organization,
    Role,
    Scope,
    Token,
    TokenKind,
    User,
)
from hub.users.names import check_name, check_namespace, check_shown, key_of

PREFIX = "graft_"
# By how much the clocks of two servers may differ.
_CLOCKS = timedelta(seconds=10)
MAX_PLACES = 100
_NOUN = {TokenKind.ACCESS: "token", TokenKind.SESSION: "session"}


@dataclass(frozen=True, slots=True)
class Viewer:
    """Who asks: a user with a token of some scope, or nobody.

    `places` are keys of the namespaces and repos the token is confined to; None: no such limit.
    """

    user: User | None = None
    scope: Scope | None = None
    token_id: int | None = None
    places: frozenset[str] | None = None

    @property
    def user_id(self) -> int | None:
        return self.user.id if self.user is not None else None

    @property
    def is_admin(self) -> bool:
        """An administrator of the hub who asks as one: with scope `admin`, confined to no place."""
        return self.user is not None and self.user.is_admin and self.manages

    def require_user(self) -> User:
        """Unauthorized without a valid token."""
        if self.user is None:
            raise Unauthorized("this needs a token: Authorization: Bearer graft_…")
        return self.user

    def require_write(self) -> User:
        """Unauthorized without a token, Forbidden with one that may only read."""
        user = self.require_user()
        if not self.has(Scope.WRITE):
            raise Forbidden("this token may only read")
        return user

    def require_account(self) -> User:
        """Forbidden unless the token has scope `admin` and is confined to no place."""
        user = self.require_user()
        if not self.manages:
            raise Forbidden("this needs a token with scope admin that is not limited to places")
        return user

    def require_admin(self) -> User:
        """Forbidden unless an administrator of the hub asks as one."""
        user = self.require_account()
        if not user.is_admin:
            raise Forbidden("this is for administrators of the hub")
        return user

    def has(self, scope: Scope) -> bool:
        return self.scope is not None and self.scope.includes(scope)

    def covers(self, namespace: str, name: str | None = None) -> bool:
        """Whether the token's places, if it has any, include a repo or, without `name`, all of a
        namespace."""
        key = key_of(namespace)
        if self.places is None or key in self.places:
            return True
        return name is not None and f"{key}/{key_of(name)}" in self.places

    @property
    def manages(self) -> bool:
        """Whether the token may change the account: it has scope `admin` and is confined nowhere."""
        return self.has(Scope.ADMIN) and self.places is None


ANONYMOUS = Viewer()


def create_user(
    session: Session,
    name: str,
    *,
    full_name: str = "",
    admin: bool = False,
    by: User | None = None,
) -> User:
    """NameTaken for ever once a user or organisation had the name, in any case.

    `by` is the administrator who makes it; None: the users themselves, or the hub.
    """
    shown = check_shown(full_name, "full_name")
    user = User(name=name, key=_claim(session, name), full_name=shown, is_admin=admin)
    session.add(user)
    session.flush()
    record(session, user.id if by is None else by.id, "user.create", name)
    return user


def all_users(session: Session) -> list[User]:
    """By name."""
    return list(session.exec(select(User).order_by(User.key)))


def change_user(
    session: Session,
    by: User,
    name: str,
    *,
    full_name: str | None = None,
    is_admin: bool | None = None,
    is_disabled: bool | None = None,
) -> User:
    """What is None stays; the hub keeps one administrator. UserNotFound, LastAdmin."""
    # Two administrators who disable each other wait here, and the second finds who is left.
    everybody = session.exec(select(User).where(User.is_admin).with_for_update()).all()
    user = find_user(session, name)
    loses = is_admin is False or is_disabled is True
    if loses and not any(a.id != user.id and not a.is_disabled for a in everybody):
        raise LastAdmin(f"{user.name} is the last administrator of this hub: name another first")
    if full_name is not None:
        user.full_name = check_shown(full_name, "full_name")
        record(session, by.id, "user.rename", f"{user.name}: {full_name}")
    if is_admin is not None and is_admin != user.is_admin:
        user.is_admin = is_admin
        record(session, by.id, "user.promote" if is_admin else "user.demote", user.name)
    if is_disabled is not None and is_disabled != user.is_disabled:
        user.is_disabled = is_disabled
        record(session, by.id, "user.disable" if is_disabled else "user.enable", user.name)
    session.add(user)
    return user


def create_organization(
    session: Session, name: str, owner: User, *, full_name: str = ""
) -> Organization:
    """Its first member is `owner`, who may manage it."""
    shown = check_shown(full_name, "full_name")
    organization = Organization(name=name, key=_claim(session, name), full_name=shown)
    session.add(organization)
    session.flush()
    assert owner.id is not None
    assert organization.id is not None
    session.add(Membership(user_id=owner.id, organization_id=organization.id, role=Role.ADMIN))
    record(session, owner.id, "organization.create", name)
    return organization


def find_user(session: Session, name: str) -> User:
    """UserNotFound."""
    user = session.exec(select(User).where(User.key == key_of(name))).first()
    if user is None:
        raise UserNotFound(f"there is no user {name!r}")
    return user


def organizations(session: Session, user: User) -> list[tuple[Organization, Role]]:
    """The organisations a user is in and the role there, by name."""
    query = (
        select(Organization, Membership.role)
        .join(Membership, col(Membership.organization_id) == col(Organization.id))
        .where(Membership.user_id == user.id)
        .order_by(Organization.key)
    )
    return [(organization, Role(role)) for organization, role in session.exec(query)]


def canonical_namespace(session: Session, namespace: str) -> str | None:
    """The name as its owner spelt it, or None if nobody has it."""
    key = key_of(namespace)
    user = session.exec(select(User.name).where(User.key == key)).first()
    return user or session.exec(select(Organization.name).where(Organization.key == key)).first()


def require_namespace(session: Session, user: User, namespace: str, param: str) -> str:
    """The name as its owner spelt it. BadName about the request's field `param`."""
    found = canonical_namespace(session, namespace)
    if found is None:
        raise BadName(
            f"there is no user or organisation {namespace!r}: take {user.name}/…, or make the "
            "organisation first (POST /api/organizations)",
            param,
        )
    return found


def may_write(session: Session, viewer: Viewer, namespace: str, name: str | None = None) -> bool:
    """Whether the viewer may change a repo as the database says now; without `name`, any repo of
    the namespace."""
    return (
        viewer.has(Scope.WRITE)
        and viewer.covers(namespace, name)
        and has_role(session, viewer, namespace, (Role.WRITER, Role.ADMIN))
    )


def writable_namespaces(session: Session, viewer: Viewer) -> list[str]:
    """Where the viewer may write to every repo: their own place first, then their organisations."""
    user = viewer.require_user()
    names = [user.name, *(found.name for found, _ in organizations(session, user))]
    return [name for name in names if may_write(session, viewer, name)]


def may_manage(session: Session, viewer: Viewer, namespace: str) -> bool:
    """Whether the viewer may say who is a member of an organisation, and as what."""
    return (
        viewer.has(Scope.ADMIN)
        and viewer.covers(namespace)
        and has_role(session, viewer, namespace, (Role.ADMIN,))
    )


def may_read_private(
    session: Session, viewer: Viewer, namespace: str, name: str | None = None
) -> bool:
    """Whether the viewer sees a private repo; without `name`, every one of the namespace."""
    return viewer.covers(namespace, name) and has_role(session, viewer, namespace, tuple(Role))


@dataclass(frozen=True, slots=True)
class PrivateKeys:
    """Keys of what a viewer sees though it is private: whole namespaces, and single repos."""

    namespaces: list[str]
    repos: list[str]


def private_keys(session: Session, viewer: Viewer) -> PrivateKeys | None:
    """What `may_read_private` decides for one, for conditions of queries; None means everything."""
    if viewer.user is None:
        return PrivateKeys([], [])
    if viewer.is_admin:
        return None
    own = [viewer.user.key, *(org.key for org, _ in organizations(session, viewer.user))]
    if viewer.places is None:
        return PrivateKeys(own, [])
    single = [place for place in viewer.places if place.partition("/")[0] in own and "/" in place]
    return PrivateKeys([key for key in own if key in viewer.places], sorted(single))


def issue_token(
    session: Session,
    user: User,
    name: str,
    scope: Scope = Scope.WRITE,
    *,
    expires_at: datetime | None = None,
    places: Iterable[str] | None = None,
) -> str:
    """A new secret, `graft_` and 256 random bits; this is the only time it is seen.

    With `places` (`namespace` or `namespace/name`) it acts there only. BadField.
    """
    if not 1 <= len(name) <= 100:
        raise BadField("a token's name has 1 to 100 characters", "name")
    assert user.id is not None
    secret = PREFIX + secrets.token_urlsafe(32)
    limited = None if places is None else _places(session, places)
    session.add(
        Token(
            user_id=user.id,
            name=check_shown(name, "name"),
            hash=hash_of(secret),
            scope=scope,
            places=limited,
            expires_at=expires_at,
        )
    )
    where = "" if limited is None else f" in {', '.join(limited)}"
    record(session, user.id, "token.issue", f"{user.name}: {name} ({scope}){where}")
    return secret


def _places(session: Session, places: Iterable[str]) -> list[str]:
    found = sorted({key_of(place.strip()) for place in places if place.strip()})
    if not found:
        raise BadField("name at least one place: a namespace, or namespace/name", "places")
    if len(found) > MAX_PLACES:
        raise BadField(f"a token is limited to at most {MAX_PLACES} places", "places")
    for place in found:
        namespace, slash, name = place.partition("/")
        if canonical_namespace(session, namespace) is None:
            raise BadField(f"there is no user or organisation {namespace!r}", "places")
        if slash:
            check_name(name, "places")
    return found


def tokens(session: Session, user: User, kind: TokenKind = TokenKind.ACCESS) -> list[Token]:
    """Tokens, or sessions of the web page, that still work, newest first."""
    query = select(Token).where(
        Token.user_id == user.id, Token.kind == kind, col(Token.revoked_at).is_(None)
    )
    found = session.exec(query.order_by(col(Token.id).desc())).all()
    return [token for token in found if is_alive(token)]


def revoke_token(session: Session, user: User, token_id: int) -> None:
    """Sessions of the web page that came from the token end with it."""
    token = session.get(Token, token_id)
    if token is None or token.user_id != user.id:
        raise UserNotFound(f"{user.name} has no such token")
    token.revoked_at = now()
    session.add(token)
    record(session, user.id, f"{_NOUN[TokenKind(token.kind)]}.revoke", f"{user.name}: {token.name}")


def viewer_of(session: Session, secret: str) -> Viewer:
    """Who a bearer token belongs to; Unauthorized if it is unknown, revoked or too old."""
    hashed = hash_of(secret)
    # The index compares hashes of 256-bit secrets, so its timing tells nothing about a secret.
    found = session.execute(_BY_HASH, {"hash": hashed}).first()
    if found is None or not hmac.compare_digest(found[0].hash, hashed):
        raise _invalid_token()
    return _viewer(*found)


def viewer_of_token_id(session: Session, token_id: int) -> Viewer:
    """As `viewer_of`, for the signed cookie of the web page, which holds a token's id."""
    found = session.execute(_BY_ID, {"id": token_id}).first()
    if found is None:
        raise _invalid_token()
    return _viewer(*found)


def viewer_of_signed(session: Session, token_id: int, signed_at: datetime) -> Viewer:
    """As `viewer_of_token_id`, for an id in something that was signed at that time.

    A catalogue that came back from a backup, or from its blobs, gives out some ids again: what is
    older than its token was signed for another one.
    """
    viewer = viewer_of_token_id(session, token_id)
    if session.get_one(Token, token_id).created_at > signed_at + _CLOCKS:
        raise _invalid_token()
    return viewer


def recheck(session: Session, viewer: Viewer) -> Viewer:
    """Inside a write transaction: what was revoked since the request began counts no more."""
    return viewer if viewer.token_id is None else viewer_of_token_id(session, viewer.token_id)


# Of nearly every request, so they are made once: making a statement takes longer than running it.
_Parent = aliased(Token)
_TOKEN = (
    select(Token, User, _Parent)
    .join(User, col(User.id) == col(Token.user_id))
    .outerjoin(_Parent, col(_Parent.id) == col(Token.parent_id))
)
_BY_HASH = _TOKEN.where(col(Token.hash) == bindparam("hash"))
_BY_ID = _TOKEN.where(col(Token.id) == bindparam("id"))


def _viewer(token: Token, user: User, parent: Token | None) -> Viewer:
    if user.is_disabled or not is_alive(token):
        raise _invalid_token()
    if token.parent_id is not None and (parent is None or not is_alive(parent)):
        raise _invalid_token()
    places = None if token.places is None else frozenset(token.places)
    return Viewer(user, Scope(token.scope), token.id, places)


def _invalid_token() -> Unauthorized:
    # huggingface_hub compares this text (utils/_http.py, hf_raise_for_status).
    return Unauthorized("Invalid credentials in Authorization header")


def is_alive(token: Token) -> bool:
    """Neither revoked nor too old."""
    return token.revoked_at is None and (token.expires_at is None or token.expires_at > now())


def hash_of(secret: str) -> str:
    """What is kept of a secret that nobody can guess."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _claim(session: Session, name: str) -> str:
    key = key_of(check_namespace(name, "name"))
    row = Namespace(key=key).model_dump()
    claimed = session.execute(
        insert_once(session, Namespace)
        .values(row)
        .on_conflict_do_nothing()
        .returning(col(Namespace.key))
    )
    if claimed.first() is None:
        raise NameTaken(f"the name {name!r} is or was in use", "name")
    return key


def has_role(session: Session, viewer: Viewer, namespace: str, roles: tuple[Role, ...]) -> bool:
    """Whether the namespace is the viewer's own, or an organisation where they have such a role;
    administrators of the hub have every role everywhere."""
    if viewer.user is None:
        return False
    key = key_of(namespace)
    if viewer.is_admin or viewer.user.key == key:
        return True
    query = (
        select(Membership.role)
        .join(Organization, col(Organization.id) == col(Membership.organization_id))
        .where(Membership.user_id == viewer.user.id, Organization.key == key)
    )
    return session.exec(query).first() in roles
