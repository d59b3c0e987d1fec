"""Rows of repos, their commits, and the bytes they need.

`commit` and `commit_entry` are only ever inserted, and deleted with their repo.
"""

from datetime import datetime
from enum import StrEnum

from sqlalchemy import BigInteger, Index, String, UniqueConstraint
from sqlmodel import Field, SQLModel

from hub.db import UTCDateTime, now

# Compared byte by byte on both databases, so that a folder is one range of an index.
Path = String().with_variant(String(collation="C"), "postgresql")


class RepoType(StrEnum):
    MODEL = "model"
    DATASET = "dataset"


class RefKind(StrEnum):
    BRANCH = "branch"
    TAG = "tag"


class BlobState(StrEnum):
    """A condemned blob is back to present as soon as anything refers to it again.

    One that is being deleted may have lost its bytes already: they have to be sent again.
    """

    PRESENT = "present"
    CONDEMNED = "condemned"
    DELETING = "deleting"


class Blob(SQLModel, table=True):
    """Bytes that the store holds; the row exists only after they are durable there."""

    __tablename__ = "blob"

    sha256: str = Field(primary_key=True)
    size: int = Field(sa_type=BigInteger)
    git_oid: str | None = None
    state: str = BlobState.PRESENT
    # Since when the state is another one than present.
    condemned_at: datetime | None = Field(default=None, sa_type=UTCDateTime, index=True)
    created_at: datetime = Field(default_factory=now, sa_type=UTCDateTime)
    verified_at: datetime = Field(default_factory=now, sa_type=UTCDateTime)


class Repo(SQLModel, table=True):
    """`namespace/name` of one type; `key` is both in lower case, `head` the commit of main."""

    __tablename__ = "repo"
    __table_args__ = (
        UniqueConstraint("type", "key"),
        Index("ix_repo_last_modified", "type", "last_modified"),
        Index("ix_repo_namespace_key", "namespace_key"),
        # Ids are never used again, so nothing that names a deleted repo finds another one.
        {"sqlite_autoincrement": True},
    )

    id: int | None = Field(default=None, primary_key=True)
    type: str = RepoType.MODEL
    namespace: str
    name: str
    namespace_key: str = Field(foreign_key="namespace.key")
    key: str
    private: bool = False
    owner_id: int | None = Field(default=None, foreign_key="user.id", ondelete="SET NULL")
    head: str | None = None
    downloads: int = 0
    likes: int = 0
    created_at: datetime = Field(default_factory=now, sa_type=UTCDateTime)
    last_modified: datetime = Field(default_factory=now, sa_type=UTCDateTime)

    @property
    def full_name(self) -> str:
        return f"{self.namespace}/{self.name}"


class Redirect(SQLModel, table=True):
    """An old name of a repo that was moved."""

    __tablename__ = "redirect"

    type: str = Field(primary_key=True)
    key: str = Field(primary_key=True)
    repo_id: int = Field(foreign_key="repo.id", ondelete="CASCADE", index=True)


class Commit(SQLModel, table=True):
    """A state of a whole repo; `id` is the SHA-1 of a canonical record of it, 40 hex digits."""

    __tablename__ = "commit"

    id: str = Field(primary_key=True)
    repo_id: int = Field(foreign_key="repo.id", ondelete="CASCADE", index=True)
    parent_id: str | None = Field(default=None, index=True)
    author: str
    message: str
    description: str = ""
    created_at: datetime = Field(sa_type=UTCDateTime)


class CommitEntry(SQLModel, table=True):
    """One file of a commit; `last_commit_id` is the commit that last changed this path."""

    __tablename__ = "commit_entry"

    commit_id: str = Field(primary_key=True, foreign_key="commit.id", ondelete="CASCADE")
    path: str = Field(primary_key=True, sa_type=Path)
    sha256: str = Field(foreign_key="blob.sha256", index=True)
    git_oid: str
    size: int = Field(sa_type=BigInteger)
    lfs: bool
    last_commit_id: str


class Ref(SQLModel, table=True):
    """A branch or tag."""

    __tablename__ = "ref"

    repo_id: int = Field(primary_key=True, foreign_key="repo.id", ondelete="CASCADE")
    kind: str = Field(primary_key=True)
    name: str = Field(primary_key=True)
    commit_id: str = Field(foreign_key="commit.id", ondelete="CASCADE", index=True)


class Hold(SQLModel, table=True):
    """A promise to keep a blob until a time: bytes that were sent and not committed yet.

    It is also the proof that its user has had the bytes and may commit them by their digest.
    """

    __tablename__ = "hold"
    __table_args__ = (UniqueConstraint("sha256", "user_id"),)

    id: int | None = Field(default=None, primary_key=True)
    sha256: str = Field(foreign_key="blob.sha256")
    user_id: int = Field(foreign_key="user.id", ondelete="CASCADE", index=True)
    expires_at: datetime = Field(sa_type=UTCDateTime, index=True)


class Event(SQLModel, table=True):
    """The outbox: written with the change it tells of, done once the projection has caught up."""

    __tablename__ = "event"

    id: int | None = Field(default=None, primary_key=True)
    kind: str
    # No foreign key: "deleted" is told about a repo that is gone.
    repo_id: int
    commit_id: str | None = None
    created_at: datetime = Field(default_factory=now, sa_type=UTCDateTime)
    done_at: datetime | None = Field(default=None, sa_type=UTCDateTime, index=True)
