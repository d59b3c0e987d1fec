"""Git LFS objects in parts, as huggingface_hub and its git-lfs agent send them.

The batch gives an address for every part and one to finish; all of them carry their signature,
because clients send no Authorization there. Parts that are here stay for two days, through
restarts; asking for the same object again gives addresses of the same upload.
"""

from datetime import datetime
from typing import Any

from anyio import to_thread
from fastapi import Request
from fastapi.responses import Response
from sqlmodel import Session

from hub.blobs.store import Sha256, Stored
from hub.context import Hub
from hub.deps import HubDep, Signed
from hub.errors import BadRequest, BadUpload, DigestMismatch, EntryNotFound, Unauthorized
from hub.hf import bodies
from hub.hf.routing import UNLIMITED, hf_router
from hub.repos import holds, uploads
from hub.repos.models import Repo
from hub.repos.uploads import Upload, UploadState
from hub.users import service as users
from hub.users.service import Viewer

LFS = "/{namespace}/{name}.git/info/lfs/objects"
LFS_OF_TYPE = "/{kind:repos}" + LFS

PURPOSE = "lfs-parts"
LINK_S = 24 * 3600
MOST_PARTS = 1000

router = hf_router()


def actions(
    hub: Hub, viewer: Viewer, repo: Repo, base: str, item: bodies.LFSObject
) -> dict[str, Any]:
    """What the batch answers for one object: `chunk_size` and the parts' addresses by number."""
    upload = _begin(hub, viewer, repo, item)
    signature = hub.signer.sign(PURPOSE, [viewer.token_id, upload.id])
    here = f"{base}/{item.oid}/parts"
    header = {"chunk_size": str(upload.part_bytes)}
    for number in range(1, upload.n_parts + 1):
        _, size = upload.span(number)
        address = f"{here}/{number}?signature={signature}"
        if upload.is_direct:
            address = hub.store.parts.address(upload.handle, number, size, LINK_S) or address
        header[f"{number:05}"] = address
    action = {"href": f"{here}?signature={signature}", "header": header, "expires_in": LINK_S}
    verify = {"href": f"{base}/{item.oid}/verify"}
    answer: dict[str, Any] = {"oid": item.oid, "size": item.size, "authenticated": True}
    return answer | {"actions": {"upload": action, "verify": verify}}


@router.put(LFS + "/{oid}/parts/{number}", dependencies=[Signed], max_body_size=UNLIMITED)
@router.put(LFS_OF_TYPE + "/{oid}/parts/{number}", dependencies=[Signed], max_body_size=UNLIMITED)
async def put_part(
    request: Request, hub: HubDep, oid: str, number: int, signature: str
) -> Response:
    """The bytes of one part; its ETag is for the request that finishes."""
    _, upload = await to_thread.run_sync(_open, hub, oid, signature)
    if upload.state == UploadState.DONE:
        raise EntryNotFound("this upload is finished")
    offset, size = upload.span(number)
    announced = request.headers.get("Content-Length")
    if announced is not None and announced != str(size):
        raise BadRequest(f"{announced} bytes are announced, part {number} has {size}")
    tag = await hub.store.parts.put(upload.handle, number, offset, size, request.stream())
    await to_thread.run_sync(_note, hub, upload, number, tag)
    return Response(headers={"ETag": tag})


@router.get(LFS + "/{oid}/parts")
@router.get(LFS_OF_TYPE + "/{oid}/parts")
def show_parts(hub: HubDep, oid: str, signature: str) -> dict[str, Any]:
    """Which parts are here, for whoever goes on with an upload; not those the store got itself."""
    _, upload = _open(hub, oid, signature)
    with hub.db.read() as session:
        here = uploads.parts(session, upload)
    return {
        "oid": upload.sha256,
        "size": upload.size,
        "chunk_size": upload.part_bytes,
        "state": upload.state,
        "parts": [{"partNumber": part.number, "etag": part.tag} for part in here],
        "expires_at": upload.expires_at.isoformat(),
    }


@router.post(LFS + "/{oid}/parts", dependencies=[Signed])
@router.post(LFS_OF_TYPE + "/{oid}/parts", dependencies=[Signed])
def finish(hub: HubDep, oid: str, signature: str, body: bodies.LFSParts) -> dict[str, Any]:
    """All parts become the object; asking again, after a lost answer, is harmless."""
    viewer, upload = _open(hub, oid, signature)
    if body.oid != oid:
        raise BadRequest(f"the body is about {body.oid}, the address about {oid}", "oid")
    if upload.state == UploadState.DONE:
        return {}
    with hub.db.read() as session:
        tags = uploads.tags(session, upload, [(part.partNumber, part.etag) for part in body.parts])
    try:
        stored = hub.store.parts.finish(upload.handle, tags, Sha256(oid), upload.size)
    except (BadUpload, DigestMismatch):
        with hub.db.write() as session:
            session.delete(session.get_one(Upload, upload.id))
        raise
    except FileNotFoundError as error:
        # Another request may have been faster; what is in the store proves nothing of who sent it.
        if _open(hub, oid, signature)[1].state == UploadState.DONE:
            return {}
        raise EntryNotFound("the parts of this upload are gone; begin it again") from error
    with hub.db.write() as session:
        hold_in(session, viewer, stored)
        session.get_one(Upload, upload.id).state = UploadState.DONE
    return {}


def viewer_of(hub: Hub, token_id: int, signed_at: datetime) -> Viewer:
    with hub.db.read() as session:
        return users.viewer_of_signed(session, token_id, signed_at)


def hold(hub: Hub, viewer: Viewer, stored: Stored) -> None:
    """The user has had these bytes and may commit them."""
    with hub.db.write() as session:
        hold_in(session, viewer, stored)


def hold_in(session: Session, viewer: Viewer, stored: Stored) -> None:
    users.recheck(session, viewer)
    holds.hold(session, viewer, stored)


def drop_expired(hub: Hub) -> int:
    """Forget uploads whose time is over, and drop their parts; how many there were.

    Out of the ledger first: bytes that nobody knows are found by the store's own sweep.
    """
    with hub.db.write() as session:
        over = uploads.take_expired(session)
    for upload in over:
        if upload.state == UploadState.OPEN:
            hub.store.parts.drop(upload.handle)
    return len(over)


def _begin(hub: Hub, viewer: Viewer, repo: Repo, item: bodies.LFSObject) -> Upload:
    part_bytes = max(hub.settings.lfs_part_bytes, -(-item.size // MOST_PARTS))
    sha256 = Sha256(item.oid)
    with hub.db.write() as session:
        found = uploads.resumable(session, viewer, repo, sha256, item.size, part_bytes)
    if found is not None:
        return found
    # Before its row: a store that is away must not keep the catalogue's writer waiting.
    handle = hub.store.parts.begin()
    is_direct = hub.store.parts.address(handle, 1, min(part_bytes, item.size), LINK_S) is not None
    with hub.db.write() as session:
        return uploads.begin(
            session,
            viewer,
            repo,
            sha256=sha256,
            size=item.size,
            part_bytes=part_bytes,
            handle=handle,
            is_direct=is_direct,
        )


def _open(hub: Hub, oid: str, signature: str) -> tuple[Viewer, Upload]:
    """Who sends, and what: both from the signature, and as they are now."""
    signed = hub.signer.unsign_dated(PURPOSE, signature, LINK_S)
    if signed is None:
        raise Unauthorized("this upload address is not valid any more")
    (token_id, upload_id), signed_at = signed
    with hub.db.read() as session:
        viewer = users.viewer_of_signed(session, token_id, signed_at)
        upload = uploads.get(session, viewer, upload_id)
    if upload.sha256 != oid:
        raise Unauthorized("this upload address is not valid any more")
    return viewer, upload


def _note(hub: Hub, upload: Upload, number: int, tag: str) -> None:
    with hub.db.write() as session:
        uploads.note_part(session, upload, number, tag)
