"""Downloads: HEAD from the catalogue alone, GET with one range, straight from the blob.

Large files go by an address of the store itself, where it has one that clients can reach.
"""

import errno
import mimetypes
import os
import sys
from collections.abc import AsyncIterator
from io import FileIO
from pathlib import Path
from urllib.parse import quote

from anyio import to_thread
from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from hub.blobs.store import BlobStore, Sha256
from hub.deps import HubDep, ReadSession, ViewerDep
from hub.hf.deps import RepoDep
from hub.hf.ranges import RangeNotSatisfiable, parse_range
from hub.hf.routing import hf_router
from hub.repos import service as repos
from hub.repos.downloads import Downloads
from hub.repos.models import Commit, CommitEntry, Repo

# One download of each of these is one download of the repo.
WEIGHTS = (".safetensors", ".bin", ".pt", ".ckpt", ".gguf", ".onnx")
# Safe to show in a page; everything else, SVG and HTML before all, is only bytes to us.
SHOWN = {"image/png", "image/jpeg", "image/webp", "image/gif"}

PIECE = 2**18
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
    commit = repos.resolve(session, repo, revision)
    if repo.gated is not None:
        repos.require_files(session, viewer, repo)
    entry = repos.entry(session, commit, path)
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
    headers["Content-Length"] = str(end - start)
    if asked is not None:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{entry.size}"
    content = read_blob(hub.store, Sha256(entry.sha256), start, end)
    if start == 0 and end == entry.size and path.endswith(WEIGHTS):
        content = _counted(content, hub.downloads, repo)
    return StreamingResponse(content, 206 if asked is not None else 200, headers)


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


async def _counted(
    content: AsyncIterator[bytes | memoryview], downloads: Downloads, repo: Repo
) -> AsyncIterator[bytes | memoryview]:
    """Counted after the last byte: a download that broke is none."""
    async for piece in content:
        yield piece
    downloads.count(repo)


async def read_blob(
    store: BlobStore, sha256: Sha256, start: int, end: int
) -> AsyncIterator[bytes | memoryview]:
    """The bytes [start, end) of a blob, for a response."""
    path = await to_thread.run_sync(store.path, sha256)
    if path is not None:
        async for piece in _read_file(path, start, end):
            yield piece
        return
    chunks = await to_thread.run_sync(store.open, sha256, start, end)
    while chunk := await to_thread.run_sync(next, chunks, b""):
        yield chunk


async def _read_file(path: Path, start: int, end: int) -> AsyncIterator[memoryview]:
    """Pieces that fit the processor's cache, read without a thread where the page cache has them.

    A hop to a thread takes longer than reading a piece from memory; reading from the disk here
    would stop every other request.
    """
    file = await to_thread.run_sync(FileIO, path)
    try:
        while start < end:
            piece = memoryview(bytearray(min(PIECE, end - start)))
            count = _read_cached(file.fileno(), piece, start)
            if count is None:
                count = await to_thread.run_sync(_read_at, file, piece, start)
            if not count:
                raise OSError(errno.EIO, f"{path.name} is shorter than it was")
            start += count
            yield piece[:count]
    finally:
        file.close()


def _read_at(file: FileIO, piece: memoryview, offset: int) -> int:
    file.seek(offset)
    return file.readinto(piece)


def _read_cached(descriptor: int, piece: memoryview, offset: int) -> int | None:
    """How much was read; None if that would have waited for a disk, or nobody can tell."""
    if sys.platform != "linux":
        return None
    try:
        return os.preadv(descriptor, [piece], offset, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
            raise
        return None
