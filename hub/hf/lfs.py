"""Git LFS: which objects to send, the bytes whole (basic) or in parts, and whether they came."""

from collections.abc import Sequence
from typing import Any

from anyio import to_thread
from fastapi import Request
from fastapi.responses import JSONResponse, RedirectResponse, Response

from hub.blobs.store import Sha256
from hub.context import Hub
from hub.deps import HubDep, Open, ReadSession, Signed, ViewerDep, WriterDep, public_url
from hub.errors import BadRequest, EntryNotFound, Unauthorized
from hub.hf import bodies
from hub.hf import lfs_parts as parts
from hub.hf.content import BlobResponse
from hub.hf.deps import RepoDep
from hub.hf.lfs_parts import LFS, LFS_OF_TYPE
from hub.hf.routing import UNLIMITED, hf_router
from hub.limits import pending, quotas
from hub.repos import holds, permissions
from hub.users.service import Viewer

MEDIA_TYPE = "application/vnd.git-lfs+json"
# Long enough for the largest file on a slow line to begin; the upload itself may take longer.
LINK_S = 6 * 3600
PURPOSE = "lfs-upload"

router = hf_router()


@router.post(LFS + "/batch", dependencies=[Open])
@router.post(LFS_OF_TYPE + "/batch", dependencies=[Open])
def batch(
    request: Request,
    hub: HubDep,
    session: ReadSession,
    viewer: ViewerDep,
    repo: RepoDep,
    body: bodies.LFSBatch,
) -> Response:
    """For each object where to send it or get it; none where it is here and the viewer's to use."""
    if body.hash_algo != "sha256":
        raise BadRequest("LFS objects are named by sha256 here")
    upload = body.operation == "upload"
    if upload:
        # Bytes for a pull request too, which whoever sees the repo may open; the commit says which.
        permissions.require_participant(session, viewer, repo)
    base = (
        f"{public_url(request)}{request.scope['raw_path'].decode('ascii').removesuffix('/batch')}"
    )
    here = set()
    for item in body.objects:
        stored = holds.known(session, viewer, Sha256(item.oid))
        if stored is not None and stored.size == item.size:
            here.add(item.oid)
    if upload and here:
        with hub.db.write() as writing:
            here = holds.hold_known(writing, viewer, here)
    # One transfer for the whole batch, as git-lfs expects.
    in_parts = upload and "multipart" in body.transfers and _is_large(hub, body.objects)
    if upload:
        size = sum(item.size for item in body.objects if item.oid not in here)
        quotas.require_room(session, repo.namespace_key, size, hub.settings.quota_bytes)
        new = {item.oid: item.size for item in body.objects if item.oid not in here}
        pending.require_room(hub, viewer, new)
    objects = []
    for item in body.objects:
        has = item.oid in here
        if not upload:
            objects.append(_download(base, item, has))
        elif has or item.size > hub.settings.max_upload_bytes:
            objects.append(_no_upload(hub, item))
        elif in_parts and item.size > 0:
            objects.append(parts.actions(hub, viewer, repo, base, item))
        else:
            objects.append(_upload(hub, viewer, base, item))
    answer = {"transfer": "multipart" if in_parts else "basic", "objects": objects}
    return JSONResponse(answer, media_type=MEDIA_TYPE)


def _is_large(hub: Hub, items: Sequence[bodies.LFSObject]) -> bool:
    return any(item.size > hub.settings.lfs_part_bytes for item in items)


def _no_upload(hub: Hub, item: bodies.LFSObject) -> dict[str, Any]:
    answer: dict[str, Any] = {"oid": item.oid, "size": item.size, "authenticated": True}
    limit = hub.settings.max_upload_bytes
    if item.size > limit:
        answer["error"] = {"code": 413, "message": f"files have at most {limit} bytes"}
    return answer


def _upload(hub: Hub, viewer: Viewer, base: str, item: bodies.LFSObject) -> dict[str, Any]:
    # Clients send no Authorization with the bytes, so the address itself says who may send what.
    link = hub.signer.sign(PURPOSE, [viewer.token_id, item.oid, item.size])
    actions = {
        "upload": {"href": f"{base}/{item.oid}?signature={link}"},
        "verify": {"href": f"{base}/{item.oid}/verify"},
    }
    return {"oid": item.oid, "size": item.size, "authenticated": True, "actions": actions}


def _download(base: str, item: bodies.LFSObject, has: bool) -> dict[str, Any]:
    answer: dict[str, Any] = {"oid": item.oid, "size": item.size}
    if not has:
        return answer | {"error": {"code": 404, "message": "there is no such object"}}
    return answer | {"actions": {"download": {"href": f"{base}/{item.oid}"}}}


@router.put(LFS + "/{oid}", dependencies=[Signed], max_body_size=UNLIMITED)
@router.put(LFS_OF_TYPE + "/{oid}", dependencies=[Signed], max_body_size=UNLIMITED)
async def upload(request: Request, hub: HubDep, oid: str, signature: str) -> Response:
    """The bytes of one object; they are kept for the user the address was made for."""
    signed = hub.signer.unsign_dated(PURPOSE, signature, LINK_S)
    if signed is None or signed[0][1] != oid:
        raise Unauthorized("this upload address is not valid any more")
    (token_id, _, size), signed_at = signed
    viewer = await to_thread.run_sync(parts.viewer_of, hub, token_id, signed_at)
    announced = request.headers.get("Content-Length")
    if announced is not None and announced != str(size):
        raise BadRequest(f"{announced} bytes are announced, the object has {size}")
    # Again: many addresses may have been given before any of them was used.
    await to_thread.run_sync(pending.require_room, hub, viewer, {oid: size})
    stored = await hub.store.put_stream(request.stream(), expected=Sha256(oid), size=size)
    await to_thread.run_sync(parts.hold, hub, viewer, stored)
    return Response()


@router.post(LFS + "/{oid}/verify")
@router.post(LFS_OF_TYPE + "/{oid}/verify")
def verify(
    session: ReadSession, viewer: WriterDep, repo: RepoDep, oid: str, body: bodies.LFSObject
) -> dict[str, Any]:
    """200 if the object is here, whole, and the viewer's to commit."""
    stored = holds.known(session, viewer, Sha256(body.oid))
    if body.oid != oid or stored is None or stored.size != body.size:
        raise EntryNotFound(f"the object {oid[:64]} did not arrive")
    return {}


@router.get(LFS + "/{oid}")
@router.get(LFS_OF_TYPE + "/{oid}")
def download(
    hub: HubDep, session: ReadSession, viewer: ViewerDep, repo: RepoDep, oid: str
) -> Response:
    """An object by its digest, for those who can read it in some repo."""
    stored = holds.known(session, viewer, Sha256(oid))
    if stored is None:
        raise EntryNotFound(f"there is no object {oid[:64]}")
    headers = {"Cache-Control": "private, no-store"}
    if (address := hub.store.address(stored.sha256, LINK_S, {})) is not None:
        return RedirectResponse(address, 302, headers)
    headers["Content-Type"] = "application/octet-stream"
    return BlobResponse(hub.store, stored.sha256, 0, stored.size, headers)
