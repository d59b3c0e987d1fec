"""Preupload and commit: how regular files arrive, and how all files become visible together."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from anyio import to_thread
from fastapi import Request
from sqlmodel import Session

from hub.adapters.service import publish
from hub.blobs.store import Sha256, Stored
from hub.context import Hub
from hub.db import UNREACHABLE
from hub.deps import HubDep, ReadSession, WriterDep, public_url
from hub.errors import BadRequest, HubError, TooLarge
from hub.hf import attributes, bodies, info
from hub.hf.attributes import LFSRule
from hub.hf.deps import RepoDep, TypeDep, find
from hub.hf.ndjson import Line, read_lines
from hub.hf.routing import OUR_COMMAND, UNLIMITED, hf_router
from hub.limits import pending, quotas
from hub.repos import commits, discussions, holds, permissions, pulls, refs
from hub.repos.models import Blob, Commit, Repo
from hub.repos.operations import Add, Copy, Delete, DeleteFolder, Operation
from hub.repos.paths import check_path
from hub.users.models import User
from hub.users.service import Viewer

API = "/api/{kind:repos}/{namespace}/{name}"

# What our command sends over LFS: larger files then never pass through memory as base64.
SMALL_BYTES = 2**20

router = hf_router()


@router.post(API + "/preupload/{revision}")
def preupload(
    hub: HubDep,
    session: ReadSession,
    viewer: WriterDep,
    repo: RepoDep,
    revision: str,
    body: bodies.Preupload,
    request: Request,
    create_pr: str = "",
) -> dict[str, Any]:
    """How each file is to be sent, and what is at its path now.

    Rights are checked here already: a commit that is refused makes clients try it in pieces.
    So is the quota, because clients show what is said here and not what is said to hf_xet.
    """
    require_writable(session, viewer, repo, revision, create_pr)
    head = refs.resolve(session, repo, revision)
    before = {entry.path: entry for entry in commits.entries(session, head)}
    rule = attributes.lfs_rule(hub.store, before)
    limit = hub.settings.max_regular_bytes
    if request.headers.get(OUR_COMMAND) == "lfs":
        limit = min(limit, SMALL_BYTES)
    skipped = attributes.ignored(hub.store, before, body.gitIgnore)
    answers = []
    for file in body.files:
        check_path(file.path)
        is_lfs = file.size > limit or rule.covers(file.path, file.size)
        answer: dict[str, Any] = {
            "path": file.path,
            "uploadMode": "lfs" if is_lfs else "regular",
            "shouldIgnore": skipped.match_file(file.path),
        }
        entry = before.get(file.path)
        blob = session.get(Blob, entry.sha256) if entry is not None else None
        if blob is not None:
            # Clients leave a file out if this is its own digest, in the kind of the mode above.
            answer["oid"] = blob.sha256 if is_lfs else blob.git_oid
        answers.append(answer)
    sizes = [
        file.size
        for file, answer in zip(body.files, answers, strict=True)
        if not answer["shouldIgnore"]
    ]
    quotas.require_room_for_sizes(session, repo.namespace_key, sizes, hub.settings.quota_bytes)
    return {"files": answers, "commitOid": head.id}


@router.post(API + "/commit/{revision}", max_body_size=UNLIMITED)
async def commit(
    request: Request,
    hub: HubDep,
    viewer: WriterDep,
    type: TypeDep,
    namespace: str,
    name: str,
    revision: str,
    create_pr: str = "",
) -> dict[str, Any]:
    """All operations of the body as one commit; a commit that changes nothing is the head."""

    # Not RepoDep: its session would keep a snapshot of the catalogue for the whole upload.
    def writable() -> tuple[Repo, LFSRule]:
        with hub.db.read() as session:
            repo = find(request, session, viewer, type, namespace, name)
            require_writable(session, viewer, repo, revision, create_pr)
            head = refs.resolve(session, repo, revision)
            before = {entry.path: entry for entry in commits.entries(session, head)}
            return repo, attributes.lfs_rule(hub.store, before)

    repo, rule = await to_thread.run_sync(writable)
    async with _remembered(hub, viewer) as kept:
        header, operations = await _read_commit(hub, viewer, request, rule, kept)
        url = info.repo_url(public_url(request), repo)
        pull_url = None
        if _is_set(create_pr):
            made, number = await to_thread.run_sync(
                _propose, hub, viewer, repo, revision, header, operations
            )
            pull_url = f"{url}/discussions/{number}"
        else:
            made = await to_thread.run_sync(
                lambda: publish(
                    hub,
                    viewer,
                    namespace,
                    name,
                    branch=revision,
                    operations=operations,
                    message=header.summary,
                    description=header.description,
                    parent=header.parentCommit,
                    type=type,
                )
            )
    return {
        "success": True,
        "commitOid": made.id,
        "commitUrl": f"{url}/commit/{made.id}",
        "hookOutput": "",
        "pullRequestUrl": pull_url,
    }


@asynccontextmanager
async def _remembered(hub: Hub, viewer: Viewer) -> AsyncIterator[list[Stored]]:
    """Takes what a body brings; where it ends without a commit, that counts as sent."""
    kept: list[Stored] = []
    is_made = False
    try:
        yield kept
        is_made = True
    finally:
        if kept and not is_made and hub.settings.pending_bytes is not None:
            with suppress(HubError, *UNREACHABLE):  # then it is found by the collection
                await to_thread.run_sync(_hold, hub, viewer, kept)


def _hold(hub: Hub, viewer: Viewer, kept: Sequence[Stored]) -> None:
    with hub.db.write() as session:
        for stored in sorted(set(kept), key=lambda stored: stored.sha256):
            holds.hold(session, viewer, stored)


def _propose(
    hub: Hub,
    viewer: Viewer,
    repo: Repo,
    branch: str,
    header: bodies.CommitHeader,
    operations: list[Operation],
) -> tuple[Commit, int]:
    """A new pull request with this one commit, and its number."""
    title, text = header.summary[: discussions.MAX_TITLE], header.description
    with hub.db.write() as session:
        pull = pulls.propose(
            session, viewer, repo, title, text, branch=branch, parent=header.parentCommit
        )
        made = commits.create(
            session,
            viewer,
            repo,
            branch=f"refs/pr/{pull.num}",
            operations=operations,
            message=header.summary,
            description=header.description,
        )
        return made, pull.num


def _is_set(flag: str) -> bool:
    return flag.lower() in ("1", "true")


def require_writable(
    session: Session, viewer: Viewer, repo: Repo, revision: str, create_pr: str
) -> User:
    """Anybody who reads a repo may propose something; the rest is for its writers."""
    if _is_set(create_pr):
        return permissions.require_participant(session, viewer, repo)
    return permissions.require_committer(session, viewer, repo, revision)


async def _read_commit(
    hub: Hub, viewer: Viewer, request: Request, rule: LFSRule, kept: list[Stored]
) -> tuple[bodies.CommitHeader, list[Operation]]:
    limits = hub.settings
    body = _capped(request.stream(), limits.max_commit_bytes)
    header: bodies.CommitHeader | None = None
    operations: list[Operation] = []

    async def keep(content: AsyncIterator[bytes]) -> Stored:
        await to_thread.run_sync(pending.require_room, hub, viewer, {})
        kept.append(await hub.store.put_stream(_capped(content, limits.max_upload_bytes)))
        return kept[-1]

    async for line in read_lines(body, keep):
        if line.key == "header":
            header = bodies.parse(bodies.CommitHeader, line.value, f"line {line.number}")
        else:
            operations.append(await _operation(hub, viewer, line, rule))
    if header is None:
        raise BadRequest("a commit has a header line")
    return header, operations


async def _operation(hub: Hub, viewer: Viewer, line: Line[Stored], rule: LFSRule) -> Operation:
    where = f"line {line.number}"
    match line.key:
        case "file":
            file = bodies.parse(bodies.RegularFile, line.value, where)
            assert line.kept is not None
            return Add(file.path, line.kept, rule.covers(file.path, line.kept.size))
        case "lfsFile":
            lfs = bodies.parse(bodies.LFSFile, line.value, where)
            return Add(lfs.path, await to_thread.run_sync(_sent, hub, viewer, lfs), lfs=True)
        case "deletedFile":
            return Delete(bodies.parse(bodies.DeletedFile, line.value, where).path)
        case "deletedFolder":
            return DeleteFolder(bodies.parse(bodies.DeletedFile, line.value, where).path)
        case "copyFile":
            copied = bodies.parse(bodies.CopiedFile, line.value, where)
            return Copy(copied.srcPath, copied.path, copied.srcRevision)
        case other:
            raise BadRequest(f"{where}: this hub knows no operation {other[:50]!r}")


def _sent(hub: Hub, viewer: Viewer, file: bodies.LFSFile) -> Stored:
    """The blob, if this user has sent it or can read it: a digest alone is no right to bytes."""
    with hub.db.read() as session:
        stored = holds.known(session, viewer, Sha256(file.oid))
    if stored is None or file.size not in (None, stored.size):
        raise BadRequest(f"{file.path}: LFS pointer pointed to a file that does not exist")
    return stored


async def _capped(chunks: AsyncIterator[bytes], limit: int) -> AsyncIterator[bytes]:
    seen = 0
    async for chunk in chunks:
        seen += len(chunk)
        if seen > limit:
            raise TooLarge(f"more than {limit} bytes; send fewer files at once or over LFS")
        yield chunk
