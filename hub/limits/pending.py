"""How many bytes a user may have sent that no commit refers to, and the refusal of more.

What counts are blobs that the user has a hold on, once each, and files of which parts arrive, whole.
Chunks of Xet are among them for as long as clients may build new files from them.
What arrives at this moment is not: requests at once are limited, and so are the bytes of each.
"""

from collections.abc import Mapping

from sqlalchemy import func
from sqlmodel import Session, col, select

from hub.context import Hub
from hub.db import now
from hub.errors import QuotaExceeded
from hub.repos.models import Blob, CommitEntry, Hold
from hub.repos.uploads import Upload, UploadState
from hub.users.service import Viewer


def count(session: Session, user_id: int) -> int:
    """Bytes that this user has sent and nobody has committed."""
    committed = select(CommitEntry.sha256).where(CommitEntry.sha256 == Hold.sha256).exists()
    held = (
        select(func.coalesce(func.sum(Blob.size), 0))
        .join(Hold, col(Hold.sha256) == col(Blob.sha256))
        .where(Hold.user_id == user_id, col(Hold.expires_at) > now(), ~committed)
    )
    arriving = select(func.coalesce(func.sum(Upload.size), 0)).where(
        Upload.user_id == user_id,
        Upload.state == UploadState.OPEN,
        col(Upload.expires_at) > now(),
    )
    return int(session.exec(held).one()) + int(session.exec(arriving).one())


def require_room(hub: Hub, viewer: Viewer, objects: Mapping[str, int]) -> None:
    """QuotaExceeded where these (digest to bytes) would be more than the user may have sent.

    What of these the user has sent, or begun to send in parts, counts already.
    """
    limit, user = hub.settings.pending_bytes, viewer.require_write()
    if limit is None:
        return
    assert user.id is not None
    held = select(Hold.sha256).where(Hold.user_id == user.id, col(Hold.expires_at) > now())
    begun = select(Upload.sha256).where(
        Upload.user_id == user.id,
        Upload.state == UploadState.OPEN,
        col(Upload.expires_at) > now(),
    )
    with hub.db.read() as session:
        sent = count(session, user.id)
        theirs = {
            *session.exec(held.where(col(Hold.sha256).in_(objects))),
            *session.exec(begun.where(col(Upload.sha256).in_(objects))),
        }
    would_be = sent + sum(size for sha256, size in objects.items() if sha256 not in theirs)
    if would_be > limit:
        raise QuotaExceeded(
            f"{user.name} has sent {sent:,} bytes that no commit refers to and would have sent"
            f" {would_be:,}, where {limit:,} are allowed: commit them, or wait until the hub lets"
            " them go, two days after they came"
        )
