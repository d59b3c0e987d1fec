"""Xorbs in, plain blobs out.

A client may build a file from the xorbs that its user has sent, and from no others: whoever knows
only a hash has nothing.
The order is that of every upload: the blob is durable before its row, and the user's hold lets the
commit find it.
Whatever breaks off goes on where it was: xorbs and files that are here are not made again.
"""

from collections.abc import AsyncIterator, Iterator, Mapping
from datetime import timedelta
from hashlib import sha256
from typing import BinaryIO

from anyio import to_thread
from sqlalchemy import CursorResult, delete, update
from sqlmodel import Session, col, select

from hub.blobs.store import Sha256, Stored
from hub.context import Hub
from hub.db import insert_once, now
from hub.errors import BadUpload, TooLarge
from hub.failpoints import reach
from hub.limits import pending, quotas
from hub.repos import holds
from hub.repos.models import Blob, Hold
from hub.users import service as users
from hub.users.models import User
from hub.users.service import Viewer
from hub.xet.hashes import Tree, XetHash, chunk_hash, file_hash, range_hash, to_text
from hub.xet.models import XetCache, Xorb
from hub.xet.shards import ShardFile, read_shard
from hub.xet.xorbs import ChunkIndex, ChunkReader, XorbCheck

# Clients build new files from xorbs they sent up to three weeks ago, and forget them a week later.
KEEP_XORBS = timedelta(days=30)
# The protocol's smallest chunk is 8 KiB, but for the last of a file; half of it is enough to keep
# a small shard from costing hours.
_MIN_CHUNK_BYTES = 4096
_SPARE_CHUNKS = 16
_PIECE = 2**20
_ROWS = 500


def cache_name(session: Session, hub: Hub, user: User) -> str:
    """The part of the address under which a user's clients remember what they have sent.

    Clients keep one cache per address. It is another one for every user and every catalogue, and
    after `forget_caches`.
    """
    row = session.get(XetCache, user.id)
    what = f"{hub.store.id}/{user.id}/{user.created_at.isoformat()}/{row.generation if row else 0}"
    return sha256(what.encode()).hexdigest()[:16]


def forget_caches(session: Session, user_id: int) -> None:
    """From their next upload on this user's clients send everything again."""
    first = insert_once(session, XetCache).values(user_id=user_id, generation=1)
    again = {"generation": col(XetCache.generation) + 1}
    session.execute(first.on_conflict_do_update(index_elements=["user_id"], set_=again))


def let_go(hub: Hub, user: User) -> None:
    """Before an upload: xorbs that this user's clients have not used for a day make room for it,
    where all that the user sent and nobody committed is more than half of what it may be.

    Clients are told another address then, so that they miss nothing.
    """
    limit = hub.settings.pending_bytes
    if limit is None or user.id is None:
        return
    with hub.db.read() as session:
        if pending.count(session, user.id) <= limit // 2:
            return
    unused = col(Hold.expires_at) < now() + KEEP_XORBS - timedelta(days=1)
    xorbs = col(Hold.sha256).in_(select(Xorb.sha256))
    with hub.db.write() as session:
        mine = col(Hold.user_id) == user.id
        gone = session.execute(delete(Hold).where(mine, unused, xorbs))
        assert isinstance(gone, CursorResult)
        if gone.rowcount:
            forget_caches(session, user.id)


async def receive_xorb(
    hub: Hub, viewer: Viewer, name: XetHash, body: AsyncIterator[bytes], size: int | None
) -> bool:
    """Keep a xorb for this user; False if it was here before. BadUpload.

    A xorb that only others have sent is read and checked like a new one, and not kept twice.
    """
    here, is_theirs = await to_thread.run_sync(_present, hub, viewer, name)
    if is_theirs:
        async for _ in body:
            pass
    else:
        await to_thread.run_sync(pending.require_room, hub, viewer, {str(name): size or 0})
        check = XorbCheck()
        pieces = _checked(body, check, name)
        if here is None:
            stored = await hub.store.put_stream(pieces, size=size)
            reach("X1")
            await to_thread.run_sync(_record, hub, viewer, name, stored, check)
            return True
        async for _ in pieces:
            pass
    assert here is not None
    await to_thread.run_sync(_hold, hub, viewer, here)
    return False


async def _checked(
    body: AsyncIterator[bytes], check: XorbCheck, name: XetHash
) -> AsyncIterator[bytes]:
    """The same bytes; the last of them only if all of them are the xorb of that name."""
    # A request body comes in pieces of some 64 KiB, too small for a thread hop each.
    waiting: list[bytes] = []
    size = 0
    async for piece in body:
        if size >= _PIECE:
            whole = b"".join(waiting)
            await to_thread.run_sync(check.feed, whole)
            yield whole
            waiting, size = [], 0
        waiting.append(piece)
        size += len(piece)
    whole = b"".join(waiting)
    await to_thread.run_sync(check.feed, whole)
    await to_thread.run_sync(check.finish, name)
    yield whole


def _present(hub: Hub, viewer: Viewer, name: XetHash) -> tuple[Stored | None, bool]:
    """A blob with this xorb that the store has, and whether this user has sent it."""
    with hub.db.read() as session:
        query = (
            select(Blob, Hold.id)
            .join(Xorb, col(Xorb.sha256) == col(Blob.sha256))
            .join(
                Hold,
                (col(Hold.sha256) == col(Blob.sha256)) & (Hold.user_id == viewer.user_id),
                isouter=True,
            )
            .where(Xorb.hash == name)
        )
        found = session.exec(query).all()
    for blob, held in sorted(found, key=lambda row: row[1] is None):
        if hub.store.size(Sha256(blob.sha256)) == blob.size:
            return Stored(Sha256(blob.sha256), blob.git_oid, blob.size), held is not None
    return None, False


def _record(hub: Hub, viewer: Viewer, name: XetHash, stored: Stored, check: XorbCheck) -> None:
    with hub.db.write() as session:
        users.recheck(session, viewer)
        holds.hold(session, viewer, stored, KEEP_XORBS)
        if session.get(Xorb, stored.sha256) is None:
            session.add(Xorb(sha256=stored.sha256, hash=name, chunks=check.index.data))
        reach("X2")


def _hold(hub: Hub, viewer: Viewer, xorb: Stored) -> None:
    with hub.db.write() as session:
        users.recheck(session, viewer)
        holds.hold(session, viewer, xorb, KEEP_XORBS)


def register_shard(hub: Hub, viewer: Viewer, shard: BinaryIO, namespace_key: str) -> bool:
    """Rebuild every file of a shard as a blob held for this user; False if all were here.

    Nothing is built before the whole shard has been read, every term been found possible, and all
    files together as small as the namespace may keep: few bytes can stand for many.
    BadUpload, TooLarge, QuotaExceeded.
    """
    sizes: dict[bytes, int] = {}
    for file in read_shard(shard):
        if _known(hub, viewer, file) is None:
            sizes[file.hash] = _size(hub, file, _xorbs(hub, viewer, file))
    with hub.db.read() as session:
        total = sum(sizes.values())
        quotas.require_room(session, namespace_key, total, hub.settings.quota_bytes)
    pending.require_room(hub, viewer, {to_text(name): size for name, size in sizes.items()})
    is_new = False
    for file in read_shard(shard):
        known = _known(hub, viewer, file)
        if known is None:
            known = _rebuild(hub, viewer, file)
            reach("X4")
            is_new = True
        with hub.db.write() as session:
            users.recheck(session, viewer)
            holds.hold(session, viewer, known)
            reach("X5")
    return is_new


def _known(hub: Hub, viewer: Viewer, file: ShardFile) -> Stored | None:
    if file.sha256 is None:
        return None
    with hub.db.read() as session:
        return holds.known(session, viewer, file.sha256)


def _rebuild(hub: Hub, viewer: Viewer, file: ShardFile) -> Stored:
    xorbs = _xorbs(hub, viewer, file, keep=True)
    size = _size(hub, file, xorbs)
    reach("X3")
    try:
        return hub.store.put(_content(hub, file, xorbs), expected=file.sha256, size=size)
    except FileNotFoundError:
        raise _unknown(hub, viewer, "a xorb of the file") from None


def _content(hub: Hub, file: ShardFile, xorbs: Mapping[XetHash, Xorb]) -> Iterator[bytes]:
    """The file's bytes, in memory one piece of the store and one chunk at a time."""
    tree = Tree()
    for term in file.terms():
        xorb = xorbs[term.xorb]
        index = ChunkIndex(xorb.chunks)
        start, end = index.ends(term.start)[0], index.ends(term.end)[0]
        reader = ChunkReader()
        hashes = bytearray()
        for piece in hub.store.open(Sha256(xorb.sha256), start, end):
            for chunk in reader.feed(piece):
                digest = chunk_hash(chunk)
                hashes += digest
                tree.add(digest, len(chunk))
                yield chunk
        reader.finish()
        if term.proof is not None and range_hash(bytes(hashes)) != term.proof:
            raise BadUpload(
                f"chunks {term.start} to {term.end} of the xorb {term.xorb} are not those the"
                " shard means"
            )
    if file_hash(tree.root()) != file.hash:
        raise BadUpload(f"the chunks do not make the file {to_text(file.hash)}")


def _size(hub: Hub, file: ShardFile, xorbs: Mapping[XetHash, Xorb]) -> int:
    """Bytes of the file, if its terms are possible."""
    total = n_chunks = 0
    for term in file.terms():
        index = ChunkIndex(xorbs[term.xorb].chunks)
        if not term.start < term.end <= index.n_chunks:
            raise BadUpload(
                f"the xorb {term.xorb} has {index.n_chunks} chunks, not {term.start} to {term.end}"
            )
        if term.size != index.ends(term.end)[1] - index.ends(term.start)[1]:
            raise BadUpload(
                f"chunks {term.start} to {term.end} of the xorb {term.xorb} are not {term.size}"
                " bytes"
            )
        total += term.size
        n_chunks += term.end - term.start
    if total > hub.settings.max_upload_bytes:
        raise TooLarge(f"files have at most {hub.settings.max_upload_bytes} bytes")
    if n_chunks > total // _MIN_CHUNK_BYTES + _SPARE_CHUNKS:
        raise BadUpload(f"{n_chunks} chunks are too many for a file of {total} bytes")
    return total


def _xorbs(
    hub: Hub, viewer: Viewer, file: ShardFile, *, keep: bool = False
) -> Mapping[XetHash, Xorb]:
    """The xorbs that a file is made of; with `keep` their time begins anew. BadUpload."""
    names = sorted({term.xorb for term in file.terms()})
    found: dict[XetHash, Xorb] = {}
    until = now() + KEEP_XORBS
    for start in range(0, len(names), _ROWS):
        mine = (
            select(Xorb)
            .join(Hold, col(Hold.sha256) == col(Xorb.sha256))
            .where(col(Xorb.hash).in_(names[start : start + _ROWS]))
            .where(Hold.user_id == viewer.user_id)
            # Of two blobs with one xorb the older may be the one that was lost.
            .order_by(col(Xorb.created_at))
        )
        with hub.db.write() if keep else hub.db.read() as session:
            xorbs = session.exec(mine).all()
            if keep:
                held = col(Hold.sha256).in_([xorb.sha256 for xorb in xorbs])
                longer = update(Hold).where(held, col(Hold.user_id) == viewer.user_id)
                session.execute(longer.values(expires_at=until))
        found |= {XetHash(xorb.hash): xorb for xorb in xorbs}
    missing = next((name for name in names if name not in found), None)
    if missing is not None:
        raise _unknown(hub, viewer, f"the xorb {missing}")
    return found


def _unknown(hub: Hub, viewer: Viewer, what: str) -> BadUpload:
    """The refusal of what the client takes for sent; its next upload begins afresh."""
    assert viewer.user_id is not None
    with hub.db.write() as session:
        forget_caches(session, viewer.user_id)
    return BadUpload(f"this hub does not have {what} from you (any more): upload again")
