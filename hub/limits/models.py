"""Rows of what a namespace keeps and may keep."""

from sqlalchemy import BigInteger
from sqlmodel import Field, SQLModel

UNLIMITED = -1


class Quota(SQLModel, table=True):
    """Bytes of one user or organisation.

    `used_bytes` is never less than what the namespace's commits refer to; deletions lower it when
    it is counted anew. `limit_bytes` is UNLIMITED, or None for the default of the settings.
    """

    __tablename__ = "quota"

    key: str = Field(primary_key=True, foreign_key="namespace.key")
    used_bytes: int = Field(default=0, sa_type=BigInteger)
    limit_bytes: int | None = Field(default=None, sa_type=BigInteger)
