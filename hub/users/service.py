"""Users, their tokens, and what a request may do."""

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from datetime import datetime

from sqlmodel import Session, col, select

from hub.audit import record
from hub.db import now
from hub.errors import BadField, BadName, Forbidden, NameTaken, Unauthorized, UserNotFound
from hub.users.models import Membership, Namespace, Organization, Role, Scope, Token, User
from hub.users.names import check_namespace, key_of

PREFIX = "graft_"


@dataclass(frozen=True, slots=True)
class Viewer:
    """Who asks: a user with a token of some scope, or nobody."""

    user: User | None = None
    scope: Scope | None = None
    token_id: int | None = None

    @property
    def user_id(self) -> int | None:
        return self.user.id if self.user is not None else None

    @property
    def is_admin(self) -> bool:
        """An administrator whose token may write."""
        return self.user is not None and self.user.is_admin and self.scope == Scope.WRITE

    def require_user(self) -> User:
        """Unauthorized without a valid token."""
        if self.user is None:
            raise Unauthorized("this needs a token: Authorization: Bearer graft_…")
        return self.user

    def require_write(self) -> User:
        """Unauthorized without a token, Forbidden with one that may only read."""
        user = self.require_user()
        if self.scope != Scope.WRITE:
            raise Forbidden("this token may only read")
        return user


ANONYMOUS = Viewer()


def create_user(session: Session, name: str, *, full_name: str = "", admin: bool = False) -> User:
    """NameTaken for ever once a user or organisation had the name, in any case."""
    user = User(name=name, key=_claim(session, name), full_name=full_name, is_admin=admin)
    session.add(user)
    session.flush()
    record(session, user.id, "user.create", name)
    return user


def create_organization(session: Session, name: str, owner: User) -> Organization:
    """Its first member is `owner`, who may manage it."""
    organization = Organization(name=name, key=_claim(session, name))
    session.add(organization)
    session.flush()
    assert owner.id is not None
    assert organization.id is not None
    session.add(Membership(user_id=owner.id, organization_id=organization.id, role=Role.ADMIN))
    record(session, owner.id, "organization.create", name)
    return organization


def set_role(session: Session, viewer: Viewer, organization: str, name: str, role: Role) -> None:
    """Make a user a member, or change what they may do; Forbidden, UserNotFound."""
    by = viewer.require_write()
    if not _has_role(session, viewer, organization, (Role.ADMIN,)):
        raise Forbidden(f"{by.name} may not change the members of {organization}")
    query = select(Organization).where(Organization.key == key_of(organization))
    found = session.exec(query).first()
    if found is None:
        raise UserNotFound(f"there is no organisation {organization!r}")
    user = find_user(session, name)
    assert user.id is not None
    assert found.id is not None
    member = session.get(Membership, (user.id, found.id))
    if member is None:
        member = Membership(user_id=user.id, organization_id=found.id)
    member.role = role
    session.add(member)
    record(session, by.id, "organization.member", f"{found.name}: {user.name} ({role})")


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


def may_write(session: Session, viewer: Viewer, namespace: str) -> bool:
    """Whether the viewer may change repos of a namespace, as the database says now."""
    return _has_role(session, viewer, namespace, (Role.WRITER, Role.ADMIN)) and (
        viewer.scope == Scope.WRITE
    )


def may_read_private(session: Session, viewer: Viewer, namespace: str) -> bool:
    """Whether the viewer sees the private repos of a namespace."""
    return _has_role(session, viewer, namespace, tuple(Role))


def private_namespaces(session: Session, viewer: Viewer) -> list[str] | None:
    """Keys of the namespaces whose private repos the viewer sees; None means all of them."""
    if viewer.user is None:
        return []
    if viewer.user.is_admin:
        return None
    return [viewer.user.key, *(org.key for org, _ in organizations(session, viewer.user))]


def issue_token(
    session: Session,
    user: User,
    name: str,
    scope: Scope = Scope.WRITE,
    *,
    expires_at: datetime | None = None,
) -> str:
    """A new secret, `graft_` and 256 random bits; this is the only time it is seen."""
    if not 1 <= len(name) <= 100:
        raise BadField("a token's name has 1 to 100 characters", "name")
    assert user.id is not None
    secret = PREFIX + secrets.token_urlsafe(32)
    session.add(
        Token(
            user_id=user.id,
            name=name,
            hash=_hash(secret),
            scope=scope,
            expires_at=expires_at,
        )
    )
    record(session, user.id, "token.issue", f"{user.name}: {name} ({scope})")
    return secret


def tokens(session: Session, user: User) -> list[Token]:
    """Tokens that still work, newest first; their secrets are not kept."""
    query = select(Token).where(Token.user_id == user.id, col(Token.revoked_at).is_(None))
    found = session.exec(query.order_by(col(Token.id).desc())).all()
    return [token for token in found if _is_alive(token)]


def revoke_token(session: Session, user: User, token_id: int) -> None:
    """Sessions of the web page that came from the token end with it."""
    token = session.get(Token, token_id)
    if token is None or token.user_id != user.id:
        raise UserNotFound(f"{user.name} has no such token")
    token.revoked_at = now()
    session.add(token)
    record(session, user.id, "token.revoke", f"{user.name}: {token.name}")


def viewer_of(session: Session, secret: str) -> Viewer:
    """Who a bearer token belongs to; Unauthorized if it is unknown, revoked or too old."""
    hashed = _hash(secret)
    token = session.exec(select(Token).where(Token.hash == hashed)).first()
    # The index compares hashes of 256-bit secrets, so its timing tells nothing about a secret.
    if token is None or not hmac.compare_digest(token.hash, hashed):
        raise _invalid_token()
    return _viewer(session, token)


def viewer_of_token_id(session: Session, token_id: int) -> Viewer:
    """As `viewer_of`, for the signed cookie of the web page, which holds a token's id."""
    token = session.get(Token, token_id)
    if token is None:
        raise _invalid_token()
    return _viewer(session, token)


def recheck(session: Session, viewer: Viewer) -> Viewer:
    """Inside a write transaction: what was revoked since the request began counts no more."""
    return viewer if viewer.token_id is None else viewer_of_token_id(session, viewer.token_id)


def _viewer(session: Session, token: Token) -> Viewer:
    user = session.get(User, token.user_id)
    if not _is_alive(token) or user is None or user.is_disabled:
        raise _invalid_token()
    return Viewer(user, Scope(token.scope), token.id)


def _invalid_token() -> Unauthorized:
    # huggingface_hub compares this text (utils/_http.py, hf_raise_for_status).
    return Unauthorized("Invalid credentials in Authorization header")


def _is_alive(token: Token) -> bool:
    return token.revoked_at is None and (token.expires_at is None or token.expires_at > now())


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _claim(session: Session, name: str) -> str:
    key = key_of(check_namespace(name, "name"))
    if session.get(Namespace, key) is not None:
        raise NameTaken(f"the name {name!r} is or was in use", "name")
    session.add(Namespace(key=key))
    session.flush()
    return key


def _has_role(session: Session, viewer: Viewer, namespace: str, roles: tuple[Role, ...]) -> bool:
    if viewer.user is None:
        return False
    key = key_of(namespace)
    if viewer.user.is_admin or viewer.user.key == key:
        return True
    query = (
        select(Membership.role)
        .join(Organization, col(Organization.id) == col(Membership.organization_id))
        .where(Membership.user_id == viewer.user.id, Organization.key == key)
    )
    return session.exec(query).first() in roles
