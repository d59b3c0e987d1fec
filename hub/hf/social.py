"""Likes, users and organisations, and the lists that pages of other programs are made of."""

from typing import Annotated, Any

from fastapi import Query, Request, Response
from fastapi.responses import JSONResponse
from sqlalchemy import func
from sqlmodel import Session, col, select

from hub.adapters.models import Card, Tag
from hub.deps import ReadSession, ViewerDep, WriterDep, WriteSession
from hub.errors import Forbidden
from hub.hf import info
from hub.hf.deps import RepoDep
from hub.hf.routing import hf_router, next_page
from hub.repos import likes, permissions
from hub.repos.models import Commit, CommitEntry, Repo, RepoType
from hub.users import organizations
from hub.users import service as users
from hub.users.models import User
from hub.users.service import Viewer

API = "/api/{kind:repos}/{namespace}/{name}"
PAGE = 500

router = hf_router()

CursorDep = Annotated[int, Query(alias="cursor", ge=0, le=2**31)]


@router.post(API + "/like")
def like(session: WriteSession, viewer: WriterDep, repo: RepoDep) -> dict[str, Any]:
    likes.like(session, viewer, repo)
    return {}


@router.delete(API + "/like")
def unlike(session: WriteSession, viewer: WriterDep, repo: RepoDep) -> dict[str, Any]:
    likes.unlike(session, viewer, repo)
    return {}


@router.get(API + "/likers")
def likers(
    request: Request, session: ReadSession, repo: RepoDep, cursor: CursorDep = 0
) -> Response:
    """Newest first, in pages."""
    return _page(request, [_person(user) for user in likes.of_repo(session, repo)], cursor)


@router.get("/api/users/{user}/likes")
def liked(
    request: Request, session: ReadSession, viewer: ViewerDep, user: str, cursor: CursorDep = 0
) -> Response:
    """Newest first, in pages; private repos only for who may see them."""
    found = likes.of_user(session, viewer, users.find_user(session, user))
    items = [
        {
            "createdAt": info.date(item.created_at),
            "repo": {"name": repo.full_name, "type": repo.type},
        }
        for item, repo in found
    ]
    return _page(request, items, cursor)


@router.get("/api/users/{user}/overview")
def user_overview(session: ReadSession, viewer: ViewerDep, user: str) -> dict[str, Any]:
    """Some programs ask this to tell users from organisations."""
    found = users.find_user(session, user)
    n_likes = len(likes.of_user(session, viewer, found))
    return {
        **_person(found),
        "type": "user",
        "isPro": False,
        **_numbers(session, viewer, found.key),
        "numLikes": n_likes,
        "orgs": [
            {"id": f"{org.id:024x}", "name": org.name, "fullname": org.full_name or org.name}
            for org, _ in users.organizations(session, found)
        ],
    }


@router.get("/api/organizations/{organization}/overview")
def organization_overview(
    session: ReadSession, viewer: ViewerDep, organization: str
) -> dict[str, Any]:
    found = organizations.find(session, organization)
    return {
        "type": "org",
        "name": found.name,
        "fullname": found.full_name or found.name,
        "avatarUrl": "",
        **_numbers(session, viewer, found.key),
        "numUsers": len(organizations.everybody(session, found)),
    }


@router.get("/api/organizations/{organization}/members")
def members(
    request: Request,
    session: ReadSession,
    viewer: ViewerDep,
    organization: str,
    cursor: CursorDep = 0,
) -> Response:
    """For members: who belongs to an organisation is not told to everybody."""
    found = organizations.find(session, organization)
    if not users.may_read_private(session, viewer, found.name):
        raise Forbidden(f"the members of {found.name} are shown to its members")
    people = [
        _person(user) | {"role": role} for user, role in organizations.everybody(session, found)
    ]
    return _page(request, people, cursor)


@router.get("/api/settings/repositories")
def own_repositories(
    request: Request, session: ReadSession, viewer: ViewerDep, cursor: CursorDep = 0
) -> Response:
    """The caller's repos and the bytes in them."""
    return _page(request, _repositories(session, viewer.require_user().key), cursor)


@router.get("/api/organizations/{organization}/settings/repositories")
def repositories_of(
    request: Request,
    session: ReadSession,
    viewer: ViewerDep,
    organization: str,
    cursor: CursorDep = 0,
) -> Response:
    """As above, for who may write to an organisation's repos."""
    found = organizations.find(session, organization)
    if not users.may_read_private(session, viewer, found.name):
        raise Forbidden(f"the repos of {found.name} are listed for its members")
    return _page(request, _repositories(session, found.key), cursor)


@router.get("/api/models-tags-by-type")
def model_tags(session: ReadSession, viewer: ViewerDep) -> dict[str, Any]:
    return _tags_by_type(_tag_counts(session, viewer, RepoType.MODEL))


@router.get("/api/datasets-tags-by-type")
def dataset_tags(session: ReadSession, viewer: ViewerDep) -> dict[str, Any]:
    return _tags_by_type(_tag_counts(session, viewer, RepoType.DATASET))


def _tag_counts(session: Session, viewer: Viewer, type: RepoType) -> dict[str, int]:
    query = (
        select(Tag.name, func.count())
        .join(Repo, col(Repo.id) == col(Tag.repo_id))
        .where(Repo.type == type, permissions.visible_to(session, viewer))
        .group_by(col(Tag.name))
    )
    licenses = (
        select(Card.license, func.count())
        .join(Repo, col(Repo.id) == col(Card.repo_id))
        .where(
            Repo.type == type,
            col(Card.license).is_not(None),
            permissions.visible_to(session, viewer),
        )
        .group_by(col(Card.license))
    )
    named = {f"license:{name}": count for name, count in session.exec(licenses)}
    return dict(session.exec(query).all()) | named


def _tags_by_type(counts: dict[str, int]) -> dict[str, Any]:
    """The tags in use, most used first, under the type that their prefix says."""
    found: dict[str, list[dict[str, Any]]] = {"license": [], "dataset": [], "other": []}
    for tag in sorted(counts, key=lambda tag: (-counts[tag], tag)):
        prefix, _, label = tag.partition(":")
        type = prefix if label and prefix in found else "other"
        found[type].append({"id": tag, "label": label or tag, "type": type})
    return found


def _repositories(session: Session, namespace_key: str) -> list[dict[str, Any]]:
    each = (
        select(Commit.repo_id, CommitEntry.sha256, func.max(CommitEntry.size).label("size"))
        .join(Commit, col(Commit.id) == col(CommitEntry.commit_id))
        .join(Repo, col(Repo.id) == col(Commit.repo_id))
        .where(Repo.namespace_key == namespace_key)
        .group_by(col(Commit.repo_id), col(CommitEntry.sha256))
        .subquery()
    )
    summed = select(each.c.repo_id, func.sum(each.c.size)).group_by(each.c.repo_id)
    sizes: dict[int, int] = {repo_id: int(size) for repo_id, size in session.exec(summed)}
    total = sum(sizes.values())
    found = session.exec(
        select(Repo).where(Repo.namespace_key == namespace_key).order_by(col(Repo.id))
    )
    return [
        {
            "id": repo.full_name,
            "type": repo.type,
            "updatedAt": info.date(repo.last_modified),
            "visibility": "private" if repo.private else "public",
            "storage": sizes.get(repo.id or 0, 0),
            "storagePercent": sizes.get(repo.id or 0, 0) / total if total else 0.0,
        }
        for repo in found
    ]


def _page(request: Request, items: list[dict[str, Any]], start: int) -> Response:
    headers = {}
    if len(items) > start + PAGE:
        headers["Link"] = next_page(request, str(start + PAGE))
    return JSONResponse(items[start : start + PAGE], headers=headers)


def _person(user: User) -> dict[str, Any]:
    return {"user": user.name, "fullname": user.full_name or user.name, "avatarUrl": ""}


def _numbers(session: Session, viewer: Viewer, key: str) -> dict[str, int]:
    query = (
        select(Repo.type, func.count())
        .where(Repo.namespace_key == key, permissions.visible_to(session, viewer))
        .group_by(col(Repo.type))
    )
    counts = dict(session.exec(query).all())
    return {
        "numModels": counts.get(RepoType.MODEL, 0),
        "numDatasets": counts.get(RepoType.DATASET, 0),
    }
