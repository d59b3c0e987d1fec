"""Routes that change the history of a repo: squash, revert, LFS files, and copies of a repo."""

from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from hub.adapters.service import try_to_project
from hub.blobs.store import Sha256, lfs_pointer_oid
from hub.deps import HubDep, ReadSession, ViewerDep, WriterDep, public_url
from hub.errors import BadRequest, Forbidden, RepoExists
from hub.hf import bodies, info
from hub.hf.deps import RepoDep
from hub.hf.repos import already_there
from hub.hf.routing import hf_router, next_page
from hub.repos import history
from hub.repos.models import RepoType
from hub.users import service as users

API = "/api/{kind:repos}/{namespace}/{name}"
PAGE = 500

router = hf_router()


@router.post(API + "/super-squash/{revision}")
def squash(
    hub: HubDep, viewer: WriterDep, repo: RepoDep, revision: str, body: bodies.Squash
) -> dict[str, Any]:
    """One commit in the place of a branch's history."""
    message = body.message or f"Super-squash branch '{revision}'"
    with hub.db.write() as session:
        made = history.squash(session, viewer, repo, revision, message)
    try_to_project(hub, made.repo_id)
    return {"commitOid": made.id}


@router.post(API + "/revert/{revision}")
def revert(
    request: Request,
    hub: HubDep,
    viewer: WriterDep,
    repo: RepoDep,
    revision: str,
    body: bodies.Revert,
) -> dict[str, Any]:
    """A commit on `branch` that takes back what the commit of the address changed."""
    with hub.db.write() as session:
        made = history.revert(session, viewer, repo, body.branch, revision)
    try_to_project(hub, made.repo_id)
    url = f"{info.repo_url(public_url(request), repo)}/commit/{made.id}"
    return {"commitOid": made.id, "commitUrl": url}


@router.get(API + "/lfs-files")
def lfs_files(
    request: Request, session: ReadSession, viewer: ViewerDep, repo: RepoDep, cursor: int = 0
) -> Response:
    """Every LFS file of the history, newest first, for who may delete them."""
    user = viewer.require_user()
    if not users.may_read_private(session, viewer, repo.namespace, repo.name):
        raise Forbidden(f"{user.name} may not list the LFS files of {repo.full_name}")
    found = history.lfs_files(session, repo)[max(cursor, 0) :]
    items = [
        {
            # Clients give it back to say which file is to go.
            "fileOid": file.sha256,
            "oid": lfs_pointer_oid(Sha256(file.sha256), file.size),
            "filename": file.path,
            "size": file.size,
            "pushedAt": info.date(file.pushed_at),
            "ref": file.ref,
        }
        for file in found[:PAGE]
    ]
    headers = {}
    if len(found) > PAGE:
        headers["Link"] = next_page(request, str(max(cursor, 0) + PAGE))
    return JSONResponse(items, headers=headers)


@router.post(API + "/lfs-files/batch")
def delete_lfs_files(
    hub: HubDep, viewer: WriterDep, repo: RepoDep, body: bodies.LFSDeletions
) -> dict[str, Any]:
    """Files leave the whole history, whose commits get new ids."""
    if not body.deletions.rewriteHistory:
        raise BadRequest("files are deleted with rewriteHistory: no commit here lacks a file")
    with hub.db.write() as session:
        rewritten = history.forget(session, viewer, repo, body.deletions.sha)
    assert repo.id is not None
    try_to_project(hub, repo.id)
    return {"rewritten": rewritten}


@router.post(API + "/duplicate")
def duplicate(
    request: Request, hub: HubDep, viewer: WriterDep, repo: RepoDep, body: bodies.Duplicate
) -> Response:
    """A repo of one's own with the same files; 409 carries the address, as for a new repo."""
    namespace, _, name = body.repository.rpartition("/")
    namespace = namespace or viewer.require_user().name
    base = public_url(request)
    try:
        with hub.db.write() as session:
            made = history.duplicate(
                session, viewer, repo, namespace, name, private=body.is_private()
            )
    except RepoExists as error:
        with hub.db.read() as session:
            return already_there(session, viewer, base, RepoType(repo.type), namespace, name, error)
    assert made.id is not None
    try_to_project(hub, made.id)
    return JSONResponse({"url": info.repo_url(base, made), "filesCopyPending": False})
