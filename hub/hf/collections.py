"""Collections, as huggingface_hub calls them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from fastapi import Depends, Query, Request, Response
from fastapi.responses import JSONResponse
from sqlmodel import Session, col, select

from hub.deps import ReadSession, ViewerDep, WriterDep, WriteSession, public_url
from hub.errors import CollectionExists, CollectionNotFound, NotImplementedHere
from hub.hf import bodies, info
from hub.hf.routing import hf_router, next_page
from hub.repos import collections, curation
from hub.repos.collections import Shown, slug_of
from hub.repos.models import Collection, RepoType
from hub.users.models import Organization, User
from hub.users.service import Viewer

COLLECTIONS = "/api/collections"
ONE = COLLECTIONS + "/{namespace}/{slug}"
ITEM = ONE + "/items/{item_id}"
PAGE = 100
# As on huggingface.co; `get_collection` has all of them.
LISTED_ITEMS = 4

router = hf_router()

Names = Annotated[list[Annotated[str, Query(max_length=256)]], Query(max_length=32)]


@router.get(COLLECTIONS)
def listed(
    request: Request,
    session: ReadSession,
    viewer: ViewerDep,
    owner: Names = [],  # noqa: B006 - FastAPI copies it
    item: Names = [],  # noqa: B006
    q: Annotated[str, Query(max_length=256)] = "",
    limit: Annotated[int, Query(ge=1)] = PAGE,
    cursor: Annotated[str | None, Query(pattern=r"^[0-9]{1,16}-[0-9]{1,16}$")] = None,
) -> Response:
    """In pages, each collection with its first items; nobody votes here, so `sort` is ignored."""
    size = min(limit, PAGE)
    after = None
    if cursor is not None:
        first, _, second = cursor.partition("-")
        after = int(first), int(second)
    found = collections.listed(
        session, viewer, owners=owner, items=item, search=q, limit=size + 1, after=after
    )
    headers = {}
    if len(found) > size:
        order, last = collections.place(found[size - 1], owner)
        headers["Link"] = next_page(request, f"{order}-{last}")
    answers = _answers(session, viewer, found[:size], public_url(request), LISTED_ITEMS)
    # Clients number them themselves.
    return JSONResponse(
        [{k: v for k, v in each.items() if k != "position"} for each in answers], headers=headers
    )


@router.post(COLLECTIONS)
def create(
    request: Request, session: WriteSession, viewer: WriterDep, body: bodies.NewCollection
) -> Response:
    """409 carries the slug of the one that is there: with `exists_ok` clients go on with it."""
    if body.resourceGroupId is not None:
        raise NotImplementedHere("this hub has no resource groups")
    try:
        made = curation.create(
            session,
            viewer,
            body.namespace or viewer.require_user().name,
            title=body.title,
            description=body.description,
            private=body.private,
        )
    except CollectionExists as error:
        headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
        return JSONResponse({"error": error.message, "slug": error.slug}, 409, headers)
    return JSONResponse(_answer(request, session, viewer, made))


def _collection(session: ReadSession, viewer: ViewerDep, namespace: str, slug: str) -> Collection:
    return collections.find(session, viewer, namespace, slug)


CollectionDep = Annotated[Collection, Depends(_collection)]


@router.get(ONE)
def get(
    request: Request, session: ReadSession, viewer: ViewerDep, collection: CollectionDep
) -> dict[str, Any]:
    return _answer(request, session, viewer, collection)


@router.patch(ONE)
def change(
    request: Request,
    session: WriteSession,
    viewer: WriterDep,
    collection: CollectionDep,
    body: bodies.ChangedCollection,
) -> dict[str, Any]:
    """Only what is named; a new title changes the slug, and the old one leads here too."""
    changed = curation.change(
        session,
        viewer,
        collection,
        title=body.title,
        description=body.description,
        position=body.position,
        private=body.private,
        theme=body.theme,
    )
    return {"success": True, "data": _answer(request, session, viewer, changed)}


@router.delete(ONE)
def delete(session: WriteSession, viewer: WriterDep, collection: CollectionDep) -> dict[str, Any]:
    curation.remove(session, viewer, collection)
    return {"success": True}


@router.post(ONE + "/items")
def add(
    request: Request,
    session: WriteSession,
    viewer: WriterDep,
    collection: CollectionDep,
    body: bodies.NewCollectionItem,
) -> dict[str, Any]:
    """A repo or a collection that the caller sees, as the last item."""
    match body.item.type:
        case "collection":
            changed = curation.add_collection(session, viewer, collection, body.item.id, body.note)
        case "model" | "dataset":
            type = RepoType(body.item.type)
            changed = curation.add_repo(session, viewer, collection, type, body.item.id, body.note)
        case other:
            raise NotImplementedHere(
                f"this hub has no {other}s: a collection holds models, datasets and collections"
            )
    return _answer(request, session, viewer, changed)


async def _item_id(item_id: str) -> int:
    if not re.fullmatch("[0-9a-f]{24}", item_id):
        raise CollectionNotFound("this collection has no such item")
    return int(item_id, 16)


ItemDep = Annotated[int, Depends(_item_id)]


@router.patch(ITEM)
def change_item(
    request: Request,
    session: WriteSession,
    viewer: WriterDep,
    collection: CollectionDep,
    item: ItemDep,
    body: bodies.ChangedCollectionItem,
) -> dict[str, Any]:
    changed = curation.change_item(
        session, viewer, collection, item, note=body.note, position=body.position
    )
    return {"success": True, "data": _answer(request, session, viewer, changed)}


@router.delete(ITEM)
def delete_item(
    session: WriteSession, viewer: WriterDep, collection: CollectionDep, item: ItemDep
) -> dict[str, Any]:
    curation.remove_item(session, viewer, collection, item)
    return {"success": True}


# Answers


def _answer(
    request: Request, session: Session, viewer: Viewer, collection: Collection
) -> dict[str, Any]:
    return _answers(session, viewer, [collection], public_url(request))[0]


def _answers(
    session: Session,
    viewer: Viewer,
    found: Sequence[Collection],
    base: str,
    first: int = collections.MAX_ITEMS,
) -> list[dict[str, Any]]:
    items = collections.contents(session, viewer, found, first)
    shown = [each.child for of_one in items.values() for each in of_one if each.child is not None]
    owners = _owners(session, [*found, *shown])
    return [
        {
            **_head(each, owners, base),
            "position": each.position,
            "private": each.private,
            "gating": False,
            "isUpvotedByUser": False,
            "items": [
                _item(item, position, owners, base)
                for position, item in enumerate(items[each.id or 0])
            ],
        }
        for each in found
    ]


def _head(
    collection: Collection, owners: Mapping[str, dict[str, Any]], base: str
) -> dict[str, Any]:
    """What is said of a collection wherever it is shown."""
    slug = slug_of(collection)
    head = {
        "slug": slug,
        "title": collection.title,
        "lastUpdated": info.date(collection.last_updated),
        "owner": owners[collection.namespace_key],
        "theme": collection.theme,
        "upvotes": 0,
        "shareUrl": f"{base}/collections/{slug}",
    }
    return (
        head if collection.description is None else head | {"description": collection.description}
    )


def _item(
    shown: Shown, position: int, owners: Mapping[str, dict[str, Any]], base: str
) -> dict[str, Any]:
    if shown.repo is not None:
        about = info.repo_summary(shown.repo, ())
        about |= {"type": shown.repo.type, "repoType": shown.repo.type}
    else:
        assert shown.child is not None
        about = _head(shown.child, owners, base)
        about |= {"id": shown.child.key, "type": "collection"}
    about |= {"_id": f"{shown.item.id:024x}", "position": position}
    return about if shown.item.note is None else about | {"note": {"text": shown.item.note}}


def _owners(session: Session, found: Iterable[Collection]) -> dict[str, dict[str, Any]]:
    keys = {each.namespace_key for each in found}
    people = session.exec(select(User).where(col(User.key).in_(keys)))
    groups = session.exec(select(Organization).where(col(Organization.key).in_(keys)))
    owners = {owner.key: _owner(owner, "user") for owner in people}
    return owners | {owner.key: _owner(owner, "org") for owner in groups}


def _owner(owner: User | Organization, type: str) -> dict[str, Any]:
    return {
        "_id": f"{owner.id:024x}",
        "name": owner.name,
        "fullname": owner.full_name or owner.name,
        "type": type,
        "avatarUrl": "",
    }
