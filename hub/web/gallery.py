"""The gallery: one card per repo, everything a person chose in the address."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode
from zlib import crc32

from fastapi import APIRouter, Request
from fastapi.responses import Response

from hub.adapters import items as catalogue
from hub.adapters import search
from hub.adapters.items import KIND_TITLES, family_title
from hub.adapters.models import Kind
from hub.adapters.routes import QueryDep
from hub.adapters.search import AdapterQuery, Sort
from hub.deps import ReadSession, ViewerDep
from hub.web.render import page

router = APIRouter(include_in_schema=False, tags=["web"])

ALGORITHM_TITLES = {
    "lora": "LoRA",
    "dora": "DoRA",
    "adalora": "AdaLoRA",
    "loha": "LoHa",
    "lokr": "LoKr",
    "glora": "GLoRA",
    "glora-paper": "GLoRA (paper)",
    "vera": "VeRA",
    "ia3": "IA³",
    "oft": "OFT",
    "boft": "BOFT",
    "hra": "HRA",
    "hira": "HiRA",
    "full": "full difference",
}
SHOWN_VALUES = 8
SORTS = (
    (Sort.RELEVANCE, "Best match"),
    (Sort.UPDATED, "Last updated"),
    (Sort.CREATED, "Newest"),
    (Sort.DOWNLOADS, "Most downloads"),
    (Sort.LIKES, "Most likes"),
    (Sort.NAME, "Name"),
    (Sort.SIZE, "Largest"),
)
_MANY = ("kind", "family", "algorithm", "tag", "not_tag")
_TITLES = {
    "kind": "Kind",
    "family": "Base model",
    "algorithm": "Algorithm",
    "tag": "Tags",
    "author": "Author",
}


@dataclass(frozen=True, slots=True)
class Value:
    """A value of a facet; `state` is "", "on" or "without", `url` leads to the other state.

    `key` names the element, so that the keyboard stays where it was when the list is replaced.
    """

    key: str
    label: str
    count: int
    state: str
    url: str
    without_url: str | None = None


@dataclass(frozen=True, slots=True)
class Group:
    title: str
    values: Sequence[Value]
    more: Sequence[Value]


@dataclass(frozen=True, slots=True)
class Chip:
    """A filter in force; `url` is the page without it."""

    label: str
    state: str
    url: str


@router.get("/")
def gallery(request: Request, session: ReadSession, viewer: ViewerDep, query: QueryDep) -> Response:
    """Search, facets and cards."""
    query = query.model_copy(update={"by_repo": True})
    found = search.search(session, viewer, query)
    chips = list(_chips(query))
    more = {"cursor": found.next_cursor}
    return page(
        request,
        "gallery.html",
        viewer,
        room="browse",
        query=query,
        hidden=list(_hidden(query)),
        search_text=query.q,
        items=catalogue.items(session, found.rows),
        total=found.total,
        facets=[group for name in _TITLES if (group := _group(query, name, found.facets[name]))],
        chips=chips,
        is_filtered=bool(chips or query.q.strip()),
        sorts=list(_sorts(query)),
        clear_url=_url({"q": query.q, "sort": query.sort}),
        more_url=_url(_parameters(query) | more) if found.next_cursor else None,
    )


def _sorts(query: AdapterQuery) -> Iterator[tuple[str, str, bool]]:
    """Value, label, whether chosen. The order nobody has to ask for has no value, so that it
    stays out of addresses and changes with the query.
    """
    default = query.model_copy(update={"sort": None}).order
    for sort, label in SORTS:
        if sort != Sort.RELEVANCE or default == Sort.RELEVANCE:
            yield "" if sort == default else sort.value, label, sort == query.order


def _parameters(query: AdapterQuery) -> dict[str, Any]:
    """What the address of this search says; a cursor belongs to one page and is left out."""
    names = ("q", *_MANY, "author", "collection", "rank_min", "rank_max", "sort")
    return {name: getattr(query, name) for name in names}


def _url(parameters: dict[str, Any]) -> str:
    given = {name: value for name, value in parameters.items() if value not in (None, "", ())}
    return "/?" + urlencode(given, doseq=True) if given else "/"


def _hidden(query: AdapterQuery) -> Iterator[tuple[str, str]]:
    """Fields that the search form sends along, so that typing keeps the filters."""
    for name in _MANY:
        yield from ((name, value) for value in getattr(query, name))
    for name in ("author", "collection"):
        if (value := getattr(query, name)) is not None:
            yield name, value


def _label(name: str, value: str) -> str:
    if name == "family":
        return family_title(value) or value
    if name == "kind" and value in set(Kind):
        return KIND_TITLES[Kind(value)]
    return ALGORITHM_TITLES.get(value, value) if name == "algorithm" else value


def _group(query: AdapterQuery, name: str, counted: list[tuple[str, int]]) -> Group | None:
    chosen = _chosen(query, name)
    known = {value for value, _ in counted}
    counted = counted + [(value, 0) for value in chosen if value not in known]
    if name == "tag":
        counted += [(value, 0) for value in query.not_tag if value not in known]
    if len(counted) < 2 and not chosen and name in ("kind", "author"):
        return None
    values = [_value(query, name, value, count) for value, count in counted]
    values.sort(key=lambda value: not value.state)
    return Group(_TITLES[name], values[:SHOWN_VALUES], values[SHOWN_VALUES:]) if values else None


def _value(query: AdapterQuery, name: str, value: str, count: int) -> Value:
    state = "on" if value in _chosen(query, name) else ""
    if name == "tag" and value in query.not_tag:
        state = "without"
    now = _parameters(query)
    without = _toggled(now, "not_tag", value) if name == "tag" and not state else None
    field = "not_tag" if state == "without" else name
    url = _url(_toggled(now, field, value))
    key = f"{name}-{crc32(value.encode()):08x}"
    return Value(key, _label(name, value), count, state, url, _url(without) if without else None)


def _chosen(query: AdapterQuery, name: str) -> tuple[str, ...]:
    if name == "author":
        return (query.author,) if query.author else ()
    chosen: tuple[str, ...] = getattr(query, name)
    return chosen


def _toggled(parameters: dict[str, Any], name: str, value: str) -> dict[str, Any]:
    if name not in _MANY:
        return parameters | {name: None if parameters[name] == value else value}
    before: tuple[str, ...] = parameters[name]
    after = tuple(v for v in before if v != value) if value in before else (*before, value)
    return parameters | {name: after}


def _chips(query: AdapterQuery) -> Iterator[Chip]:
    now = _parameters(query)
    for name in _MANY:
        for value in getattr(query, name):
            state = "without" if name == "not_tag" else "on"
            yield Chip(_label(name, value), state, _url(_toggled(now, name, value)))
    if query.author:
        yield Chip(f"by {query.author}", "on", _url(now | {"author": None}))
    if query.collection:
        # Its words, without the key at the end.
        words = query.collection.partition("/")[2].rpartition("-")[0]
        yield Chip(f"in {words or query.collection}", "on", _url(now | {"collection": None}))
    if query.rank_min is not None:
        yield Chip(f"rank ≥ {query.rank_min}", "on", _url(now | {"rank_min": None}))
    if query.rank_max is not None:
        yield Chip(f"rank ≤ {query.rank_max}", "on", _url(now | {"rank_max": None}))
