"""The catalogue over HTTP: search, details, lookup by hash, thumbnails."""

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query
from fastapi.responses import Response
from pydantic import BaseModel, BeforeValidator
from sqlmodel import Session, col, select

from hub.adapters import items as catalogue
from hub.adapters import pictures, search
from hub.adapters.items import AdapterDetails, AdapterItem, HashMatch
from hub.adapters.models import Preview
from hub.adapters.search import AdapterQuery, Sort
from hub.blobs.store import Sha256
from hub.context import Hub
from hub.deps import HubDep, ReadSession, ViewerDep
from hub.errors import EntryNotFound
from hub.repos import service as repos
from hub.repos.models import Repo

router = APIRouter(prefix="/api", tags=["adapters"])
thumbs = APIRouter(include_in_schema=False)

# A picture's address holds its digest: what is there never changes.
IMMUTABLE = "max-age=31536000, immutable"


class FacetValue(BaseModel):
    value: str
    count: int


class AdapterPage(BaseModel):
    """`total` counts all pages; `next_cursor` is null on the last one."""

    items: list[AdapterItem]
    total: int
    facets: dict[str, list[FacetValue]]
    next_cursor: str | None


class HashAnswer(BaseModel):
    """The hash as it was understood, and every file that has it."""

    hash: str
    items: list[HashMatch]


# A form sends every field, also those that nobody filled in.
Blank = BeforeValidator(lambda value: None if value == "" else value)
Rank = Annotated[int | None, Query(ge=1, lt=2**31), Blank]
Many = Annotated[list[str] | None, Query(max_length=search.MAX_VALUES)]


async def query_of(
    q: Annotated[str, Query(max_length=1000, description="words, or the start of any hash")] = "",
    kind: Many = None,
    family: Many = None,
    algorithm: Many = None,
    tag: Many = None,
    not_tag: Many = None,
    author: Annotated[str | None, Query(max_length=96), Blank] = None,
    collection: Annotated[str | None, Query(max_length=200), Blank] = None,
    rank_min: Rank = None,
    rank_max: Rank = None,
    sort: Annotated[Sort | None, Blank] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 60,
    cursor: Annotated[str | None, Query(max_length=1000), Blank] = None,
    by_repo: Annotated[bool, Query(description="one file per repo: the first match")] = False,
) -> AdapterQuery:
    """Values of one facet are alternatives; tags must all be there."""
    return AdapterQuery(
        q=q,
        kind=tuple(kind or ()),
        family=tuple(family or ()),
        algorithm=tuple(algorithm or ()),
        tag=tuple(tag or ()),
        not_tag=tuple(not_tag or ()),
        author=author,
        collection=collection,
        rank_min=rank_min,
        rank_max=rank_max,
        sort=sort,
        limit=limit,
        cursor=cursor,
        by_repo=by_repo,
    )


QueryDep = Annotated[AdapterQuery, Depends(query_of)]


@router.get("/adapters")
def list_adapters(session: ReadSession, viewer: ViewerDep, query: QueryDep) -> AdapterPage:
    """Search with facets; pages by cursor."""
    found = search.search(session, viewer, query)
    return AdapterPage(
        items=catalogue.items(session, found.rows),
        total=found.total,
        facets={
            name: [FacetValue(value=value, count=count) for value, count in values]
            for name, values in found.facets.items()
        },
        next_cursor=found.next_cursor,
    )


@router.get("/adapters/{namespace}/{name}/{file:path}")
def read_adapter(
    namespace: str, name: str, file: str, session: ReadSession, viewer: ViewerDep
) -> AdapterDetails:
    """One file at `main`: everything known of it, with sources."""
    repo = repos.get_repo(session, viewer, namespace, name)
    return catalogue.details(session, repo, file)


@router.get("/hashes/{hash}")
def find_hash(
    hash: Annotated[str, Path(max_length=100)], session: ReadSession, viewer: ViewerDep
) -> HashAnswer:
    """Every file with a hash of any kind, in any case, from its first eight digits on."""
    matches = search.by_hash(session, viewer, hash)
    found = catalogue.items(session, [(adapter, repo) for adapter, repo, _ in matches])
    return HashAnswer(
        hash=search.hash_of(hash) or hash,
        items=[
            HashMatch(kind=kind, item=item)
            for (_, _, kind), item in zip(matches, found, strict=True)
        ],
    )


@thumbs.get("/static/thumbs/{sha256}-{width}.webp")
def thumbnail(
    sha256: Annotated[str, Path(pattern="^[0-9a-f]{64}$")],
    width: int,
    hub: HubDep,
    session: ReadSession,
    viewer: ViewerDep,
) -> Response:
    """A picture of a repo the viewer may see, re-encoded."""
    is_public = _require_visible(session, viewer, sha256)
    if width not in pictures.WIDTHS:
        raise EntryNotFound(f"thumbnails are {pictures.WIDTHS} wide", "width")
    scope = "public" if is_public else "private"
    headers = {"Cache-Control": f"{scope}, {IMMUTABLE}"}
    return Response(_thumbnail(hub, sha256, width), media_type="image/webp", headers=headers)


def _require_visible(session: Session, viewer: ViewerDep, sha256: str) -> bool:
    """Whether everybody may see the picture; EntryNotFound if the viewer may not."""
    query = select(col(Repo.private)).join(Preview, col(Preview.repo_id) == col(Repo.id))
    query = query.where(Preview.sha256 == sha256, search.readable(session, viewer))
    found = session.exec(query).all()
    if not found:
        raise EntryNotFound("there is no such picture", "sha256")
    return not all(found)


def _thumbnail(hub: Hub, sha256: str, width: int) -> bytes:
    try:
        with hub.store.local(Sha256(sha256)) as source:
            return pictures.cached_thumbnail(hub.thumbs, sha256, source, width)
    except pictures.BadPicture as error:
        raise EntryNotFound(str(error), "sha256") from error
