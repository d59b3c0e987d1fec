"""Repos as Hugging Face clients see them: create, change, describe, list, refs and history."""

import itertools
from typing import Annotated, Any
from urllib.parse import parse_qs

from fastapi import Body, Depends, Query, Request, Response
from fastapi.responses import JSONResponse
from sqlmodel import Session, col, select

from hub.deps import HubDep, Open, ReadSession, ViewerDep, WriterDep, WriteSession, public_url
from hub.errors import Forbidden, RepoExists, RepoNotFound
from hub.hf import bodies, info, listing
from hub.hf.attributes import GITATTRIBUTES
from hub.hf.cards import card_at, validate
from hub.hf.deps import TYPES, RepoDep, type_named
from hub.hf.routing import OUR_COMMAND, hf_router, next_page
from hub.repos import commits, refs
from hub.repos import service as repos
from hub.repos.models import Commit, CommitEntry, RepoType
from hub.repos.operations import Add
from hub.repos.refs import MAIN
from hub.users import service as users
from hub.users.models import Scope, Token, User
from hub.users.service import Viewer

TREE_PAGE = 1000
EXPANDED_PAGE = 50

router = hf_router()

API = "/api/{kind:repos}/{namespace}/{name}"


def flag(value: str) -> bool:
    """Clients before 1.0 send Python's `True`."""
    return value.lower() in ("true", "1")


# Who am I


@router.get("/api/whoami-v2")
def whoami(session: ReadSession, viewer: ViewerDep) -> dict[str, Any]:
    """The user of the token, and its organisations."""
    user = viewer.require_user()
    return {
        "type": "user",
        "id": f"{user.id:024x}",
        "name": user.name,
        "fullname": user.full_name or user.name,
        "isPro": False,
        "avatarUrl": "",
        "orgs": [
            {
                "type": "org",
                "id": f"{org.id:024x}",
                "name": org.name,
                "fullname": org.full_name or org.name,
                "roleInOrg": str(role),
            }
            for org, role in users.organizations(session, user)
        ],
        "auth": {
            "type": "access_token",
            "accessToken": _access_token(session, viewer),
        },
    }


def _access_token(session: Session, viewer: Viewer) -> dict[str, Any]:
    token = session.get_one(Token, viewer.token_id)
    # Clients know read, write and fineGrained.
    role = str(Scope.READ if token.scope == Scope.READ else Scope.WRITE)
    answer: dict[str, Any] = {"displayName": token.name, "role": role}
    answer["createdAt"] = info.date(token.created_at)
    if viewer.places is not None:
        actions = ["repo.content.read"] + (["repo.write"] if viewer.has(Scope.WRITE) else [])
        answer["role"] = "fineGrained"
        answer["fineGrained"] = {
            "canReadGatedRepos": False,
            "global": [],
            "scoped": [
                {
                    "entity": {"type": "model" if "/" in place else "org", "name": place},
                    "permissions": actions,
                }
                for place in sorted(viewer.places)
            ],
        }
    return answer


# Life of a repo


@router.post("/api/repos/create")
def create(
    request: Request, body: bodies.CreateRepo, hub: HubDep, session: WriteSession, viewer: WriterDep
) -> Response:
    """409 carries the address too: with `exist_ok` clients read it from there."""
    type = type_named(body.type)
    namespace = _namespace(body.organization, viewer.require_user())
    base = public_url(request)
    first = []
    if hub.settings.gitattributes:
        content = GITATTRIBUTES.encode()
        stored = hub.store.put([content], size=len(content))
        first.append(Add(".gitattributes", stored, lfs=False))
    try:
        made = repos.create_repo(
            session,
            viewer,
            namespace,
            body.name,
            private=body.is_private() or False,
            type=type,
            first=first,
        )
    except RepoExists as error:
        return already_there(session, viewer, base, type, namespace, body.name, error)
    return JSONResponse(
        {"url": info.repo_url(base, made), "name": made.full_name, "id": f"{made.id:024x}"}
    )


def already_there(
    session: Session,
    viewer: Viewer,
    base: str,
    type: RepoType,
    namespace: str,
    name: str,
    error: RepoExists,
) -> Response:
    """The 409 of a name that is taken, with the address of the repo that has it."""
    try:
        existing = repos.get_repo(session, viewer, namespace, name, type=type)
    except RepoNotFound:
        # The name is reserved by a repo that is gone: a 409 would mean that it can be used.
        raise Forbidden(error.message) from error
    return JSONResponse(
        {"error": error.message, "url": info.repo_url(base, existing)},
        409,
        {"X-Error-Code": error.code, "X-Error-Message": error.message},
    )


@router.delete("/api/repos/delete")
def delete(body: bodies.DeleteRepo, session: WriteSession, viewer: WriterDep) -> None:
    """The name stays reserved for its owner."""
    namespace = _namespace(body.organization, viewer.require_user())
    found = repos.get_repo(session, viewer, namespace, body.name, type=type_named(body.type))
    repos.delete_repo(session, viewer, found)


@router.post("/api/repos/move")
def move(body: bodies.MoveRepo, session: WriteSession, viewer: WriterDep) -> dict[str, Any]:
    """The old name redirects from now on."""
    type = type_named(body.type)
    namespace, _, name = body.fromRepo.partition("/")
    to_namespace, _, to_name = body.toRepo.partition("/")
    found = repos.get_repo(session, viewer, namespace, name, type=type)
    repos.move_repo(session, viewer, found, to_namespace, to_name)
    return {}


@router.put(API + "/settings")
def settings(
    body: bodies.Settings, session: WriteSession, viewer: WriterDep, repo: RepoDep
) -> dict[str, Any]:
    """Visibility, and who may have the files; what is not given stays."""
    changed = repos.update_settings(
        session, viewer, repo, private=body.is_private(), gated=body.gated
    )
    return {"private": changed.private, "gated": changed.gated or False}


def _namespace(organization: str | None, user: User) -> str:
    return organization or user.name


# Description


async def _expand(
    expand: Annotated[list[str], Query()] = [],  # noqa: B006 - FastAPI copies it
    expand_old: Annotated[list[str], Query(alias="expand[]")] = [],  # noqa: B006
) -> set[str]:
    """The properties that are asked for; names we do not know are no error."""
    return {name for value in [*expand, *expand_old] for name in value.split(",") if name}


ExpandDep = Annotated[set[str], Depends(_expand)]


@router.get(API)
@router.get(API + "/revision/{revision}")
def model_info(
    hub: HubDep,
    session: ReadSession,
    repo: RepoDep,
    wanted: ExpandDep,
    revision: str = MAIN,
    blobs: str = "",
) -> Response:
    """A repo at a revision, with its files, its card and its tags."""
    commit = refs.resolve(session, repo, revision)
    entries = commits.entries(session, commit)
    answer = info.repo_info(
        repo,
        commit,
        entries,
        card_at(hub.store, entries),
        blobs=flag(blobs),
    )
    return JSONResponse(_expanded(answer, wanted))


def _expanded(answer: dict[str, Any], wanted: set[str]) -> dict[str, Any]:
    if not wanted:
        return answer
    return {name: value for name, value in answer.items() if name in {"_id", "id", *wanted}}


@router.post("/api/validate-yaml", dependencies=[Open])
def validate_yaml(request: Request, body: bodies.Card) -> Response:
    """Asked before every upload of a README.md; an answer other than 200 stops the upload."""
    found = validate(body.content)
    # huggingface_hub prints them with a line of its own code; our command line shows none of that.
    warnings = [] if OUR_COMMAND in request.headers else found.warnings
    answer = {
        "errors": [{"message": message} for message in found.errors],
        "warnings": [{"message": message} for message in warnings],
    }
    return JSONResponse(answer, 400 if found.errors else 200)


# Listing


@router.get("/api/{kind:repos}")
def list_repos(
    request: Request,
    hub: HubDep,
    session: ReadSession,
    viewer: ViewerDep,
    kind: str,
    query: Annotated[listing.ListQuery, Query()],
    wanted: ExpandDep,
) -> Response:
    """Repos the viewer may see; the next page is an absolute address, as clients need it."""
    if kind not in TYPES:
        return JSONResponse([])
    page = listing.page(session, hub.store, viewer, TYPES[kind], query)
    items = []
    for repo in page.repos:
        item = info.repo_summary(repo, page.tags.get(repo.id or 0, []))
        if query.wants_files or "siblings" in wanted:
            head = refs.resolve(session, repo)
            entries = commits.entries(session, head)
            item = info.repo_info(repo, head, entries, card_at(hub.store, entries), blobs=False)
        items.append(_expanded(item, wanted))
    headers = {}
    if page.cursor is not None:
        headers["Link"] = next_page(request, page.cursor)
    return JSONResponse(items, headers=headers)


# Files of a revision


@router.get(API + "/tree/{revision}")
@router.get(API + "/tree/{revision}/{path:path}")
def tree(
    request: Request,
    session: ReadSession,
    repo: RepoDep,
    revision: str,
    path: str = "",
    recursive: str = "",
    expand: str = "",
    limit: Annotated[int, Query(ge=1)] = TREE_PAGE,
    cursor: str = "",
) -> Response:
    """Files and folders by path, in pages."""
    under = path.strip("/")
    commit = refs.resolve(session, repo, revision)
    entries = commits.entries(session, commit, under)
    last = _commits_of(session, entries) if flag(expand) else None
    items = info.tree(entries, under, recursive=flag(recursive), last=last)
    size = min(limit, EXPANDED_PAGE if last is not None else TREE_PAGE)
    rest = (
        list(itertools.dropwhile(lambda item: item["path"] <= cursor, items)) if cursor else items
    )
    headers = {}
    if len(rest) > size:
        headers["Link"] = next_page(request, rest[size - 1]["path"])
    return JSONResponse(rest[:size], headers=headers)


async def _paths_info(request: Request) -> bodies.PathsInfo:
    """Python clients send a form, others JSON."""
    body = await request.body()
    if request.headers.get("Content-Type", "").startswith("application/json"):
        return bodies.parse(bodies.PathsInfo, body)
    form = parse_qs(body.decode("utf-8", "replace"), max_num_fields=10_001)
    expand = form.get("expand", [""])[-1]
    return bodies.PathsInfo(paths=form.get("paths", [])[:10_000], expand=flag(expand))


@router.post(API + "/paths-info/{revision}", dependencies=[Open])
def paths_info(
    session: ReadSession,
    repo: RepoDep,
    revision: str,
    body: Annotated[bodies.PathsInfo, Depends(_paths_info)],
) -> Response:
    """The files and folders among `paths`; what is not there is left out."""
    entries = commits.entries(session, refs.resolve(session, repo, revision))
    last = _commits_of(session, entries) if body.expand else None
    wanted = {path.strip("/") for path in body.paths}
    items = info.tree(entries, recursive=True, last=last)
    return JSONResponse([item for item in items if item["path"] in wanted])


def _commits_of(session: Session, entries: list[CommitEntry]) -> dict[str, Commit]:
    """By id, the commits that last changed these files."""
    ids = sorted({entry.last_commit_id for entry in entries})
    found: dict[str, Commit] = {}
    for start in range(0, len(ids), 500):
        some = ids[start : start + 500]
        for commit in session.exec(select(Commit).where(col(Commit.id).in_(some))):
            found[commit.id] = commit
    return found


# Refs and history


@router.get(API + "/refs")
def list_refs(session: ReadSession, repo: RepoDep, include_prs: str = "") -> dict[str, Any]:
    found = refs.of_repo(session, repo)
    answer: dict[str, Any] = {
        "branches": [_ref("heads", *item) for item in found.branches.items()],
        "tags": [_ref("tags", *item) for item in found.tags.items()],
        "converts": [],
    }
    if flag(include_prs):
        answer["pullRequests"] = [_ref("pr", *item) for item in found.pulls.items()]
    return answer


def _ref(kind: str, name: str, commit: str) -> dict[str, str]:
    return {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit}


@router.post(API + "/branch/{branch}")
def create_branch(
    session: WriteSession,
    viewer: WriterDep,
    repo: RepoDep,
    branch: str,
    body: Annotated[bodies.CreateBranch | None, Body()] = None,
) -> dict[str, Any]:
    start = (body.startingPoint if body else None) or MAIN
    refs.create_branch(session, viewer, repo, branch, start)
    return {}


@router.delete(API + "/branch/{branch}")
def delete_branch(
    session: WriteSession, viewer: WriterDep, repo: RepoDep, branch: str
) -> dict[str, Any]:
    refs.delete_branch(session, viewer, repo, branch)
    return {}


@router.post(API + "/tag/{revision}")
def create_tag(
    session: WriteSession, viewer: WriterDep, repo: RepoDep, revision: str, body: bodies.CreateTag
) -> dict[str, Any]:
    """The address names what is tagged, the body the tag."""
    refs.create_tag(session, viewer, repo, body.tag, revision)
    return {}


@router.delete(API + "/tag/{tag}")
def delete_tag(session: WriteSession, viewer: WriterDep, repo: RepoDep, tag: str) -> dict[str, Any]:
    refs.delete_tag(session, viewer, repo, tag)
    return {}


@router.get(API + "/commits/{revision}")
def list_commits(
    request: Request,
    session: ReadSession,
    repo: RepoDep,
    revision: str,
    wanted: ExpandDep,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
    cursor: str | None = None,
) -> Response:
    """History, newest first, in pages."""
    commit = refs.resolve(session, repo, revision)
    found, following = commits.history(session, repo, commit, limit, cursor)
    headers = {}
    if following is not None:
        headers["Link"] = next_page(request, following)
    is_formatted = "formatted" in wanted
    items = [info.commit_item(item, is_formatted=is_formatted) for item in found]
    return JSONResponse(items, headers=headers)
