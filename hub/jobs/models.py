"""Rows of work and of lineage."""

from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import JSON, Column, Index, UniqueConstraint
from sqlmodel import Field, SQLModel

from hub.db import UTCDateTime


class JobKind(StrEnum):
    """What a job makes."""

    MERGE = "merge"
    BAKE = "bake"
    EXTRACT = "extract"
    RESIZE = "resize"


class JobState(StrEnum):
    """Where a job stands; the last three are terminal."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


TERMINAL = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})


class Job(SQLModel, table=True):
    """One wish and how far it got.

    `fence` counts claims: whoever holds an older one may change nothing any more.
    `sequence` counts changes, so that a reader can ask for what is new.
    `faults` are those of its `attempts` that ended because the store or the database was away.
    """

    __table_args__ = (
        UniqueConstraint("requester_id", "idempotency_key"),
        Index("ix_job_state_created", "state", "created_at"),
        Index("ix_job_requester_created", "requester_id", "created_at"),
    )

    id: str = Field(primary_key=True)
    kind: str
    state: str = JobState.QUEUED
    requester_id: int = Field(foreign_key="user.id")
    idempotency_key: str | None = None
    request: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
    request_digest: str = ""
    recipe_digest: str = Field(foreign_key="recipe.digest", index=True)
    resources: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))

    fence: int = 0
    attempts: int = 0
    faults: int = 0
    # Until when a queued job waits for what was away.
    not_before: datetime | None = Field(default=None, sa_type=UTCDateTime)
    lease_until: datetime | None = Field(default=None, sa_type=UTCDateTime)
    cancel_requested: bool = False
    sequence: int = 0

    progress_done: int = 0
    progress_total: int | None = None
    eta_s: float | None = None

    error: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON))
    result: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON))
    created_at: datetime = Field(sa_type=UTCDateTime)
    started_at: datetime | None = Field(default=None, sa_type=UTCDateTime)
    finished_at: datetime | None = Field(default=None, sa_type=UTCDateTime)


class Recipe(SQLModel, table=True):
    """A recipe with its inputs pinned; its digest is over its canonical JSON."""

    digest: str = Field(primary_key=True)
    canonical: str
    created_at: datetime = Field(sa_type=UTCDateTime)


class Relation(StrEnum):
    """How a parent entered a child."""

    BASE = "base"
    INPUT = "input"
    TUNED = "tuned"
    VECTORS = "vectors"


class Edge(SQLModel, table=True):
    """A file was made from another: both by digest, the parent's place as it was then."""

    __table_args__ = (Index("ix_edge_child", "child_repo_id", "child_commit", "child_path"),)

    id: int | None = Field(default=None, primary_key=True)
    child_repo_id: int = Field(foreign_key="repo.id", ondelete="CASCADE")
    child_commit: str
    child_path: str
    child_sha256: str = Field(index=True)
    parent_repo_id: int | None = Field(foreign_key="repo.id", ondelete="SET NULL", index=True)
    parent_commit: str
    parent_path: str
    parent_sha256: str = Field(index=True)
    relation: str
    strength: float | None = None
    recipe_digest: str = Field(foreign_key="recipe.digest")
