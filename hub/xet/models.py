"""Rows of xorbs, and of clients' caches that had to be given up."""

from datetime import datetime

from sqlmodel import Field, SQLModel

from hub.db import UTCDateTime, now


class Xorb(SQLModel, table=True):
    """A verified xorb, kept as a blob; `chunks` is its `ChunkIndex`.

    Who has sent it has a hold on the blob, and nobody else may build files from it.
    The row lives as long as the blob, and the blob as long as somebody holds it.
    Clients may pack the same chunks in different bytes, so one hash can have several blobs.
    """

    __tablename__ = "xorb"

    sha256: str = Field(primary_key=True, foreign_key="blob.sha256", ondelete="CASCADE")
    hash: str = Field(index=True)
    chunks: bytes
    created_at: datetime = Field(default_factory=now, sa_type=UTCDateTime)


class XetCache(SQLModel, table=True):
    """How often a user's clients were told to forget which xorbs they have sent."""

    __tablename__ = "xet_cache"

    user_id: int = Field(primary_key=True, foreign_key="user.id", ondelete="CASCADE")
    generation: int
