"""Forms that change collections, those on the page of a repo included, and the likes there."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Form, Query, Request
from fastapi.responses import Response
from sqlmodel import Session

from hub.deps import HubDep, ReadSession, WriterDep, WriteSession
from hub.errors import BadField, HubError, ItemExists
from hub.repos import collections, curation, likes, permissions
from hub.repos.collections import slug_of
from hub.repos.models import Collection, Repo, RepoType
from hub.users import service as users
from hub.users.service import Viewer
from hub.web.collection_pages import entry_of
from hub.web.login_pages import Text
from hub.web.render import refused_page, see_other
from hub.web.repo_head import DATASETS, RepoDep, url_of

router = APIRouter(include_in_schema=False, tags=["web"])

VISIBILITIES = {
    "public": "everybody who reaches this hub, without the repos in it that they may not see",
    "private": "whoever sees the private repos of its namespace",
}
Visibility = Annotated[Literal["public", "private"], Form()]
# Browsers count a line end as one character and send two.
Words = Annotated[str, Form(max_length=curation.MAX_NOTE * 2)]
Address = Annotated[str, Form(max_length=400)]


# New ones


@router.get("/collections/new")
def new(
    request: Request,
    viewer: WriterDep,
    session: ReadSession,
    namespace: Annotated[str, Query(max_length=96)] = "",
    item: Annotated[str, Query(max_length=400)] = "",
) -> Response:
    """The form; `item` is the address of a repo that will be the first in it."""
    return _new_page(request, session, viewer, namespace=namespace, item=item)


def _new_page(
    request: Request,
    session: Session,
    viewer: Viewer,
    error: HubError | None = None,
    *,
    namespace: str,
    item: str,
    title: str = "",
    description: str = "",
    visibility: str = "public",
) -> Response:
    places = users.writable_namespaces(session, viewer)
    if namespace or not places:
        namespace = namespace or viewer.require_user().name
        curation.require_keeper(session, viewer, namespace)
        places = list(dict.fromkeys([namespace, *places]))
    return refused_page(
        request,
        "collection_new.html",
        viewer,
        error,
        namespaces=[(place, place) for place in places],
        namespace=namespace,
        item=item,
        new_title=title,
        description=description,
        visibility=visibility,
        visibilities=VISIBILITIES,
        problem=error.message if error is not None else None,
    )


@router.post("/collections/new")
def create(
    request: Request,
    viewer: WriterDep,
    hub: HubDep,
    session: ReadSession,
    namespace: Text = "",
    title: Text = "",
    description: Words = "",
    visibility: Visibility = "public",
    item: Address = "",
) -> Response:
    try:
        with hub.db.write() as writing:
            made = curation.create(
                writing,
                viewer,
                namespace,
                title=title.strip(),
                description=description.strip(),
                private=visibility == "private",
            )
            if item:
                name = item.removeprefix(f"{DATASETS}/").removeprefix("/")
                type_ = RepoType.DATASET if item.startswith(f"{DATASETS}/") else RepoType.MODEL
                curation.add_repo(writing, viewer, made, type_, name)
            place = _place(made)
    except HubError as error:
        return _new_page(
            request,
            session,
            viewer,
            error,
            namespace=namespace,
            item=item,
            title=title,
            description=description,
            visibility=visibility,
        )
    return see_other(place)


# Changing one


@dataclass(frozen=True, slots=True)
class Sent:
    """What every form about one collection comes with."""

    request: Request
    viewer: WriterDep
    namespace: str
    slug: str
    hub: HubDep
    session: ReadSession


SentDep = Annotated[Sent, Depends()]


@router.get("/collections/{namespace}/{slug}/edit")
def edit(sent: SentDep) -> Response:
    """Title, description, visibility, its items and its end, on one page."""
    return _edit_page(sent)


def _edit_page(
    sent: Sent, error: HubError | None = None, notes: dict[int, str] | None = None, **typed: Any
) -> Response:
    """What was `typed`, `notes` by the id of their item, stands in the place of what is kept."""
    session, viewer = sent.session, sent.viewer
    found = collections.find(session, viewer, sent.namespace, sent.slug)
    curation.require_keeper(session, viewer, found.namespace)
    items = collections.contents(session, viewer, [found])[collections.id_of(found)]
    kept = {
        "new_title": found.title,
        "description": found.description,
        "visibility": "private" if found.private else "public",
        "colour": found.theme,
    }
    return refused_page(
        sent.request,
        "collection_edit.html",
        viewer,
        error,
        collection=found,
        place=_place(found),
        entries=[entry_of(each, {}, {}) for each in items],
        notes=notes or {},
        **kept | typed,
        colours=[(theme, theme) for theme in curation.THEMES],
        visibilities=VISIBILITIES,
        problem=error.message if error is not None else None,
    )


@router.post("/collections/{namespace}/{slug}/edit")
def change(
    sent: SentDep,
    visibility: Visibility,
    title: Text = "",
    description: Words = "",
    colour: Text = curation.THEMES[0],
) -> Response:
    def steps(writing: Session, found: Collection) -> str:
        changed = curation.change(
            writing,
            sent.viewer,
            found,
            title=title.strip(),
            description=description.strip(),
            private=visibility == "private",
            theme=colour,
        )
        return _place(changed)

    return _do(
        sent,
        steps,
        new_title=title,
        description=description,
        visibility=visibility,
        colour=colour,
    )


@router.post("/collections/{namespace}/{slug}/items/{item_id}/{turn}")
def change_item(
    sent: SentDep, item_id: int, turn: Literal["save", "up", "down", "remove"], note: Words = ""
) -> Response:
    """The note that was typed is kept, whichever button of an item is pressed."""
    words = note.replace("\r\n", "\n").strip()

    def steps(writing: Session, found: Collection) -> str:
        place = f"{_place(found)}/edit"
        if turn == "remove":
            curation.remove_item(writing, sent.viewer, found, item_id)
            return f"{place}#items"
        shown = collections.contents(writing, sent.viewer, [found])[collections.id_of(found)]
        before = next((n for n, each in enumerate(shown) if each.item.id == item_id), 0)
        position = {"save": None, "up": max(0, before - 1), "down": before + 1}[turn]
        curation.change_item(writing, sent.viewer, found, item_id, note=words, position=position)
        return f"{place}#item-{item_id}"

    return _do(sent, steps, notes={item_id: note})


@router.post("/collections/{namespace}/{slug}/delete")
def delete(sent: SentDep, confirm: Text = "") -> Response:
    """For ever, so the title has to be typed."""

    def steps(writing: Session, found: Collection) -> str:
        if confirm.strip() != found.title:
            raise BadField(f"nothing was deleted: type {found.title} to delete it", "confirm")
        curation.remove(writing, sent.viewer, found)
        return f"/{found.namespace}"

    return _do(sent, steps)


def _do(
    sent: Sent,
    steps: Callable[[Session, Collection], str],
    notes: dict[int, str] | None = None,
    **typed: Any,
) -> Response:
    """Do it and go where `steps` say; a refusal is shown with what was typed."""
    try:
        with sent.hub.db.write() as writing:
            found = collections.find(writing, sent.viewer, sent.namespace, sent.slug)
            place = steps(writing, found)
    except HubError as error:
        return _edit_page(sent, error, notes, **typed)
    return see_other(place)


# On the page of a repo


@dataclass(frozen=True, slots=True)
class Choice:
    """A collection that the viewer keeps; `has_it` if the repo is in it."""

    title: str
    slug: str
    url: str
    owner: str
    has_it: bool


def for_repo(session: Session, viewer: Viewer, repo: Repo) -> dict[str, Any]:
    """What the page of a repo offers who is signed in: to like it, and to put it somewhere."""
    if viewer.user is None or not permissions.may_participate(viewer, repo):
        return {"liked": None, "choices": None, "new_collection": None}
    liked = likes.is_liked(session, viewer, repo)
    owners = users.writable_namespaces(session, viewer)
    if not owners:
        return {"liked": liked, "choices": None, "new_collection": None}
    most = collections.MAX_OF_NAMESPACE
    mine = collections.listed(session, viewer, owners=owners, limit=most)
    item = f"{repo.type}s/{repo.full_name}"
    having = collections.listed(session, viewer, owners=owners, items=[item], limit=most)
    keys = {each.key for each in having}
    return {
        "liked": liked,
        "choices": [
            Choice(each.title, slug_of(each), _place(each), each.namespace, each.key in keys)
            for each in mine
        ],
        "new_collection": "/collections/new?" + urlencode({"item": url_of(repo)}),
    }


@router.post("/{namespace}/{name}/like")
@router.post("/datasets/{namespace}/{name}/like")
def like(
    viewer: WriterDep,
    repo: RepoDep,
    session: WriteSession,
    liked: Annotated[bool, Form()] = True,
) -> Response:
    """Like it, or with `liked=false` do not any more."""
    (likes.like if liked else likes.unlike)(session, viewer, repo)
    return see_other(url_of(repo))


@router.post("/{namespace}/{name}/collect")
@router.post("/datasets/{namespace}/{name}/collect")
def collect(
    viewer: WriterDep, repo: RepoDep, session: WriteSession, collection: Address = ""
) -> Response:
    """Put it into a collection; where it is already it stays."""
    namespace, _, slug = collection.partition("/")
    found = collections.find(session, viewer, namespace, slug)
    with suppress(ItemExists):
        curation.add_repo(session, viewer, found, RepoType(repo.type), repo.full_name)
    return see_other(url_of(repo))


def _place(collection: Collection) -> str:
    return f"/collections/{slug_of(collection)}"
