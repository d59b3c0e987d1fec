"""Downloads: HEAD from the catalogue alone, GET with one range, straight from the blob.

Large files go by an address of the store itself, where it has one that clients can reach.
"""

import mimetypes
from functools import partial
from urllib.parse import quote

from fastapi import Request, Response

from hub.blobs.store import BlobStore, Sha256
from hub.deps import HubDep, ReadSession, ViewerDep
from hub.hf.content import BlobResponse
from hub.hf.deps import RepoDep
from hub.hf.ranges import RangeNotSatisfiable, parse_range
from hub.hf.routing import hf_router
from hub.repos import commits, permissions, refs
from hub.repos.models import Commit, CommitEntry, Repo

# One download of each of these is one download of the repo.
WEIGHTS = (".safetensors", ".bin", ".pt", ".ckpt", ".gguf", ".onnx")
# Safe to show in a page; everything else, SVG and HTML before all, is only bytes to us.
SHOWN = {"image/png", "image/jpeg", "image/webp", "image/gif"}

# Below it another request costs more than it saves.
REDIRECT_BYTES = 2**20
# Clients that continue a broken download ask the same address again.
ADDRESS_S = 6 * 3600

router = hf_router()


@router.api_route("/{namespace}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
@router.api_route(
    "/{kind:repos}/{namespace}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"]
)
def resolve(
    request: Request,
    hub: HubDep,
    session: ReadSession,
    viewer: ViewerDep,
    repo: RepoDep,
    revision: str,
    path: str,
) -> Response:
    """One file of a revision; X-Repo-Commit says what the revision meant."""
    commit = refs.resolve(session, repo, revision)
    if repo.gated is not None:
        permissions.require_files(session, viewer, repo)
    entry = commits.entry(session, commit, path)
    headers = _headers(repo, commit, entry)
    if request.headers.get("If-None-Match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    if request.method == "HEAD":
        return Response(headers=headers | {"Content-Length": str(entry.size)})
    try:
        asked = parse_range(_range(request, headers["ETag"]), entry.size)
    except RangeNotSatisfiable as error:
        headers |= {"Content-Range": f"bytes */{error.size}", "X-Error-Message": str(error)}
        return Response(status_code=416, headers=headers)
    start, end = asked or (0, entry.size)
    if (address := _address(hub.store, entry, headers)) is not None:
        if asked is None and path.endswith(WEIGHTS):
            hub.downloads.count(repo)
        headers |= {"Location": address, "Cache-Control": "private, no-store"}
        return Response(status_code=302, headers=headers)
    if asked is not None:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{entry.size}"
    is_download = start == 0 and end == entry.size and path.endswith(WEIGHTS)
    return BlobResponse(
        hub.store,
        Sha256(entry.sha256),
        start,
        end,
        headers,
        status=206 if asked is not None else 200,
        sent=partial(hub.downloads.count, repo) if is_download else None,
    )


def _headers(repo: Repo, commit: Commit, entry: CommitEntry) -> dict[str, str]:
    # The digest for LFS files, the git id for regular ones, as huggingface.co does: clients name
    # files in their cache by it, and check a download against it if it has 64 digits.
    etag = f'"{entry.sha256 if entry.lfs else entry.git_oid}"'
    name = quote(entry.path.rpartition("/")[2], safe="")
    media, _ = mimetypes.guess_type(entry.path)
    return {
        "X-Repo-Commit": commit.id,
        "X-Linked-Size": str(entry.size),
        "X-Linked-ETag": etag,
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "Content-Type": media if media in SHOWN else "application/octet-stream",
        "Content-Disposition": f"attachment; filename*=UTF-8''{name}",
        "Cache-Control": "private, no-store" if repo.private or repo.gated else "no-cache",
    }


def _address(store: BlobStore, entry: CommitEntry, headers: dict[str, str]) -> str | None:
    # A page shows pictures only from its own origin.
    if not entry.lfs or entry.size < REDIRECT_BYTES or headers["Content-Type"] in SHOWN:
        return None
    said = {name: headers[name] for name in ("Content-Type", "Content-Disposition")}
    return store.address(Sha256(entry.sha256), ADDRESS_S, said)


def _range(request: Request, etag: str) -> str | None:
    """The Range header, unless If-Range says it was meant for other bytes."""
    if request.headers.get("If-Range", etag) != etag:
        return None
    return request.headers.get("Range")
