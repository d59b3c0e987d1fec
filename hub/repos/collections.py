"""Collections: lists of repos that belong together, and who may see them.

A private one is seen by whoever sees the namespace's private repos.
An item that the viewer may not see is left out, so a public collection tells nobody of a private
repo in it, and positions are counted without it.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy import ColumnElement, and_, func, or_, true
from sqlalchemy.orm import aliased
from sqlmodel import Session, col, select

from hub.errors import CollectionNotFound
from hub.repos import permissions
from hub.repos.models import Collection, CollectionItem, Repo
from hub.users import service as users
from hub.users.names import key_of
from hub.users.service import Viewer

MAX_OF_NAMESPACE = 500
MAX_ITEMS = 500
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SLUG = re.compile(r"(?:.*-)?([0-9a-f]{24})", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Shown:
    """An item with what it stands for: a repo, or another collection."""

    item: CollectionItem
    repo: Repo | None
    child: Collection | None


def slug_of(collection: Collection) -> str:
    """`namespace/words-of-the-title-<key>`; the words change with the title."""
    plain = unicodedata.normalize("NFKD", collection.title).encode("ascii", "ignore").decode()
    words = re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")
    return f"{collection.namespace}/{words or 'collection'}-{collection.key}"


def find(session: Session, viewer: Viewer, namespace: str, slug: str) -> Collection:
    """By the key at the end of a slug, whatever words stand before it; CollectionNotFound."""
    match = _SLUG.fullmatch(slug)
    query = select(Collection).where(
        Collection.key == (match[1] if match else ""),
        Collection.namespace_key == key_of(namespace),
        _visible_to(session, viewer),
    )
    found = session.exec(query).first()
    if found is None:
        raise missing()
    return found


def listed(
    session: Session,
    viewer: Viewer,
    *,
    owners: Sequence[str] = (),
    items: Sequence[str] = (),
    search: str = "",
    limit: int,
    after: tuple[int, int] | None = None,
) -> list[Collection]:
    """Of any of the owners, with any of the items (`models/namespace/name`).

    In the order of their owner if only one is asked for, else the last changed first; `after` is
    the `place` of the last one of the page before.
    """
    query = select(Collection).where(_visible_to(session, viewer))
    if owners:
        query = query.where(col(Collection.namespace_key).in_({key_of(name) for name in owners}))
    if items:
        query = query.where(or_(*(_holds(session, viewer, item) for item in items)))
    if search:
        title, description = col(Collection.title), col(Collection.description)
        query = query.where(
            or_(
                title.icontains(search, autoescape=True),
                description.icontains(search, autoescape=True),
            )
        )
    row_id = col(Collection.id)
    if len(owners) == 1:
        order = col(Collection.position)
        if after is not None:
            beyond, same = order > after[0], order == after[0]
            query = query.where(or_(beyond, and_(same, row_id > after[1])))
        query = query.order_by(order, row_id)
    else:
        changed = col(Collection.last_updated)
        if after is not None:
            moment, last = _EPOCH + timedelta(microseconds=after[0]), after[1]
            query = query.where(or_(changed < moment, and_(changed == moment, row_id < last)))
        query = query.order_by(changed.desc(), row_id.desc())
    return list(session.exec(query.limit(limit)))


def place(collection: Collection, owners: Sequence[str]) -> tuple[int, int]:
    """Where `listed` goes on after this one."""
    if len(owners) == 1:
        return collection.position, id_of(collection)
    return (collection.last_updated - _EPOCH) // timedelta(microseconds=1), id_of(collection)


def contents(
    session: Session, viewer: Viewer, collections: Sequence[Collection], first: int = MAX_ITEMS
) -> Mapping[int, list[Shown]]:
    """By the id of each collection, the `first` items that the viewer may see, in order."""
    child = aliased(Collection)
    number = func.row_number().over(
        partition_by=col(CollectionItem.collection_id),
        order_by=(col(CollectionItem.position), col(CollectionItem.id)),
    )
    ranked = (
        select(CollectionItem.id, number.label("number"))
        .outerjoin(Repo, col(Repo.id) == col(CollectionItem.repo_id))
        .outerjoin(child, col(child.id) == col(CollectionItem.child_id))
        .where(
            col(CollectionItem.collection_id).in_([found.id for found in collections]),
            or_(
                and_(col(Repo.id).is_not(None), permissions.visible_to(session, viewer)),
                and_(col(child.id).is_not(None), _visible_to(session, viewer, child)),
            ),
        )
        .subquery()
    )
    query = (
        select(CollectionItem, Repo, child)
        .join(ranked, ranked.c.id == col(CollectionItem.id))
        .outerjoin(Repo, col(Repo.id) == col(CollectionItem.repo_id))
        .outerjoin(child, col(child.id) == col(CollectionItem.child_id))
        .where(ranked.c.number <= first)
        .order_by(ranked.c.number)
        .execution_options(populate_existing=True)
    )
    found: dict[int, list[Shown]] = {each.id or 0: [] for each in collections}
    for item, repo, nested in session.exec(query):
        found[item.collection_id].append(Shown(item, repo, nested))
    return found


def name_of(shown: Shown) -> str:
    """The name of a repo, or the slug of a collection."""
    if shown.repo is not None:
        return shown.repo.full_name
    assert shown.child is not None
    return slug_of(shown.child)


def id_of(collection: Collection) -> int:
    assert collection.id is not None
    return collection.id


def missing() -> CollectionNotFound:
    return CollectionNotFound("there is no such collection")


# Inside


def _visible_to(
    session: Session, viewer: Viewer, of: type[Collection] = Collection
) -> ColumnElement[bool]:
    keys = users.private_keys(session, viewer)
    if keys is None:
        return true()
    return or_(col(of.private).is_(False), col(of.namespace_key).in_(keys.namespaces))


def _holds(session: Session, viewer: Viewer, item: str) -> ColumnElement[bool]:
    """Whether an item that the viewer may see is in it; no collection has what is not of here."""
    kind, _, name = item.partition("/")
    query = (
        select(CollectionItem.collection_id)
        .join(Repo, col(Repo.id) == col(CollectionItem.repo_id))
        .where(
            Repo.type == kind.removesuffix("s"),
            Repo.key == key_of(name),
            permissions.visible_to(session, viewer),
        )
    )
    return col(Collection.id).in_(query)
