"""The headers of all shards of a checkpoint in one answer, as huggingface_hub 2 asks for them."""

import json
from pathlib import PurePosixPath

from fastapi import Response

from hub.blobs.store import BlobStore, Sha256
from hub.deps import HubDep, ReadSession, ViewerDep
from hub.errors import BadRequest, TooLarge
from hub.hf.deps import RepoDep
from hub.hf.routing import hf_router
from hub.repos import commits, permissions, refs
from hub.repos.models import CommitEntry
from merge.formats.header import PREFIX_BYTES, header_length, parse_header

MAX_INDEX_BYTES = 16 * 2**20
# Of all headers together; those of the largest published models are a third of it.
MAX_BYTES = 32 * 2**20
MAX_SHARDS = 1000

router = hf_router()


@router.get("/api/{kind:repos}/{namespace}/{name}/safetensors-metadata/{path:path}")
def headers_of_shards(
    hub: HubDep, session: ReadSession, viewer: ViewerDep, repo: RepoDep, path: str
) -> Response:
    """Of the checkpoint at `main` whose index is at `path`; the index without its `weight_map`."""
    permissions.require_files(session, viewer, repo)
    commit = refs.resolve(session, repo)
    index = _index(hub.store, commits.entry(session, commit, path))
    names = sorted(set(index["weight_map"].values()))
    if len(names) > MAX_SHARDS:
        raise TooLarge(f"{path} names more than {MAX_SHARDS} files")
    left = MAX_BYTES
    found = []
    for name in names:
        entry = commits.entry(session, commit, str(PurePosixPath(path).with_name(name)))
        header = _header(hub.store, entry, left)
        left -= len(header)
        found.append(json.dumps(name).encode() + b":" + header)
    rest = {key: value for key, value in index.items() if key != "weight_map"}
    body = b'{"headers":{' + b",".join(found) + b'},"index":' + json.dumps(rest).encode() + b"}"
    return Response(body, media_type="application/json")


def _index(store: BlobStore, entry: CommitEntry) -> dict[str, dict[str, str]]:
    """BadRequest if it names no files."""
    if entry.size > MAX_INDEX_BYTES:
        raise TooLarge(f"{entry.path} has more than {MAX_INDEX_BYTES} bytes")
    try:
        index = json.loads(b"".join(store.open(Sha256(entry.sha256))))
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"{entry.path} is not JSON: {error}") from error
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not all(_is_name(name) for name in files.values()):
        raise BadRequest(f"{entry.path} is no index: its weight_map names no files beside it")
    found: dict[str, dict[str, str]] = index
    return found


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value not in ("", ".", "..") and "/" not in value


def _header(store: BlobStore, entry: CommitEntry, left: int) -> bytes:
    """The JSON of a header that keeps every rule; BadFile, TooLarge."""
    sha256, size, name = Sha256(entry.sha256), entry.size, entry.path
    length = header_length(b"".join(store.open(sha256, 0, min(size, PREFIX_BYTES))), size, name)
    if length > left:
        raise TooLarge(f"the headers of these files have more than {MAX_BYTES} bytes")
    head = b"".join(store.open(sha256, 0, PREFIX_BYTES + length))
    parse_header(head, size, name)
    return head[PREFIX_BYTES:]
