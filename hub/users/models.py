"""Rows of users, organisations, memberships, tokens, and of names that were given away."""

from datetime import datetime
from enum import StrEnum

from sqlalchemy import UniqueConstraint
from sqlmodel import Field, SQLModel

from hub.db import UTCDateTime, now


class Scope(StrEnum):
    """What a token may do; `write` includes `read`."""

    READ = "read"
    WRITE = "write"


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
    """A bearer token; the secret itself is not kept, only its SHA-256."""

    __tablename__ = "token"

    id: int | None = Field(default=None, primary_key=True)
    user_id: int = Field(foreign_key="user.id", ondelete="CASCADE", index=True)
    name: str
    hash: str = Field(unique=True)
    scope: str  # Scope
    created_at: datetime = Field(default_factory=now, sa_type=UTCDateTime)
    expires_at: datetime | None = Field(default=None, sa_type=UTCDateTime)
    revoked_at: datetime | None = Field(default=None, sa_type=UTCDateTime)


class NameTombstone(SQLModel, table=True):
    """A repo name that was deleted or moved away; only its last owner or an admin may reuse it."""

    __tablename__ = "name_tombstone"
    __table_args__ = (UniqueConstraint("type", "key"),)

    id: int | None = Field(default=None, primary_key=True)
    type: str
    key: str
    user_id: int | None = Field(default=None, foreign_key="user.id", ondelete="SET NULL")
    created_at: datetime = Field(default_factory=now, sa_type=UTCDateTime)
