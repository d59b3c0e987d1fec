"""Bytes on their way into a commit: rows of blobs, and the holds that keep them until then."""

from collections.abc import Collection, Sequence
from datetime import timedelta

from sqlalchemy import case
from sqlmodel import Session, col, select

from hub.blobs.store import BlobStore, Sha256, Stored
from hub.db import insert_once, now
from hub.errors import Busy
from hub.repos import permissions
from hub.repos.models import Blob, BlobState, Commit, CommitEntry, Hold, Repo
from hub.users.service import Viewer

STORE = "store"  # of `session.info` in a writing session
HOLD_FOR = timedelta(hours=48)
_AT_ONCE = 500  # rows of one statement: databases limit its parameters


def hold(session: Session, viewer: Viewer, stored: Stored, keep: timedelta = HOLD_FOR) -> None:
    """Remember that this user has sent these bytes; without a commit they are kept for `keep`.

    Busy if the same bytes were being collected at this moment: they have to be sent again.
    """
    user = viewer.require_write()
    insert_blobs(session, [stored])
    revive(session, [stored.sha256])
    assert user.id is not None
    _hold(session, user.id, stored.sha256, keep)


def keep(session: Session, stored: Stored) -> None:
    """The row of bytes that something other than a commit or a hold refers to from now on."""
    insert_blobs(session, [stored])
    revive(session, [stored.sha256])


def hold_known(session: Session, viewer: Viewer, digests: Collection[str]) -> set[str]:
    """Keep for 48 hours what a client is told it need not send; those of `digests` still here.

    `known` says what the viewer may be told of; this makes it true until the commit.
    """
    user = viewer.require_write()
    assert user.id is not None
    rows = select(Blob).where(col(Blob.sha256).in_(digests)).order_by(col(Blob.sha256))
    kept = set()
    for blob in session.exec(rows.with_for_update()):
        if blob.state != BlobState.DELETING:
            blob.state, blob.condemned_at = BlobState.PRESENT, None
            session.add(blob)
            _hold(session, user.id, blob.sha256, HOLD_FOR)
            kept.add(blob.sha256)
    return kept


def _hold(session: Session, user_id: int, sha256: str, keep: timedelta) -> None:
    row = {"sha256": sha256, "user_id": user_id, "expires_at": now() + keep}
    new = insert_once(session, Hold).values(row)
    later = case(
        (col(Hold.expires_at) > new.excluded.expires_at, Hold.expires_at),
        else_=new.excluded.expires_at,
    )
    session.execute(
        new.on_conflict_do_update(index_elements=["sha256", "user_id"], set_={"expires_at": later})
    )


def known(session: Session, viewer: Viewer, sha256: Sha256) -> Stored | None:
    """The blob if the viewer has sent it or can read it in some repo; else None.

    Knowing a digest is no right to the bytes, so everybody else has to send them again.
    """
    blob = session.get(Blob, sha256)
    if blob is None or blob.state == BlobState.DELETING:
        return None
    stored = Stored(sha256, blob.git_oid, blob.size)
    if viewer.user_id is not None:
        query = select(Hold.id).where(Hold.sha256 == sha256, Hold.user_id == viewer.user_id)
        if session.exec(query).first() is not None:
            return stored
    readable = (
        select(Repo.id)
        .join(Commit, col(Commit.repo_id) == col(Repo.id))
        .join(CommitEntry, col(CommitEntry.commit_id) == col(Commit.id))
        .where(CommitEntry.sha256 == sha256, permissions.files_visible_to(session, viewer))
    )
    return stored if session.exec(readable.limit(1)).first() is not None else None


def insert_blobs(session: Session, stored: Sequence[Stored]) -> None:
    """Rows of bytes that have arrived; another writer may add the same ones at this moment."""
    fresh = Blob(sha256="", size=0).model_dump()
    rows = [
        fresh | {"sha256": item.sha256, "size": item.size, "git_oid": item.git_oid}
        for _, item in sorted({item.sha256: item for item in stored}.items())
    ]
    for start in range(0, len(rows), _AT_ONCE):
        new = insert_once(session, Blob).values(rows[start : start + _AT_ONCE])
        # A row that is there is written too, so that nobody removes it before this is over.
        session.execute(
            new.on_conflict_do_update(index_elements=["sha256"], set_={"size": new.excluded.size})
        )


def revive(session: Session, digests: Collection[str]) -> None:
    """Take blobs that something refers to from now on back from the collection; Busy.

    The row is locked before its state is read, and the collection removes bytes only while it has
    that lock, so what the store says here stays true until this transaction ends.
    """
    wanted = sorted(digests)
    for start in range(0, len(wanted), _AT_ONCE):
        query = (
            select(Blob)
            .where(col(Blob.sha256).in_(wanted[start : start + _AT_ONCE]))
            .where(col(Blob.state) != BlobState.PRESENT)
            .order_by(col(Blob.sha256))
            .with_for_update()
            .execution_options(populate_existing=True)
        )
        for blob in session.exec(query):
            if blob.state == BlobState.DELETING:
                store: BlobStore = session.info[STORE]
                if store.size(Sha256(blob.sha256)) != blob.size:
                    raise Busy(f"{blob.sha256} was just collected; send the file again")
            blob.state, blob.condemned_at = BlobState.PRESENT, None
            session.add(blob)
    session.flush()
