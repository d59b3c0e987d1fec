"""Rows of the catalogue: a projection of the files at each repo's `main`, made anew at any time.

Nothing here is the only copy of anything; `graft admin reindex` writes all of it from blobs alone.
"""

from datetime import datetime
from enum import StrEnum

from sqlalchemy import BigInteger, Index, UniqueConstraint
from sqlmodel import Field, SQLModel

from hub.db import UTCDateTime, now


class Kind(StrEnum):
    """What a safetensors file is; `unreadable` ones carry the reason in `problem`."""

    ADAPTER = "adapter"
    CHECKPOINT = "checkpoint"
    EMBEDDING = "embedding"
    OTHER = "other"
    UNREADABLE = "unreadable"


class Source(StrEnum):
    """Where a fact comes from; a person's word counts most."""

    TENSORS = "tensors"
    METADATA = "metadata"
    CARD = "card"
    PERSON = "person"


class Identification(SQLModel, table=True):
    """What `merge.identify` said of a blob, so that the next commit need not read it again.

    `config_sha256` is of the adapter_config.json beside the file, "" without one.
    """

    __tablename__ = "identification"

    sha256: str = Field(primary_key=True, foreign_key="blob.sha256", ondelete="CASCADE")
    config_sha256: str = Field(primary_key=True)
    document: str
    problem: str | None = None


class Card(SQLModel, table=True):
    """What README.md of a repo says; `commit_id` is the head this projection was made from."""

    __tablename__ = "card"

    repo_id: int = Field(primary_key=True, foreign_key="repo.id", ondelete="CASCADE")
    commit_id: str
    title: str | None = None
    summary: str | None = None
    license: str | None = None
    base_model: str | None = None
    problem: str | None = None


class Adapter(SQLModel, table=True):
    """One safetensors file at `main`; the one at position 0 speaks for its repo."""

    __tablename__ = "adapter"
    __table_args__ = (
        UniqueConstraint("repo_id", "path"),
        Index("ix_adapter_family_algorithm", "family", "algorithm"),
        # The text index names rows by id, so an id is never used again.
        {"sqlite_autoincrement": True},
    )

    id: int | None = Field(default=None, primary_key=True)
    repo_id: int = Field(foreign_key="repo.id", ondelete="CASCADE")
    path: str
    position: int
    sha256: str = Field(foreign_key="blob.sha256", index=True)
    config_sha256: str = ""
    size: int = Field(sa_type=BigInteger)
    title: str
    kind: str
    algorithm: str | None = None
    family: str | None = None
    dialect: str | None = None
    rank_min: int | None = None
    rank_max: int | None = None
    parameters: int = Field(default=0, sa_type=BigInteger)
    profile: str = ""  # 24 digits: how the file's numbers spread over its depth, for a pattern
    problem: str | None = None
    indexed_at: datetime = Field(default_factory=now, sa_type=UTCDateTime)


class Fact(SQLModel, table=True):
    """One thing known of an adapter, with where it comes from."""

    __tablename__ = "fact"

    adapter_id: int = Field(primary_key=True, foreign_key="adapter.id", ondelete="CASCADE")
    name: str = Field(primary_key=True)
    source: str = Field(primary_key=True)
    value: str
    confidence: float = 1.0


class HashAlias(SQLModel, table=True):
    """One of the names by which people look bytes up, in lower-case hexadecimal digits."""

    __tablename__ = "hash_alias"

    value: str = Field(primary_key=True)
    kind: str = Field(primary_key=True)
    sha256: str = Field(primary_key=True, foreign_key="blob.sha256", ondelete="CASCADE", index=True)


class Trigger(SQLModel, table=True):
    """A word that calls what an adapter learned, best evidence first."""

    __tablename__ = "trigger"

    adapter_id: int = Field(primary_key=True, foreign_key="adapter.id", ondelete="CASCADE")
    position: int = Field(primary_key=True)
    word: str
    source: str
    confidence: float


class Tag(SQLModel, table=True):
    __tablename__ = "tag"

    repo_id: int = Field(primary_key=True, foreign_key="repo.id", ondelete="CASCADE")
    name: str = Field(primary_key=True, index=True)


class Preview(SQLModel, table=True):
    """A picture of a repo, in the order to show; one that cannot be shown has a `problem`."""

    __tablename__ = "preview"

    repo_id: int = Field(primary_key=True, foreign_key="repo.id", ondelete="CASCADE")
    position: int = Field(primary_key=True)
    path: str
    sha256: str = Field(foreign_key="blob.sha256", index=True)
    width: int = 0
    height: int = 0
    prompt: str | None = None
    negative_prompt: str | None = None
    problem: str | None = None
