"""Rows of webhooks and of what is to be, or was, delivered to them."""

from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import JSON, Column, Index
from sqlmodel import Field, SQLModel

from hub.db import UTCDateTime, now


class Domain(StrEnum):
    """What a webhook hears of: repos and their commits, or discussions and pull requests."""

    REPO = "repo"
    DISCUSSION = "discussion"


class Watched(StrEnum):
    """What the name of a watched item is: of a user or organisation, or of one repo."""

    USER = "user"
    ORG = "org"
    MODEL = "model"
    DATASET = "dataset"
    SPACE = "space"


class DeliveryState(StrEnum):
    WAITING = "waiting"
    DELIVERED = "delivered"
    DEAD = "dead"


class Webhook(SQLModel, table=True):
    """An address, what it hears of, and how its last deliveries went.

    `key` is its id outside; `watched` a list of `{"type", "name"}`; `domains` of Domain.
    """

    __tablename__ = "webhook"

    id: int | None = Field(default=None, primary_key=True)
    key: str = Field(unique=True)
    user_id: int = Field(foreign_key="user.id", ondelete="CASCADE", index=True)
    url: str
    secret: str | None = None
    watched: list[dict[str, str]] = Field(sa_column=Column(JSON, nullable=False))
    domains: list[str] = Field(sa_column=Column(JSON, nullable=False))
    disabled: bool = False
    # Why the hub itself disabled it.
    reason: str | None = None
    # It hears of later events only.
    after_event: int = 0
    # Failures since the last success, and since when.
    failures: int = 0
    failing_since: datetime | None = Field(default=None, sa_type=UTCDateTime)
    # Nothing is sent before: another delivery is on its way, or the address rests.
    not_before: datetime = Field(default_factory=now, sa_type=UTCDateTime)
    created_at: datetime = Field(default_factory=now, sa_type=UTCDateTime)


class Delivery(SQLModel, table=True):
    """One event for one webhook; `id` tells a receiver which it has had already."""

    __tablename__ = "delivery"
    __table_args__ = (
        Index("ix_delivery_webhook_id_state_repo_id", "webhook_id", "state", "repo_id"),
        Index("ix_delivery_state_due_at", "state", "due_at"),
        {"sqlite_autoincrement": True},
    )

    id: int | None = Field(default=None, primary_key=True)
    webhook_id: int = Field(foreign_key="webhook.id", ondelete="CASCADE")
    # The event's own kind and words, so that a repetition says the same.
    kind: str
    repo_id: int
    document: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
    state: str = DeliveryState.WAITING
    attempts: int = 0
    due_at: datetime = Field(default_factory=now, sa_type=UTCDateTime)
    # The last attempt's answer; None without one.
    status: int | None = None
    error: str | None = None
    created_at: datetime = Field(default_factory=now, sa_type=UTCDateTime)
    finished_at: datetime | None = Field(default=None, sa_type=UTCDateTime, index=True)
