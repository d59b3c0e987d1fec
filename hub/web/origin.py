"""How a file was made, from what its own header says: recipe, certificate, and the files before it.

The hub adds where those files are, as far as the viewer may read them, and what was made of this one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, ValidationError
from sqlmodel import Session, col, select

from hub.adapters.items import AdapterDetails
from hub.adapters.models import Adapter
from hub.jobs import lineage
from hub.jobs.models import Edge
from hub.reports.service import MAX_INPUTS
from hub.repos import permissions
from hub.repos.models import Repo
from hub.users.service import Viewer
from hub.web.bench_state import METHODS, Bench, Row
from hub.web.render import percent
from merge.errors import MergeError
from merge.formats import metadata as names
from merge.lineage import History, read_history
from merge.recipe import Input, Recipe, Source

_MADE = {"merge": "Merged", "bake": "Baked", "extract": "Extracted", "resize": "Resized"}
_MAX_NODES = 60
_MAX_CHILDREN = 8
_MAX_TITLE = 24
_MAX_MODULES = 8
NODE_WIDTH, NODE_HEIGHT = 176, 46
_ACROSS, _DOWN = 240, 62


@dataclass(frozen=True, slots=True)
class Ingredient:
    """One file that it was made of; `url` where the viewer can go there."""

    title: str
    url: str | None
    sha256: str
    part: str
    modules: int | None


@dataclass(frozen=True, slots=True)
class Node:
    """A file in the graph, with the corner of its box."""

    title: str
    detail: str
    url: str | None
    x: int
    y: int
    is_this: bool


@dataclass(frozen=True, slots=True)
class Line:
    """From a file to what was made of it; `label` is its part, at (x, y)."""

    path: str
    label: str
    x: int
    y: int


@dataclass(frozen=True, slots=True)
class Graph:
    nodes: tuple[Node, ...]
    lines: tuple[Line, ...]
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Origin:
    """What the page shows; `problem` where the header contradicts itself, and then nothing else."""

    problem: str | None = None
    is_refined: bool = False
    summary: str = ""
    ingredients: tuple[Ingredient, ...] = ()
    figures: tuple[tuple[str, str], ...] = ()
    worst: tuple[tuple[str, str], ...] = ()
    digest: str = ""
    verify: str = ""
    bench_url: str | None = None
    graph: Graph | None = None


def origin(
    session: Session, viewer: Viewer, adapter: AdapterDetails, *, is_part: bool
) -> Origin | None:
    """None for a file that says nothing of how it was made and that nothing was made of.

    `is_part`: of a pipeline or a model, which a bake makes as a whole.
    """
    places = _Places(session, viewer)
    try:
        history = read_history(adapter.metadata, adapter.file)
    except MergeError as error:
        return Origin(problem=str(error))
    graph = _graph(adapter, history, places)
    if history is None:
        return Origin(graph=graph) if graph is not None else None
    recipe, certificate = history.recipe, _Certificate.of(adapter.metadata)
    return Origin(
        is_refined=any(map(_is_refined, recipe.inputs)),
        summary=_summary(recipe),
        ingredients=tuple(islice(_ingredients(recipe, certificate, places), _MAX_NODES)),
        figures=tuple(_figures(certificate)),
        worst=tuple(_worst(certificate)),
        digest=recipe.digest(),
        verify=f"graft verify {adapter.repo}{'' if is_part else f':{adapter.file}'}",
        bench_url=_bench_url(recipe, places),
        graph=graph,
    )


class _Module(BaseModel):
    model_config = ConfigDict(frozen=True)

    norm: float = 0.0
    rank: int | None = None
    truncation: float = 0.0


class _Certificate(BaseModel):
    """What we show of one; whoever wrote the file may have written anything."""

    model_config = ConfigDict(frozen=True)

    error: float | None = None
    truncation: float | None = None
    rounding: float | None = None
    dtype: str = ""
    engine: str = ""
    left_out: list[str] = []
    coverage: dict[str, list[int]] = {}
    modules: dict[str, _Module] = {}

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> "_Certificate":
        """An empty one where there is none, or none that we can read."""
        try:
            return cls.model_validate_json(metadata.get(names.GRAFT_CERTIFICATE, "{}"))
        except ValidationError:
            return cls()


class _Places:
    """Where a file is on this hub for this viewer: title and address, by SHA-256."""

    def __init__(self, session: Session, viewer: Viewer) -> None:
        self._session, self._viewer = session, viewer
        self._known: dict[str, tuple[str, str, str] | None] = {}

    def find(self, sha256: str) -> tuple[str, str, str] | None:
        """(title, address, REF), or None."""
        if sha256 not in self._known:
            self._known[sha256] = self._of_file(sha256) or self._of_folder(sha256)
        return self._known[sha256]

    def title(self, sha256: str) -> str:
        found = self.find(sha256)
        return found[0] if found is not None else f"{sha256[:10]}…"

    def url(self, sha256: str) -> str | None:
        found = self.find(sha256)
        return found[1] if found is not None else None

    def children(self, sha256: str) -> Sequence[Edge]:
        """What was made of it, newest first, each file once."""
        edges = lineage.children(self._session, self._viewer, sha256)
        return list({edge.child_sha256: edge for edge in reversed(edges)}.values())[::-1]

    def _of_file(self, sha256: str) -> tuple[str, str, str] | None:
        query = (
            select(Adapter, Repo)
            .join(Repo, col(Repo.id) == col(Adapter.repo_id))
            .where(Adapter.sha256 == sha256, permissions.visible_to(self._session, self._viewer))
            .order_by(col(Adapter.id))
        )
        row = self._session.exec(query).first()
        if row is None:
            return None
        adapter, repo = row
        url = f"/{repo.full_name}?file={quote(adapter.path)}"
        return adapter.title, url, f"{repo.full_name}:{adapter.path}"

    def _of_folder(self, digest: str) -> tuple[str, str, str] | None:
        """A folder is no file of the catalogue; only lineage knows its digest."""
        query = select(Edge.parent_repo_id).where(Edge.parent_sha256 == digest)
        made = select(Edge.child_repo_id).where(Edge.child_sha256 == digest)
        for repo_id in [*self._session.exec(query), *self._session.exec(made)]:
            repo = self._session.get(Repo, repo_id) if repo_id is not None else None
            if repo is not None and permissions.may_read(self._session, self._viewer, repo):
                return repo.full_name, f"/{repo.full_name}", repo.full_name
        return None


def _summary(recipe: Recipe) -> str:
    n = len(recipe.inputs)
    what = f"from {n} {'adapter' if n == 1 else 'adapters'}"
    if recipe.kind == "extract":
        what = "from what separates a checkpoint from its base"
    if recipe.kind == "bake":
        what = f"{n} {'adapter' if n == 1 else 'adapters'} into a base"
    method = recipe.method.model_dump(exclude_none=True)
    name = method.pop("name")
    chosen = ", ".join(f"{field.replace('_', ' ')} {value}" for field, value in method.items())
    how = f" by {METHODS[name][0]}" if name != "linear" else ""
    words = f"{_MADE[recipe.kind]} {what}{how}{f' ({chosen})' if chosen else ''}"
    if recipe.kind == "bake":
        return f"{words}."
    (rank, value), *_ = recipe.rank.model_dump(exclude_none=True).items()
    return f"{words}, {_RANKS[rank].format(value=value)}."


_RANKS = {
    "exact": "with nothing cut",
    "fixed": "at rank {value}",
    "energy": "keeping {value:.4g} of the energy",
    "budget_bytes": "within {value:,} bytes",
    "shared": "at ranks that share the size of rank {value}",
}


def _sources(recipe: Recipe) -> Iterator[tuple[Source, str]]:
    """Every source with its part, inputs in the canonical order that a certificate uses."""
    if recipe.base is not None:
        yield recipe.base, "base"
    if recipe.tuned is not None:
        yield recipe.tuned, "tuned"
    for i in recipe.in_canonical_order():
        source = recipe.inputs[i]
        yield source, f"{source.strength:g}{'*' if _is_refined(source) else ''}"
        if source.vectors is not None:
            yield source.vectors, "vectors"


def _is_refined(source: Input) -> bool:
    return bool(source.components or source.blocks or source.only or source.leave_out)


def _ingredients(
    recipe: Recipe, certificate: _Certificate, places: _Places
) -> Iterator[Ingredient]:
    counts = [sum(column) for column in zip(*certificate.coverage.values(), strict=False)]
    numbers = iter(counts)
    for source, part in _sources(recipe):
        sha256 = source.sha256 or ""
        modules = next(numbers, None) if isinstance(source, Input) else None
        yield Ingredient(places.title(sha256), places.url(sha256), sha256, part, modules)


def _figures(certificate: _Certificate) -> Iterator[tuple[str, str]]:
    if certificate.error is not None:
        yield percent(certificate.error), "away from the exact result"
    if certificate.truncation is not None and certificate.rounding is not None:
        yield percent(certificate.truncation), "lost by cutting to the chosen rank"
        yield percent(certificate.rounding), "lost by rounding to the stored precision"
    if certificate.left_out:
        yield f"{len(certificate.left_out):,}", "modules left out, as the recipe allows"
    if certificate.engine:
        yield certificate.engine, "version of the engine that made it"


def _worst(certificate: _Certificate) -> Iterator[tuple[str, str]]:
    """The modules that lost most, where any lost what one could see."""
    order = sorted(certificate.modules.items(), key=lambda item: -item[1].truncation)
    for name, module in order[:_MAX_MODULES]:
        if module.truncation > 1e-4:
            yield name, percent(module.truncation)


def _bench_url(recipe: Recipe, places: _Places) -> str | None:
    """The same merge on the bench, if all of it can stand there."""
    is_plain = not any(_is_refined(source) or source.vectors for source in recipe.inputs)
    is_small = len(recipe.inputs) <= MAX_INPUTS
    if recipe.kind != "merge" or recipe.base is not None or not is_plain or not is_small:
        return None
    found = [places.find(source.sha256 or "") for source in recipe.inputs]
    if None in found:
        return None
    method = recipe.method.model_dump(exclude_none=True)
    (rank, value), *_ = recipe.rank.model_dump(exclude_none=True).items()
    shown = {name: str(v).lower() if isinstance(v, bool) else str(v) for name, v in method.items()}
    bench = Bench(
        rows=tuple(
            Row(place[2], f"{source.strength:g}")
            for source, place in zip(recipe.inputs, found, strict=True)
            if place is not None
        ),
        method=shown.pop("name"),
        parameters=shown,
        rank=rank,
        amount="" if rank == "exact" else f"{value}",
    )
    return bench.address()


def _graph(adapter: AdapterDetails, history: History | None, places: _Places) -> Graph | None:
    """Left to right: what it was made of, the file itself, what was made of it."""
    made = dict(history.parents) if history is not None else {}
    if history is not None:
        made[adapter.sha256] = history.recipe
    depths: dict[str, int] = {}
    _descend(adapter.sha256, 0, made, depths)
    children = places.children(adapter.sha256)[:_MAX_CHILDREN]
    if len(depths) == 1 and not children:
        return None
    deepest = max(depths.values())
    columns = {sha256: deepest - depth for sha256, depth in depths.items()}
    columns |= {edge.child_sha256: deepest + 1 for edge in children}
    spots = _spots(columns)
    details = {sha256: _detail(recipe) for sha256, recipe in made.items()}
    nodes = [
        Node(
            _short(adapter.title if sha256 == adapter.sha256 else places.title(sha256)),
            details.get(sha256, "" if places.url(sha256) else "not on this hub"),
            None if sha256 == adapter.sha256 else places.url(sha256),
            *spot,
            sha256 == adapter.sha256,
        )
        for sha256, spot in spots.items()
    ]
    lines = [
        _line(spots[source.sha256 or ""], spots[sha256], part)
        for sha256, recipe in made.items()
        if sha256 in spots
        for source, part in _sources(recipe)
        if source.sha256 in spots
    ]
    lines += [
        _line(spots[adapter.sha256], spots[edge.child_sha256], _of_edge(edge)) for edge in children
    ]
    width = max(x for x, _ in spots.values()) + NODE_WIDTH + 2
    height = max(y for _, y in spots.values()) + NODE_HEIGHT + 2
    return Graph(tuple(nodes), tuple(lines), width, height)


def _descend(sha256: str, depth: int, made: Mapping[str, Recipe], depths: dict[str, int]) -> None:
    """The longest way from the result to every file it was made of; hashes cannot form a ring."""
    if depths.get(sha256, -1) >= depth or (sha256 not in depths and len(depths) >= _MAX_NODES):
        return
    depths[sha256] = depth
    if sha256 in made and depth < _MAX_NODES:
        for source, _ in _sources(made[sha256]):
            _descend(source.sha256 or "", depth + 1, made, depths)


def _spots(columns: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Corners of the boxes: every column in the middle of the tallest."""
    held: dict[int, list[str]] = {}
    for sha256, column in columns.items():
        held.setdefault(column, []).append(sha256)
    tallest = max(map(len, held.values()))
    return {
        sha256: (column * _ACROSS + 1, (tallest - len(its)) * _DOWN // 2 + n * _DOWN + 1)
        for column, its in held.items()
        for n, sha256 in enumerate(its)
    }


def _line(start: tuple[int, int], end: tuple[int, int], label: str) -> Line:
    x1, y1 = start[0] + NODE_WIDTH, start[1] + NODE_HEIGHT // 2
    x2, y2 = end[0], end[1] + NODE_HEIGHT // 2
    middle = (x1 + x2) // 2
    path = f"M{x1} {y1}C{middle} {y1} {middle} {y2} {x2} {y2}"
    return Line(path, label, middle, (y1 + y2) // 2 - 3)


def _detail(recipe: Recipe) -> str:
    name = recipe.method.model_dump()["name"]
    return recipe.kind if name == "linear" else f"{recipe.kind}, {METHODS[name][0]}"


def _of_edge(edge: Edge) -> str:
    return f"{edge.strength:g}" if edge.strength is not None else edge.relation


def _short(title: str) -> str:
    return title if len(title) <= _MAX_TITLE else title[: _MAX_TITLE - 1] + "…"
