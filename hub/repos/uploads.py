"""The ledger of files that arrive in parts: who sends what, until when, and which parts are here.

Sessions are passed in. The bytes are `hub.blobs`' affair; a row here is the only thing that knows
their handle, so it outlives them and not the other way round.
"""

import uuid
from collections.abc import Sequence
from datetime import datetime, timedelta
from enum import StrEnum

from sqlalchemy import BigInteger
from sqlmodel import Field, Session, SQLModel, col, select

from hub.blobs.store import Sha256
from hub.db import UTCDateTime, now
from hub.errors import BadUpload, EntryNotFound
from hub.repos.models import Repo
from hub.users.service import Viewer

KEEP_FOR = timedelta(hours=48)


class UploadState(StrEnum):
    OPEN = "open"
    DONE = "done"


class Upload(SQLModel, table=True):
    """One file on its way in; `handle` is the store's name of its parts.

    `is_direct`: clients send the parts to the store itself, so that we do not see them come.
    """

    __tablename__ = "upload"

    id: str = Field(primary_key=True)
    user_id: int | None = Field(foreign_key="user.id", ondelete="SET NULL", index=True)
    repo_id: int | None = Field(foreign_key="repo.id", ondelete="SET NULL")
    sha256: str = Field(index=True)
    size: int = Field(sa_type=BigInteger)
    part_bytes: int = Field(sa_type=BigInteger)
    handle: str
    is_direct: bool
    state: str = UploadState.OPEN
    created_at: datetime = Field(default_factory=now, sa_type=UTCDateTime)
    expires_at: datetime = Field(sa_type=UTCDateTime, index=True)

    @property
    def n_parts(self) -> int:
        return -(-self.size // self.part_bytes)

    def span(self, number: int) -> tuple[int, int]:
        """Where a part begins in the file, and its size. BadUpload for a part it does not have."""
        if not 1 <= number <= self.n_parts:
            raise BadUpload(f"this upload has the parts 1 to {self.n_parts}", "number")
        offset = (number - 1) * self.part_bytes
        return offset, min(self.part_bytes, self.size - offset)


class UploadPart(SQLModel, table=True):
    """A part that is durable in the store."""

    __tablename__ = "upload_part"

    upload_id: str = Field(primary_key=True, foreign_key="upload.id", ondelete="CASCADE")
    number: int = Field(primary_key=True)
    tag: str


def resumable(
    session: Session, viewer: Viewer, repo: Repo, sha256: Sha256, size: int, part_bytes: int
) -> Upload | None:
    """The same user's unfinished upload of the same file, kept from now on for its full time."""
    query = select(Upload).where(
        Upload.user_id == viewer.user_id,
        Upload.repo_id == repo.id,
        Upload.sha256 == sha256,
        Upload.size == size,
        Upload.part_bytes == part_bytes,
        Upload.state == UploadState.OPEN,
        col(Upload.expires_at) > now(),
    )
    found = session.exec(query.order_by(col(Upload.created_at)).limit(1)).first()
    if found is not None:
        found.expires_at = now() + KEEP_FOR
    return found


def begin(
    session: Session,
    viewer: Viewer,
    repo: Repo,
    *,
    sha256: Sha256,
    size: int,
    part_bytes: int,
    handle: str,
    is_direct: bool,
) -> Upload:
    user = viewer.require_write()
    made = Upload(
        id=uuid.uuid4().hex,
        user_id=user.id,
        repo_id=repo.id,
        sha256=sha256,
        size=size,
        part_bytes=part_bytes,
        handle=handle,
        is_direct=is_direct,
        expires_at=now() + KEEP_FOR,
    )
    session.add(made)
    session.flush()
    return made


def get(session: Session, viewer: Viewer, upload_id: str) -> Upload:
    """EntryNotFound unless it is this viewer's and its time is not over."""
    found = session.get(Upload, upload_id)
    if found is None or found.user_id != viewer.user_id or found.expires_at <= now():
        raise EntryNotFound("this upload is over; begin it again")
    return found


def parts(session: Session, upload: Upload) -> list[UploadPart]:
    """Those that came through us, by number."""
    query = select(UploadPart).where(UploadPart.upload_id == upload.id)
    return list(session.exec(query.order_by(col(UploadPart.number))))


def note_part(session: Session, upload: Upload, number: int, tag: str) -> None:
    """Only after the store has it durably; a part that comes again takes the place of the first."""
    session.merge(UploadPart(upload_id=upload.id, number=number, tag=tag))


def tags(session: Session, upload: Upload, told: Sequence[tuple[int, str]]) -> list[str]:
    """The tag of every part by number, from what the client tells; BadUpload if one is missing."""
    by_number = dict(told)
    if len(told) != upload.n_parts or set(by_number) != set(range(1, upload.n_parts + 1)):
        raise BadUpload(f"an upload of {upload.n_parts} parts names each of them once", "parts")
    if not upload.is_direct:
        here = {part.number: part.tag for part in parts(session, upload)}
        for number, tag in sorted(by_number.items()):
            if here.get(number) != tag:
                raise BadUpload(f"part {number} did not arrive", "parts")
    return [tag for _, tag in sorted(by_number.items())]


def take_expired(session: Session) -> list[Upload]:
    """Out of the ledger: whose parts nobody will finish, and what is finished and forgotten."""
    query = select(Upload).where(col(Upload.expires_at) <= now())
    over = list(session.exec(query.with_for_update(skip_locked=True)))
    for upload in over:
        session.delete(upload)
    return over
