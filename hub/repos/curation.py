"""Changing collections: whoever may write to a whole namespace keeps its collections."""

import secrets
from collections.abc import Sequence
from typing import Any

from sqlalchemy import case, delete, func, update
from sqlmodel import Session, col, select

from hub.audit import record
from hub.db import now, wait_for_others
from hub.errors import (
    BadField,
    BadRequest,
    CollectionExists,
    CollectionNotFound,
    Forbidden,
    ItemExists,
    RepoNotFound,
)
from hub.repos import service as repos
from hub.repos.changes import locked
from hub.repos.collections import (
    MAX_ITEMS,
    MAX_OF_NAMESPACE,
    contents,
    find,
    id_of,
    missing,
    name_of,
    slug_of,
)
from hub.repos.models import Collection, CollectionItem, RepoType
from hub.users import service as users
from hub.users.models import User
from hub.users.names import check_namespace, key_of
from hub.users.service import Viewer

# As on huggingface.co (docs/hub/collections, and the docstrings of its client).
MAX_TITLE = 60
MAX_DESCRIPTION = 150
MAX_NOTE = 500
THEMES = ("orange", "blue", "green", "purple", "pink", "indigo")


def require_keeper(session: Session, viewer: Viewer, namespace: str) -> User:
    """Who may change the collections of a namespace; Unauthorized, Forbidden."""
    viewer = users.recheck(session, viewer)
    user = viewer.require_write()
    if not users.may_write(session, viewer, namespace):
        raise Forbidden(f"{user.name} may not change the collections of {namespace}")
    return user


def create(
    session: Session,
    viewer: Viewer,
    namespace: str,
    *,
    title: str,
    description: str | None = None,
    private: bool = False,
) -> Collection:
    """The last of its owner's. CollectionExists carries the slug of one with the same title."""
    user = require_keeper(session, viewer, check_namespace(namespace))
    canonical = users.require_namespace(session, user, namespace, "namespace")
    key = key_of(namespace)
    _wait(session, key)
    _check_title(session, key, title)
    mine = select(func.count()).where(Collection.namespace_key == key)
    if session.exec(mine).one() >= MAX_OF_NAMESPACE:
        raise BadRequest(f"{canonical} has {MAX_OF_NAMESPACE} collections, which is the most")
    last = select(func.max(Collection.position)).where(Collection.namespace_key == key)
    made = Collection(
        key=secrets.token_hex(12),
        namespace=canonical,
        namespace_key=key,
        title=title,
        description=_checked(description, MAX_DESCRIPTION, "description"),
        theme=THEMES[0],
        private=private,
        position=_after(session.exec(last).one()),
    )
    session.add(made)
    session.flush()
    record(session, user.id, "collection.create", slug_of(made))
    return made


def change(
    session: Session,
    viewer: Viewer,
    collection: Collection,
    *,
    title: str | None = None,
    description: str | None = None,
    position: int | None = None,
    private: bool | None = None,
    theme: str | None = None,
) -> Collection:
    """What is None stays; an empty description is none."""
    user, collection = _locked(session, viewer, collection)
    if title is not None and title != collection.title:
        _check_title(session, collection.namespace_key, title)
        collection.title = title
    if description is not None:
        collection.description = _checked(description, MAX_DESCRIPTION, "description")
    if theme is not None:
        if theme not in THEMES:
            raise BadField(f"theme is one of {', '.join(THEMES)}", "theme")
        collection.theme = theme
    if private is not None and private != collection.private:
        collection.private = private
        action = "collection.private" if private else "collection.public"
        record(session, user.id, action, slug_of(collection))
    _touch(session, collection)
    if position is not None:
        query = select(Collection.id).where(Collection.namespace_key == collection.namespace_key)
        order = session.exec(query.order_by(col(Collection.position), col(Collection.id))).all()
        _number(session, Collection, _moved(order, order, collection.id, position))
        session.refresh(collection)
    record(session, user.id, "collection.change", slug_of(collection))
    return collection


def remove(session: Session, viewer: Viewer, collection: Collection) -> None:
    """For ever, with its items; what they stand for stays."""
    user, collection = _locked(session, viewer, collection)
    record(session, user.id, "collection.delete", slug_of(collection))
    session.execute(delete(Collection).where(col(Collection.id) == collection.id))
    session.expunge(collection)


def add_repo(
    session: Session,
    viewer: Viewer,
    collection: Collection,
    type: RepoType,
    full_name: str,
    note: str | None = None,
) -> Collection:
    """As the last item, under its present name if it was moved; RepoNotFound, ItemExists."""
    user, collection = _locked(session, viewer, collection)
    namespace, _, name = full_name.removeprefix(f"{type}s/").partition("/")
    try:
        repo = repos.get_repo(session, viewer, namespace, name, type=type)
    except RepoNotFound:
        moved = repos.moved_to(session, viewer, namespace, name, type=type)
        if moved is None:
            raise
        repo = moved
    repo = locked(session, repo)
    _add(session, user, collection, repo.full_name, note, repo_id=repo.id)
    return collection


def add_collection(
    session: Session, viewer: Viewer, collection: Collection, slug: str, note: str | None = None
) -> Collection:
    """As the last item; CollectionNotFound, ItemExists."""
    user, collection = _locked(session, viewer, collection)
    namespace, _, words = slug.partition("/")
    child = find(session, viewer, namespace, words)
    if child.id == collection.id:
        raise BadField("a collection is no item of itself", "item.id")
    if _again(session, child, lock=True) is None:
        raise missing()
    _add(session, user, collection, slug_of(child), note, child_id=child.id)
    return collection


def change_item(
    session: Session,
    viewer: Viewer,
    collection: Collection,
    item_id: int,
    *,
    note: str | None = None,
    position: int | None = None,
) -> Collection:
    """What is None stays; `position` counts what the viewer sees. CollectionNotFound."""
    _, collection = _locked(session, viewer, collection)
    seen = [shown.item for shown in contents(session, viewer, [collection])[id_of(collection)]]
    item = next((item for item in seen if item.id == item_id), None)
    if item is None:
        raise _missing_item()
    if note is not None:
        text = _checked(note, MAX_NOTE, "note")
        _write(session, CollectionItem, [item.id], note=text)
    if position is not None:
        query = select(CollectionItem.id).where(CollectionItem.collection_id == collection.id)
        order = query.order_by(col(CollectionItem.position), col(CollectionItem.id))
        ids = [item.id for item in seen]
        moved = _moved(session.exec(order).all(), ids, item.id, position)
        _number(session, CollectionItem, moved)
    _touch(session, collection)
    return collection


def remove_item(
    session: Session, viewer: Viewer, collection: Collection, item_id: int
) -> Collection:
    """CollectionNotFound if the viewer sees no such item."""
    user, collection = _locked(session, viewer, collection)
    items = contents(session, viewer, [collection])[id_of(collection)]
    found = next((shown for shown in items if shown.item.id == item_id), None)
    if found is None:
        raise _missing_item()
    session.execute(delete(CollectionItem).where(col(CollectionItem.id) == item_id))
    _touch(session, collection)
    record(session, user.id, "collection.remove", f"{slug_of(collection)}: {name_of(found)}")
    return collection


# Inside


def _missing_item() -> CollectionNotFound:
    return CollectionNotFound("this collection has no such item")


def _locked(session: Session, viewer: Viewer, seen: Collection) -> tuple[User, Collection]:
    """Who may change it, and the row as it is now; CollectionNotFound, Forbidden."""
    _wait(session, seen.namespace_key)
    user = require_keeper(session, viewer, seen.namespace)
    found = _again(session, seen)
    if found is None:
        raise missing()
    return user, found


def _wait(session: Session, namespace_key: str) -> None:
    """All that is written about the collections of one namespace is written one by one."""
    wait_for_others(session.connection(), f"collections {namespace_key}")


def _again(session: Session, seen: Collection, *, lock: bool = False) -> Collection | None:
    query = select(Collection).where(Collection.id == seen.id)
    query = query.with_for_update() if lock else query
    return session.exec(query.execution_options(populate_existing=True)).first()


def _check_title(session: Session, namespace_key: str, title: str) -> None:
    if not 1 <= len(title) <= MAX_TITLE or not title.isprintable() or title != title.strip():
        raise BadField(f"a title has 1 to {MAX_TITLE} printable characters", "title")
    query = select(Collection).where(
        Collection.namespace_key == namespace_key, Collection.title == title
    )
    present = session.exec(query).first()
    if present is not None:
        raise CollectionExists("there is a collection of that title already", slug_of(present))


def _checked(text: str | None, limit: int, field: str) -> str | None:
    if text is not None and len(text) > limit:
        raise BadField(f"a {field} has at most {limit} characters", field)
    return text or None


def _add(
    session: Session,
    user: User,
    collection: Collection,
    name: str,
    note: str | None,
    *,
    repo_id: int | None = None,
    child_id: int | None = None,
) -> None:
    items = select(CollectionItem).where(CollectionItem.collection_id == collection.id)
    present = session.exec(items.order_by(col(CollectionItem.position))).all()
    if any((item.repo_id, item.child_id) == (repo_id, child_id) for item in present):
        raise ItemExists(f"{name} is in this collection already", "item")
    if len(present) >= MAX_ITEMS:
        raise BadRequest(f"a collection has at most {MAX_ITEMS} items")
    made = CollectionItem(
        collection_id=id_of(collection),
        repo_id=repo_id,
        child_id=child_id,
        position=_after(present[-1].position if present else None),
        note=_checked(note, MAX_NOTE, "note"),
    )
    session.add(made)
    _touch(session, collection)
    record(session, user.id, "collection.add", f"{slug_of(collection)}: {name}")


def _after(last: int | None) -> int:
    return 0 if last is None else last + 1


def _touch(session: Session, collection: Collection) -> None:
    collection.last_updated = now()
    session.add(collection)
    session.flush()


def _moved(
    order: Sequence[int | None], seen: Sequence[int | None], moved: int | None, position: int
) -> list[int | None]:
    """`order` with `moved` at a position among those that are `seen`; beyond the end is the end."""
    others = [each for each in seen if each != moved]
    rest = [each for each in order if each != moved]
    place = rest.index(others[position]) if position < len(others) else len(rest)
    return [*rest[:place], moved, *rest[place:]]


def _number(
    session: Session,
    table: type[Collection] | type[CollectionItem],
    order: Sequence[int | None],
) -> None:
    places = {row_id: position for position, row_id in enumerate(order)}
    _write(session, table, order, position=case(places, value=col(table.id)))


def _write(
    session: Session,
    table: type[Collection] | type[CollectionItem],
    ids: Sequence[int | None],
    **values: Any,
) -> None:
    """Not through the session's own rows: some may be deleted with their repo at this moment."""
    session.execute(
        update(table)
        .where(col(table.id).in_(ids))
        .values(**values)
        .execution_options(synchronize_session=False)
    )
