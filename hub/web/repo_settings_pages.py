"""What those who may write to a repo decide about it: who sees it, who gets its files, its name."""

from typing import Annotated, Literal

from fastapi import APIRouter, Form, Request
from fastapi.responses import Response
from sqlmodel import Session, select

from hub.deps import HubDep, ReadSession, ViewerDep, WriterDep
from hub.errors import BadField, HubError
from hub.repos import access, permissions, refs
from hub.repos import service as repos
from hub.repos.models import AccessState, Gate, Repo
from hub.users import service as users
from hub.users.models import Organization
from hub.users.service import Viewer
from hub.web.login_pages import Text
from hub.web.render import refused_page, see_other
from hub.web.repo_head import RepoDep, head_of, url_of

router = APIRouter(include_in_schema=False, tags=["web"])

GATES = {
    "open": "everybody who sees the repo",
    str(Gate.AUTO): "whoever is signed in and asks; asking is enough",
    str(Gate.MANUAL): "whoever asks and is let in by somebody who may write here",
}


# Settings


@router.get("/{namespace}/{name}/settings")
@router.get("/datasets/{namespace}/{name}/settings")
def show(request: Request, repo: RepoDep, session: ReadSession, viewer: ViewerDep) -> Response:
    return _settings_page(request, session, viewer, repo)


def _settings_page(
    request: Request, session: Session, viewer: Viewer, repo: Repo, error: HubError | None = None
) -> Response:
    permissions.require_writer(session, viewer, repo.namespace, repo.name)
    return refused_page(
        request,
        "repo_settings.html",
        viewer,
        error,
        **head_of(session, viewer, repo, refs.resolve(session, repo), None, tab="settings"),
        visibilities={
            "public": "everybody who reaches this hub",
            "private": _members(session, repo),
        },
        gates=GATES,
        namespaces=[(name, name) for name in _namespaces(session, viewer, repo)],
        was_saved="saved" in request.query_params,
        problem=error.message if error is not None else None,
    )


def _members(session: Session, repo: Repo) -> str:
    """Who sees it while it is private, in words."""
    query = select(Organization.id).where(Organization.key == repo.namespace_key)
    is_shared = session.exec(query).first() is not None
    return f"the members of {repo.namespace}" if is_shared else f"{repo.namespace} alone"


def _namespaces(session: Session, viewer: Viewer, repo: Repo) -> list[str]:
    """Where the viewer may move it: its own place first."""
    places = users.writable_namespaces(session, viewer)
    return list(dict.fromkeys([repo.namespace, *places]))


@router.post("/{namespace}/{name}/settings")
@router.post("/datasets/{namespace}/{name}/settings")
def change(
    request: Request,
    viewer: WriterDep,
    repo: RepoDep,
    hub: HubDep,
    session: ReadSession,
    visibility: Annotated[Literal["public", "private"], Form()],
    gate: Annotated[Literal["open", "auto", "manual"], Form()],
) -> Response:
    """Who sees the repo, and who may have its files."""
    gated: Gate | Literal[False] = Gate(gate) if gate != "open" else False
    try:
        with hub.db.write() as writing:
            repos.update_settings(
                writing, viewer, repo, private=visibility == "private", gated=gated
            )
    except HubError as error:
        return _settings_page(request, session, viewer, repo, error)
    return see_other(f"{url_of(repo)}/settings?saved=1")


@router.post("/{namespace}/{name}/settings/move")
@router.post("/datasets/{namespace}/{name}/settings/move")
def move(
    request: Request,
    viewer: WriterDep,
    repo: RepoDep,
    hub: HubDep,
    session: ReadSession,
    to_namespace: Text,
    to_name: Text,
) -> Response:
    """Another name; the old one leads there from now on."""
    try:
        with hub.db.write() as writing:
            moved = repos.move_repo(writing, viewer, repo, to_namespace.strip(), to_name.strip())
            place = url_of(moved)
    except HubError as error:
        return _settings_page(request, session, viewer, repo, error)
    return see_other(f"{place}/settings?saved=1")


@router.post("/{namespace}/{name}/settings/delete")
@router.post("/datasets/{namespace}/{name}/settings/delete")
def delete(
    request: Request,
    viewer: WriterDep,
    repo: RepoDep,
    hub: HubDep,
    session: ReadSession,
    confirm: Text = "",
) -> Response:
    """For ever, so the name has to be typed."""
    try:
        if confirm.strip() != repo.full_name:
            raise BadField(f"nothing was deleted: type {repo.full_name} to delete it", "confirm")
        with hub.db.write() as writing:
            repos.delete_repo(writing, viewer, repo)
    except HubError as error:
        return _settings_page(request, session, viewer, repo, error)
    return see_other(f"/{repo.namespace}")


# Access requests


@router.get("/{namespace}/{name}/access")
@router.get("/datasets/{namespace}/{name}/access")
def requests(request: Request, repo: RepoDep, session: ReadSession, viewer: ViewerDep) -> Response:
    """Who asked for the files, and what became of it."""
    return _access_page(request, session, viewer, repo)


def _access_page(
    request: Request, session: Session, viewer: Viewer, repo: Repo, error: HubError | None = None
) -> Response:
    lists = [(state, access.requests(session, viewer, repo, state)) for state in AccessState]
    return refused_page(
        request,
        "repo_access.html",
        viewer,
        error,
        **head_of(session, viewer, repo, refs.resolve(session, repo), None, tab="access"),
        lists=lists,
        members=_members(session, repo),
        gates=GATES,
        problem=error.message if error is not None else None,
    )


@router.post("/{namespace}/{name}/access")
@router.post("/datasets/{namespace}/{name}/access")
def decide(
    request: Request,
    viewer: WriterDep,
    repo: RepoDep,
    hub: HubDep,
    session: ReadSession,
    request_id: Annotated[int, Form(ge=1, lt=2**63)],
    state: Annotated[AccessState, Form()],
    reason: Annotated[str, Form(max_length=access.MAX_REASON)] = "",
) -> Response:
    """Let in, decline, or take the answer back."""
    try:
        with hub.db.write() as writing:
            access.decide(
                writing, viewer, repo, state, request_id=request_id, reason=reason.strip()
            )
    except HubError as error:
        return _access_page(request, session, viewer, repo, error)
    return see_other(f"{url_of(repo)}/access")


@router.post("/{namespace}/{name}/access/grant")
@router.post("/datasets/{namespace}/{name}/access/grant")
def grant(
    request: Request,
    viewer: WriterDep,
    repo: RepoDep,
    hub: HubDep,
    session: ReadSession,
    user: Text = "",
) -> Response:
    """Let somebody in who has not asked."""
    try:
        with hub.db.write() as writing:
            access.grant(writing, viewer, repo, user.strip())
    except HubError as error:
        return _access_page(request, session, viewer, repo, error)
    return see_other(f"{url_of(repo)}/access")
