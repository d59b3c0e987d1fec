"""Rows of repos, their commits, and the bytes they need.

`commit` and `commit_entry` are only ever inserted, and deleted with their repo.
"""

from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    ForeignKeyConstraint,
    Index,
    String,
    UniqueConstraint,
)
from sqlmodel import Field, SQLModel

from hub.db import UTCDateTime, now

# Compared byte by byte on both databases, so that a folder is one range of an index.
Path = String().with_variant(String(collation="C"), "postgresql")


class RepoType(StrEnum):
    MODEL = "model"
    DATASET = "dataset"


class RefKind(StrEnum):
    """A pull request is a branch `refs/pr/<number>` that only its own routes make."""

    BRANCH = "branch"
    TAG = "tag"
    PULL = "pull"


class Gate(StrEnum):
    """Who lets people at the files of a gated repo: the hub when they ask, or its owners."""

    AUTO = "auto"
    MANUAL = "manual"


class AccessState(StrEnum):
    PENDING = "pending"
    ACCEPTED = "accepted"
    REJECTED = "rejected"


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
    # Gate; everybody who sees the repo may have its files where it is None.
    gated: str | None = None
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


class AccessRequest(SQLModel, table=True):
    """A user's wish for the files of a gated repo, and what became of it."""

    __tablename__ = "access_request"
    __table_args__ = (UniqueConstraint("repo_id", "user_id"),)

    id: int | None = Field(default=None, primary_key=True)
    repo_id: int = Field(foreign_key="repo.id", ondelete="CASCADE")
    user_id: int = Field(foreign_key="user.id", ondelete="CASCADE", index=True)
    state: str  # AccessState
    reason: str = ""
    created_at: datetime = Field(default_factory=now, sa_type=UTCDateTime)


class Like(SQLModel, table=True):
    """`repo.likes` is how many of these a repo has."""

    __tablename__ = "like"

    repo_id: int = Field(primary_key=True, foreign_key="repo.id", ondelete="CASCADE")
    user_id: int = Field(primary_key=True, foreign_key="user.id", ondelete="CASCADE", index=True)
    created_at: datetime = Field(default_factory=now, sa_type=UTCDateTime)


class DiscussionStatus(StrEnum):
    """`draft` and `merged` are for pull requests alone."""

    OPEN = "open"
    CLOSED = "closed"
    MERGED = "merged"
    DRAFT = "draft"


class Discussion(SQLModel, table=True):
    """A conversation about a repo; a pull request also has the branch `refs/pr/<num>`."""

    __tablename__ = "discussion"

    repo_id: int = Field(primary_key=True, foreign_key="repo.id", ondelete="CASCADE")
    num: int = Field(primary_key=True)
    author_id: int | None = Field(
        default=None, foreign_key="user.id", ondelete="SET NULL", index=True
    )
    title: str
    status: str = DiscussionStatus.OPEN
    # The branch that a pull request would change; None for a plain discussion.
    target: str | None = None
    merged_as: str | None = None
    created_at: datetime = Field(default_factory=now, sa_type=UTCDateTime)

    @property
    def is_pull_request(self) -> bool:
        return self.target is not None


class EventKind(StrEnum):
    COMMENT = "comment"
    STATUS = "status-change"
    TITLE = "title-change"


class DiscussionEvent(SQLModel, table=True):
    """What happened in a discussion: `text` is a comment, or the title or status after `before`."""

    __tablename__ = "discussion_event"
    __table_args__ = (
        ForeignKeyConstraint(
            ["repo_id", "num"], ["discussion.repo_id", "discussion.num"], ondelete="CASCADE"
        ),
        Index("ix_discussion_event_repo_id_num", "repo_id", "num"),
    )

    id: int | None = Field(default=None, primary_key=True)
    repo_id: int
    num: int
    author_id: int | None = Field(
        default=None, foreign_key="user.id", ondelete="SET NULL", index=True
    )
    kind: str  # EventKind
    before: str = ""
    text: str = ""
    is_edited: bool = False
    is_hidden: bool = False
    created_at: datetime = Field(default_factory=now, sa_type=UTCDateTime)


class Collection(SQLModel, table=True):
    """A list of repos that belong together, kept by a user or organisation.

    `key` is its id outside, 24 hex digits; `position` its place among its owner's.
    """

    __tablename__ = "collection"
    __table_args__ = (
        UniqueConstraint("namespace_key", "title"),
        {"sqlite_autoincrement": True},
    )

    id: int | None = Field(default=None, primary_key=True)
    key: str = Field(unique=True)
    namespace: str
    namespace_key: str = Field(foreign_key="namespace.key")
    title: str
    description: str | None = None
    theme: str
    private: bool = False
    position: int = 0
    created_at: datetime = Field(default_factory=now, sa_type=UTCDateTime)
    last_updated: datetime = Field(default_factory=now, sa_type=UTCDateTime, index=True)


class CollectionItem(SQLModel, table=True):
    """A repo or another collection in a collection; the other of the two columns is null.

    Positions rise, but those of what was deleted since are left out.
    """

    __tablename__ = "collection_item"
    __table_args__ = (
        UniqueConstraint("collection_id", "repo_id"),
        UniqueConstraint("collection_id", "child_id"),
        {"sqlite_autoincrement": True},
    )

    id: int | None = Field(default=None, primary_key=True)
    collection_id: int = Field(foreign_key="collection.id", ondelete="CASCADE")
    repo_id: int | None = Field(default=None, foreign_key="repo.id", ondelete="CASCADE", index=True)
    child_id: int | None = Field(
        default=None, foreign_key="collection.id", ondelete="CASCADE", index=True
    )
    position: int
    note: str | None = None


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
    """The outbox: written with the change it tells of, done once the projection has caught up,
    heard once the webhooks have it.
    """

    __tablename__ = "event"

    id: int | None = Field(default=None, primary_key=True)
    kind: str
    # No foreign key: "deleted" is told about a repo that is gone.
    repo_id: int
    commit_id: str | None = None
    created_at: datetime = Field(default_factory=now, sa_type=UTCDateTime)
    done_at: datetime | None = Field(default=None, sa_type=UTCDateTime, index=True)
    # What was said of the repo, which may be gone or have another name when it is heard.
    document: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON, nullable=True))
    heard_at: datetime | None = Field(default=None, sa_type=UTCDateTime, index=True)
