"""What the façade's routes ask for by type: the repo of an address."""

from typing import Annotated

from anyio import to_thread
from fastapi import Depends, Request
from sqlmodel import Session

from hub.deps import ReadSession, ViewerDep, hub_of
from hub.errors import NotImplementedHere, RepoNotFound
from hub.hf.routing import RepoMoved
from hub.mirror.routes import mirror_of
from hub.repos import service as repos
from hub.repos.models import Repo, RepoType
from hub.users.service import Viewer

READING = ("GET", "HEAD")
TYPES = {"models": RepoType.MODEL, "datasets": RepoType.DATASET}


async def repo_type(kind: str = "models") -> RepoType:
    """From the first segment of an address, which model files do not have."""
    if kind not in TYPES:
        raise RepoNotFound("this hub has no spaces")
    return TYPES[kind]


TypeDep = Annotated[RepoType, Depends(repo_type)]


def type_named(type: str | None) -> RepoType:
    """From the field of a body, which is left out for models."""
    kind = f"{type or 'model'}s"
    if kind not in TYPES:
        raise NotImplementedHere("this hub has no spaces")
    return TYPES[kind]


async def repo(
    request: Request,
    session: ReadSession,
    viewer: ViewerDep,
    type: TypeDep,
    namespace: str,
    name: str,
) -> Repo:
    """The repo of an address if the viewer may see it: RepoNotFound, RepoMoved."""
    # As in `hub.deps._read`; an upstream is asked over the network.
    if hub_of(request).db.is_sqlite and mirror_of(request) is None:
        return find(request, session, viewer, type, namespace, name)
    return await to_thread.run_sync(find, request, session, viewer, type, namespace, name)


def find(
    request: Request,
    session: Session,
    viewer: Viewer,
    type: RepoType,
    namespace: str,
    name: str,
) -> Repo:
    """As `repo`, for routes that do not keep a session while a body arrives."""
    mirror = mirror_of(request) if type == RepoType.MODEL and request.method in READING else None
    try:
        found = repos.get_repo(session, viewer, namespace, name, type=type)
        if mirror is not None:
            mirror.refresh(found)
        return found
    except RepoNotFound:
        moved = repos.moved_to(session, viewer, namespace, name, type=type)
        if moved is None and mirror is not None:
            session.rollback()  # What is fetched comes after this snapshot.
            mirror.bring(viewer, namespace, name)
            return repos.get_repo(session, viewer, namespace, name, type=type)
        if moved is None:
            raise
        path = request.scope["raw_path"].decode("ascii")
        location = path.replace(f"/{namespace}/{name}", f"/{moved.full_name}", 1)
        query = request.url.query
        raise RepoMoved(f"{location}?{query}" if query else location) from None


RepoDep = Annotated[Repo, Depends(repo)]
