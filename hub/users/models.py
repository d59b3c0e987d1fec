"""Rows of users, organisations, memberships, tokens, and of names that were given away."""

from datetime import datetime
from enum import StrEnum

from sqlalchemy import JSON, Column, UniqueConstraint
from sqlmodel import Field, SQLModel

from hub.db import UTCDateTime, now


class Scope(StrEnum):
    """What a token may do; each includes the ones before it.

    `write` publishes; `admin` also manages the account, its tokens and its organisations, and for
    an administrator the hub.
    """

    READ = "read"
    WRITE = "write"
    ADMIN = "admin"

    def includes(self, other: "Scope") -> bool:
        order = list(Scope)
        return order.index(self) >= order.index(other)


class TokenKind(StrEnum):
    """An access token's secret was handed out; a session is known to one browser's cookie only."""

    ACCESS = "access"
    SESSION = "session"


class Role(StrEnum):
    """What a member may do in an organisation's namespace."""

    READER = "reader"
    WRITER = "writer"
    ADMIN = "admin"


class Namespace(SQLModel, table=True):
    """Every name a user or organisation ever had; never deleted, so a name has one owner for ever.

    `key` is the lower-case name.
    """

    __tablename__ = "namespace"

    key: str = Field(primary_key=True)
    created_at: datetime = Field(default_factory=now, sa_type=UTCDateTime)


class User(SQLModel, table=True):
    __tablename__ = "user"

    id: int | None = Field(default=None, primary_key=True)
    name: str
    key: str = Field(unique=True, foreign_key="namespace.key")
    full_name: str = ""
    is_admin: bool = False
    is_disabled: bool = False
    created_at: datetime = Field(default_factory=now, sa_type=UTCDateTime)


class Organization(SQLModel, table=True):
    __tablename__ = "organization"

    id: int | None = Field(default=None, primary_key=True)
    name: str
    key: str = Field(unique=True, foreign_key="namespace.key")
    full_name: str = ""
    created_at: datetime = Field(default_factory=now, sa_type=UTCDateTime)


class Membership(SQLModel, table=True):
    __tablename__ = "membership"

    user_id: int = Field(primary_key=True, foreign_key="user.id", ondelete="CASCADE")
    organization_id: int = Field(
        primary_key=True, foreign_key="organization.id", ondelete="CASCADE", index=True
    )
    role: str = Role.WRITER


class Token(SQLModel, table=True):
    """A bearer token or a login of the web page; a secret is not kept, only its SHA-256.

    `places` are keys of namespaces and repos (`ns` or `ns/name`) it is confined to, or None.
    A session that began with a token has it as `parent_id` and ends with it.
    """

    __tablename__ = "token"

    id: int | None = Field(default=None, primary_key=True)
    user_id: int = Field(foreign_key="user.id", ondelete="CASCADE", index=True)
    kind: str = TokenKind.ACCESS
    name: str
    hash: str = Field(unique=True)
    scope: str  # Scope
    places: list[str] | None = Field(default=None, sa_column=Column(JSON(none_as_null=True)))
    parent_id: int | None = None
    address: str | None = None
    created_at: datetime = Field(default_factory=now, sa_type=UTCDateTime)
    last_used_at: datetime | None = Field(default=None, sa_type=UTCDateTime)
    expires_at: datetime | None = Field(default=None, sa_type=UTCDateTime)
    revoked_at: datetime | None = Field(default=None, sa_type=UTCDateTime)


class Password(SQLModel, table=True):
    """Apart from `user`, so that no listing of users can hold a hash."""

    __tablename__ = "password"

    user_id: int = Field(primary_key=True, foreign_key="user.id", ondelete="CASCADE")
    hash: str  # argon2id, with its parameters
    changed_at: datetime = Field(default_factory=now, sa_type=UTCDateTime)


class Identity(SQLModel, table=True):
    """Whom an OpenID Connect provider means by a subject; the e-mail address decides nothing."""

    __tablename__ = "identity"
    __table_args__ = (UniqueConstraint("issuer", "subject"),)

    id: int | None = Field(default=None, primary_key=True)
    user_id: int = Field(foreign_key="user.id", ondelete="CASCADE", index=True)
    issuer: str
    subject: str
    name: str = ""
    created_at: datetime = Field(default_factory=now, sa_type=UTCDateTime)


class Invitation(SQLModel, table=True):
    """A link that works once: for a new user, or for a new password of `user_id`.

    A new user becomes a member of the organisation, if one is named.
    """

    __tablename__ = "invitation"

    id: int | None = Field(default=None, primary_key=True)
    hash: str = Field(unique=True)
    user_id: int | None = Field(default=None, foreign_key="user.id", ondelete="CASCADE")
    organization_id: int | None = Field(
        default=None, foreign_key="organization.id", ondelete="CASCADE"
    )
    role: str | None = None  # Role
    created_by: int = Field(foreign_key="user.id", ondelete="CASCADE")
    created_at: datetime = Field(default_factory=now, sa_type=UTCDateTime)
    expires_at: datetime = Field(sa_type=UTCDateTime)
    used_at: datetime | None = Field(default=None, sa_type=UTCDateTime)


class Tries(SQLModel, table=True):
    """How often somebody tried to sign in as a user, or from an address, in one window of time."""

    __tablename__ = "tries"

    key: str = Field(primary_key=True)
    n: int
    since: datetime = Field(sa_type=UTCDateTime, index=True)


class NameTombstone(SQLModel, table=True):
    """A repo name that was deleted or moved away; only its last owner or an admin may reuse it."""

    __tablename__ = "name_tombstone"
    __table_args__ = (UniqueConstraint("type", "key"),)

    id: int | None = Field(default=None, primary_key=True)
    type: str
    key: str
    user_id: int | None = Field(default=None, foreign_key="user.id", ondelete="SET NULL")
    created_at: datetime = Field(default_factory=now, sa_type=UTCDateTime)
