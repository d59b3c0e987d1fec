"""Search, facets and lookup by hash over what a viewer may see."""

import base64
import binascii
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import (
    ColumnElement,
    Select,
    Subquery,
    and_,
    distinct,
    exists,
    func,
    literal,
    or_,
    select,
)
from sqlalchemy.orm import aliased
from sqlmodel import Session, col

from hub.adapters import text
from hub.adapters.models import Adapter, HashAlias, Tag
from hub.errors import BadField, HashNotFound
from hub.repos import collections, permissions
from hub.repos.models import CollectionItem, Repo, RepoType
from hub.users.names import key_of
from hub.users.service import Viewer

MAX_FACET_VALUES = 30
MAX_VALUES = 32
_HASH = re.compile(r"[0-9a-f]{8,64}")


class Sort(StrEnum):
    """How results are ordered; `relevance` needs a query and is then the default."""

    RELEVANCE = "relevance"
    UPDATED = "updated"
    CREATED = "created"
    DOWNLOADS = "downloads"
    LIKES = "likes"
    NAME = "name"
    SIZE = "size"


Values = tuple[str, ...]


class AdapterQuery(BaseModel):
    """What a person asked for. Values of one facet are alternatives; tags must all be there."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    q: str = Field("", max_length=1000, description="words, or the start of any hash")
    kind: Values = Field((), max_length=MAX_VALUES)
    family: Values = Field((), max_length=MAX_VALUES)
    algorithm: Values = Field((), max_length=MAX_VALUES)
    tag: Values = Field((), max_length=MAX_VALUES)
    not_tag: Values = Field((), max_length=MAX_VALUES)
    author: str | None = Field(None, max_length=96)
    collection: str | None = Field(None, max_length=200, description="slug of one to search in")
    rank_min: int | None = Field(None, ge=1, le=2**31 - 1)
    rank_max: int | None = Field(None, ge=1, le=2**31 - 1)
    sort: Sort | None = None
    limit: int = Field(60, ge=1, le=200)
    cursor: str | None = Field(None, max_length=1000)
    by_repo: bool = Field(False, description="one file per repo: the first that matches")

    @property
    def order(self) -> Sort:
        """The order in force."""
        has_words = bool(text.words_of(self.q)) and hash_of(self.q) is None
        if self.sort is None or (self.sort == Sort.RELEVANCE and not has_words):
            return Sort.RELEVANCE if has_words else Sort.UPDATED
        return self.sort


@dataclass(frozen=True, slots=True)
class Found:
    """One page: rows in order, how many there are in all, values of each facet with counts."""

    rows: Sequence[tuple[Adapter, Repo]]
    total: int
    facets: dict[str, list[tuple[str, int]]]
    next_cursor: str | None


def search(session: Session, viewer: Viewer, query: AdapterQuery) -> Found:
    """Files (or repos, `by_repo`) that match, and what else could be asked.

    BadField (cursor), CollectionNotFound.
    """
    conditions = _conditions(session, viewer, query)
    matching = _matching(session, query, [c for _, c in conditions]).subquery()
    total = session.execute(
        select(_count(query, matching.c.repo_id)).select_from(matching)
    ).scalar_one()
    rows, last = _page(session, query, matching)
    facets = {name: _facet(session, query, conditions, name) for name in _FACETS}
    return Found(rows, total, facets, None if last is None else _cursor(query, *last))


def by_hash(session: Session, viewer: Viewer, text_of_hash: str) -> list[tuple[Adapter, Repo, str]]:
    """Every file that has the hash, with the kind that matched; HashNotFound, BadField.

    Any kind, any case, with or without a "sha256:" or "0x" before it, from its first 8 digits on.
    """
    value = hash_of(text_of_hash)
    if value is None:
        raise BadField("a hash is 8 to 64 hexadecimal digits", "hash")
    query = (
        select(Adapter, Repo, col(HashAlias.kind))
        .join(Repo, col(Repo.id) == col(Adapter.repo_id))
        .join(HashAlias, col(HashAlias.sha256) == col(Adapter.sha256))
        .where(visible(session, viewer), _alias(value))
        .order_by(col(Repo.key), col(Adapter.position), col(HashAlias.kind).desc())
        .limit(1000)
    )
    best: dict[int | None, tuple[Adapter, Repo, str]] = {}
    for adapter, repo, kind in session.execute(query):
        best.setdefault(adapter.id, (adapter, repo, kind))
    if not best:
        raise HashNotFound(f"no file here has the hash {value}", "hash")
    return list(best.values())


def hash_of(query: str) -> str | None:
    """The hash in lower case, if the whole query is one."""
    value = re.sub(r"^(?:0x|(?:sha256|blake3|crc32|autov[123])\s*:\s*)", "", query.strip().lower())
    return value if _HASH.fullmatch(value) else None


def visible(session: Session, viewer: Viewer) -> ColumnElement[bool]:
    """Condition on `repo`: a model repo that this viewer may read."""
    return and_(col(Repo.type) == RepoType.MODEL, readable(session, viewer))


def readable(session: Session, viewer: Viewer) -> ColumnElement[bool]:
    """Condition on `repo`: one of any type that this viewer may read."""
    return permissions.visible_to(session, viewer)


# Inside

# Tags that tell tools how to load a repo: searchable, but no choice a person makes.
TOOL_TAGS = ("diffusers", "lora", "peft", "safetensors", "text-to-image", "transformers")
TOOL_TAG_PREFIXES = ("base_model:", "license:", "template:")


def is_tool_tag(name: str) -> bool:
    """Whether a tag tells tools how to load a repo, and people nothing."""
    return name in TOOL_TAGS or name.startswith(TOOL_TAG_PREFIXES)


# Not the table itself, which the conditions on tags look into.
_Chosen = aliased(Tag)
_IS_CHOICE = and_(
    col(_Chosen.name).not_in(TOOL_TAGS),
    *(~col(_Chosen.name).startswith(prefix, autoescape=True) for prefix in TOOL_TAG_PREFIXES),
)

_FACETS = ("kind", "family", "algorithm", "tag", "author")
Conditions = list[tuple[str, ColumnElement[bool]]]


def _conditions(session: Session, viewer: Viewer, query: AdapterQuery) -> Conditions:
    """Each with the facet it belongs to, so that a facet's counts can leave out its own."""
    found: Conditions = [("", visible(session, viewer))]
    for name in ("kind", "family", "algorithm"):
        if values := getattr(query, name):
            found.append((name, getattr(Adapter, name).in_(values)))
    found += [("tag", _has_tag(tag)) for tag in query.tag]
    found += [("not_tag", ~_has_tag(tag)) for tag in query.not_tag]
    if query.author is not None:
        found.append(("author", col(Repo.namespace_key) == key_of(query.author)))
    if query.collection is not None:
        namespace, _, slug = query.collection.partition("/")
        within = collections.find(session, viewer, namespace, slug)
        packed = select(col(CollectionItem.repo_id)).where(
            col(CollectionItem.collection_id) == within.id
        )
        found.append(("collection", col(Repo.id).in_(packed)))
    if query.rank_min is not None:
        found.append(("rank", col(Adapter.rank_max) >= query.rank_min))
    if query.rank_max is not None:
        found.append(("rank", col(Adapter.rank_min) <= query.rank_max))
    return found


def _has_tag(tag: str) -> ColumnElement[bool]:
    return exists().where(col(Tag.repo_id) == col(Adapter.repo_id), col(Tag.name) == tag.lower())


def _alias(value: str) -> ColumnElement[bool]:
    """Aliases that begin with the value; a CRC32 also with its bytes turned round (Civitai)."""
    alias = col(HashAlias.value)
    # "g" follows the last hexadecimal digit, so this is one range of the index.
    found = and_(alias >= value, alias < f"{value}g")
    if len(value) == 8:
        turned = bytes.fromhex(value)[::-1].hex()
        found = or_(found, and_(col(HashAlias.kind) == "crc32", alias == turned))
    return found


def _matching(
    session: Session, query: AdapterQuery, conditions: Sequence[ColumnElement[bool]]
) -> Select[Any]:
    """id, repo_id, position and relevance of the files that match."""
    words, value = text.words_of(query.q), hash_of(query.q)
    nothing = literal(0).label("relevance")
    columns: list[Any] = [Adapter.id, Adapter.repo_id, Adapter.position]
    base = select(*columns)
    base = base.join(Repo, col(Repo.id) == col(Adapter.repo_id)).where(*conditions)
    if value is not None:
        aliased = select(col(HashAlias.sha256)).where(_alias(value))
        return base.where(col(Adapter.sha256).in_(aliased)).add_columns(nothing)
    if words:
        hits = text.matches(session, words).subquery()
        return base.join(hits, hits.c.id == col(Adapter.id)).add_columns(hits.c.relevance)
    if query.q.strip():
        # Nothing but punctuation: there is no such word.
        base = base.where(col(Adapter.id).is_(None))
    return base.add_columns(nothing)


def _count(query: AdapterQuery, repo_id: Any) -> Any:
    return func.count(distinct(repo_id)) if query.by_repo else func.count()


def _page(
    session: Session, query: AdapterQuery, matching: Subquery
) -> tuple[list[tuple[Adapter, Repo]], tuple[Any, int] | None]:
    """Files with their repos, and where the next page begins, if there is one."""
    # The database says where: its lower() of a title is not Python's.
    key = _sort_key(query.order, matching)
    chosen: Select[Any] = select(Adapter, Repo, key)
    chosen = chosen.join(matching, matching.c.id == col(Adapter.id))
    chosen = chosen.join(Repo, col(Repo.id) == col(Adapter.repo_id))
    if query.by_repo:
        first = (
            select(matching.c.repo_id, func.min(matching.c.position).label("position"))
            .group_by(matching.c.repo_id)
            .subquery()
        )
        on = and_(first.c.repo_id == matching.c.repo_id, first.c.position == matching.c.position)
        chosen = chosen.join(first, on)
    is_rising = query.order == Sort.NAME
    if query.cursor is not None:
        value, last_id = _read_cursor(query)
        after, same = (key > value, key == value) if is_rising else (key < value, key == value)
        tie = col(Adapter.id) > last_id if is_rising else col(Adapter.id) < last_id
        chosen = chosen.where(or_(after, and_(same, tie)))
    order = (key, col(Adapter.id)) if is_rising else (key.desc(), col(Adapter.id).desc())
    found = session.execute(chosen.order_by(*order).limit(query.limit + 1))
    rows = [(row[0], row[1], row[2]) for row in found]
    shown = [(adapter, repo) for adapter, repo, _ in rows[: query.limit]]
    if len(rows) <= query.limit:
        return shown, None
    adapter, _, value = rows[query.limit - 1]
    return shown, (value, adapter.id)


def _sort_key(sort: Sort, matching: Subquery) -> Any:
    keys: dict[Sort, Any] = {
        Sort.RELEVANCE: matching.c.relevance,
        Sort.UPDATED: col(Repo.last_modified),
        Sort.CREATED: col(Repo.created_at),
        Sort.DOWNLOADS: col(Repo.downloads),
        Sort.LIKES: col(Repo.likes),
        Sort.NAME: func.lower(col(Adapter.title)),
        Sort.SIZE: col(Adapter.size),
    }
    return keys[sort]


def _cursor(query: AdapterQuery, value: Any, last_id: int) -> str:
    if isinstance(value, datetime):
        value = value.isoformat()
    packed = json.dumps([query.order, value, last_id], ensure_ascii=False)
    return base64.urlsafe_b64encode(packed.encode()).decode().rstrip("=")


def _read_cursor(query: AdapterQuery) -> tuple[Any, int]:
    assert query.cursor is not None
    try:
        packed = base64.b64decode(query.cursor + "=" * (-len(query.cursor) % 4), altchars=b"-_")
        order, value, last_id = json.loads(packed)
        if order != query.order or type(last_id) is not int or abs(last_id) >= 2**63:
            raise ValueError
        if order in (Sort.UPDATED, Sort.CREATED):
            moment = datetime.fromisoformat(value)
            if moment.tzinfo is None:
                raise ValueError
            return moment, last_id
        if type(value) is not (str if order == Sort.NAME else int):
            raise ValueError
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError
        return value, last_id
    except (ValueError, TypeError, binascii.Error):
        raise BadField("this cursor is not one of this search", "cursor") from None


def _facet(
    session: Session, query: AdapterQuery, conditions: Conditions, name: str
) -> list[tuple[str, int]]:
    """Values with counts, most frequent first. Tags narrow each other, other values widen."""
    others = [c for facet, c in conditions if facet != name or name == "tag"]
    count = _count(query, col(Adapter.repo_id))
    column: Any
    statement: Select[Any] = _matching(session, query, others)
    if name == "tag":
        column = col(_Chosen.name)
        statement = statement.join(_Chosen, col(_Chosen.repo_id) == col(Adapter.repo_id))
        statement = statement.where(_IS_CHOICE)
    else:
        column = col(Repo.namespace) if name == "author" else col(getattr(Adapter, name))
    # The columns alone change: every file that matches is still one row.
    counted: Select[Any] = statement.with_only_columns(column, count, maintain_column_froms=True)
    counted = counted.where(column.is_not(None)).group_by(column)
    rows = session.execute(counted.order_by(count.desc(), column).limit(MAX_FACET_VALUES))
    return [(row[0], row[1]) for row in rows]
