"""Lists of repos: which ones, in which order, page by page."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import and_, or_
from sqlmodel import Session, col, select

from hub.blobs.store import BlobStore
from hub.errors import BadRequest
from hub.hf.cards import card_at, card_tags
from hub.repos import permissions
from hub.repos.models import CommitEntry, Repo, RepoType
from hub.users.names import key_of
from hub.users.service import Viewer

PAGE = 200

_COUNTS = {"downloads": Repo.downloads, "likes": Repo.likes, "trendingScore": Repo.downloads}
_DATES = {"lastModified": Repo.last_modified, "createdAt": Repo.created_at}


def _order_of(query: "ListQuery") -> Any:
    """Unknown orders fall back to a default: other servers broke clients by refusing them."""
    return (_COUNTS | _DATES).get(query.sort, Repo.last_modified)


class ListQuery(BaseModel):
    """The query of a listing; what we do not know is ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    search: str | None = Field(None, max_length=256, pattern=r"^[^\x00]*$")
    author: str | None = Field(None, max_length=256, pattern=r"^[^\x00]*$")
    filter: list[str] = Field([], max_length=32)
    pipeline_tag: str | None = None
    sort: str = "lastModified"
    direction: str = "-1"
    limit: int = Field(1000, ge=1)
    full: str = ""
    cursor: str | None = Field(None, max_length=512)

    @property
    def wants_files(self) -> bool:
        return self.full.lower() in ("true", "1")

    @property
    def tags(self) -> set[str]:
        """All of them have to be there."""
        named = {tag for value in self.filter for tag in value.split(",") if tag}
        return named | ({self.pipeline_tag} if self.pipeline_tag else set())


@dataclass(frozen=True, slots=True)
class Page:
    repos: Sequence[Repo]
    tags: Mapping[int, Sequence[str]]
    cursor: str | None


def page(
    session: Session, store: BlobStore, viewer: Viewer, type: RepoType, query: ListQuery
) -> Page:
    """The next page of the repos that the viewer may see and that have every tag asked for."""
    size = min(query.limit, PAGE)
    found: list[Repo] = []
    tags: dict[int, list[str]] = {}
    cursor = query.cursor
    while len(found) < size:
        batch = _batch(session, viewer, type, query, cursor)
        for repo in batch:
            cursor = _cursor(repo, query)
            repo_tags = tags_of(session, store, repo)
            if query.tags <= set(repo_tags):
                found.append(repo)
                tags[repo.id or 0] = repo_tags
            if len(found) == size:
                break
        if len(batch) < PAGE:
            break
    more = len(found) == size and bool(_batch(session, viewer, type, query, cursor, limit=1))
    return Page(found, tags, cursor if more else None)


def tags_of(session: Session, store: BlobStore, repo: Repo) -> list[str]:
    """What the card at `main` says."""
    readme = session.get(CommitEntry, (repo.head, "README.md")) if repo.head else None
    card = card_at(store, [readme] if readme is not None else [])
    return card_tags(card) if card else []


def _batch(
    session: Session,
    viewer: Viewer,
    type: RepoType,
    query: ListQuery,
    cursor: str | None,
    limit: int = PAGE,
) -> Sequence[Repo]:
    wanted = select(Repo).where(Repo.type == type)
    if query.author:
        wanted = wanted.where(Repo.namespace_key == key_of(query.author))
    if query.search:
        wanted = wanted.where(col(Repo.key).contains(query.search.lower(), autoescape=True))
    wanted = wanted.where(permissions.visible_to(session, viewer))
    order, number = col(_order_of(query)), col(Repo.id)
    ascending = query.direction == "1"
    if cursor is not None:
        value, last = _position(cursor, query)
        beyond, after = (
            (order > value, number > last) if ascending else (order < value, number < last)
        )
        wanted = wanted.where(or_(beyond, and_(order == value, after)))
    by = (order.asc(), number.asc()) if ascending else (order.desc(), number.desc())
    return session.exec(wanted.order_by(*by).limit(limit)).all()


def _cursor(repo: Repo, query: ListQuery) -> str:
    value = getattr(repo, _order_of(query).key)
    shown = value.isoformat() if isinstance(value, datetime) else value
    text = json.dumps([shown, repo.id])
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _position(cursor: str, query: ListQuery) -> tuple[datetime | int, int]:
    """Where the last page ended; a cursor of another order fits no column of this one."""
    is_date = query.sort not in _COUNTS
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        value, number = json.loads(base64.urlsafe_b64decode(padded))
        moment = datetime.fromisoformat(value) if is_date else int(value)
        if isinstance(moment, datetime) and moment.tzinfo is None:
            raise ValueError("a time without a zone")
        if not 0 <= int(number) < 2**63 or (isinstance(moment, int) and abs(moment) >= 2**63):
            raise ValueError("no number of a database")
        return moment, int(number)
    except (ValueError, TypeError, OverflowError) as error:
        raise BadRequest("the cursor is not one of ours", "cursor") from error
