"""Pages of collections: one with its items as cards, and the list of a namespace."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response
from sqlmodel import Session, col, select

from hub.adapters import items as catalogue
from hub.adapters.items import AdapterItem
from hub.adapters.models import Adapter, Card
from hub.deps import ReadSession, ViewerDep
from hub.repos import collections
from hub.repos.collections import Shown, slug_of
from hub.repos.models import Repo
from hub.users import service as users
from hub.users.service import Viewer
from hub.web.render import page
from hub.web.repo_head import url_of

router = APIRouter(include_in_schema=False, tags=["web"])

LISTED_NAMES = 4


@dataclass(frozen=True, slots=True)
class Line:
    """A collection in a list."""

    title: str
    url: str
    about: str
    private: bool
    last_updated: datetime


@dataclass(frozen=True, slots=True)
class Entry:
    """An item: the card of a repo that holds tensors, or name and kind of what else it is."""

    id: int
    name: str
    url: str
    kind: str
    title: str | None
    note: str | None
    card: AdapterItem | None


@router.get("/collections/{namespace}/{slug}")
def show_collection(
    request: Request, namespace: str, slug: str, session: ReadSession, viewer: ViewerDep
) -> Response:
    """The address changes with the title; older ones lead here."""
    found = collections.find(session, viewer, namespace, slug)
    address = slug_of(found)
    if address != f"{namespace}/{slug}":
        return RedirectResponse(f"/collections/{address}", 307)
    items = collections.contents(session, viewer, [found])[found.id or 0]
    return page(
        request,
        "collection.html",
        viewer,
        collection=found,
        slug=address,
        entries=_entries(session, items),
        may_change=users.may_write(session, viewer, found.namespace),
    )


def lines(session: Session, viewer: Viewer, namespace: str) -> list[Line]:
    """The collections of a namespace, in its order; one without a description names its items."""
    found = collections.listed(
        session, viewer, owners=[namespace], limit=collections.MAX_OF_NAMESPACE
    )
    first = collections.contents(session, viewer, found, LISTED_NAMES)
    return [
        Line(
            each.title,
            f"/collections/{slug_of(each)}",
            each.description or ", ".join(map(_title, first[each.id or 0])),
            each.private,
            each.last_updated,
        )
        for each in found
    ]


def _title(shown: Shown) -> str:
    if shown.repo is not None:
        return shown.repo.name
    assert shown.child is not None
    return shown.child.title


def _entries(session: Session, items: Sequence[Shown]) -> list[Entry]:
    repos = [each.repo for each in items if each.repo is not None]
    ids = [repo.id for repo in repos]
    first = select(Adapter, Repo).join(Repo, col(Repo.id) == col(Adapter.repo_id))
    first = first.where(col(Adapter.repo_id).in_(ids), Adapter.position == 0)
    rows = list(session.exec(first))
    shown = zip(rows, catalogue.items(session, rows), strict=True)
    cards = {adapter.repo_id: item for (adapter, _), item in shown}
    said = session.exec(select(Card).where(col(Card.repo_id).in_(ids)))
    titles = {card.repo_id: card.title or card.summary for card in said}
    return [entry_of(each, cards, titles) for each in items]


def entry_of(
    shown: Shown, cards: Mapping[int, AdapterItem], titles: Mapping[int, str | None]
) -> Entry:
    """`cards` and `titles` by the id of a repo."""
    number, note = shown.item.id or 0, shown.item.note
    if shown.child is not None:
        child = shown.child
        url = f"/collections/{slug_of(child)}"
        return Entry(number, child.title, url, "collection", child.description, note, None)
    assert shown.repo is not None
    repo, repo_id = shown.repo, shown.repo.id or 0
    title, card = titles.get(repo_id), cards.get(repo_id)
    return Entry(number, repo.full_name, url_of(repo), repo.type, title, note, card)
