"""The bench: adapters side by side, what their merge would do, and the button that makes it.

Everything works as a plain form; with script the report follows while one moves a slider.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

from fastapi import APIRouter, Query, Request
from fastapi.responses import RedirectResponse, Response
from sqlmodel import Session
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import ImmutableMultiDict, QueryParams

from hub.adapters import items as catalogue
from hub.adapters import search
from hub.adapters.items import AdapterItem
from hub.adapters.models import Kind
from hub.adapters.search import AdapterQuery, Sort
from hub.context import Hub
from hub.deps import HubDep, ReadSession, ViewerDep, WriterDep
from hub.errors import HubError, NotFound, status_of
from hub.jobs import service as jobs
from hub.jobs.models import Job, JobKind
from hub.jobs.schemas import JobRequest, Publish
from hub.reports import routes as reports
from hub.reports import service
from hub.repos import service as repos
from hub.users.service import Viewer
from hub.web import bench_state
from hub.web.bench_state import Bench, Row
from hub.web.gallery import ALGORITHM_TITLES
from hub.web.render import page, part
from hub.web.report_view import ReportView, view
from merge.errors import BadRecipe, MergeError
from merge.recipe import Recipe

router = APIRouter(include_in_schema=False, tags=["web"])

N_OFFERED = 40
_FORM = {"ref", "drop", "amount"}  # fields of a form, which an address does not have
_COOKIE, _MAX_COOKIE = "bench", 3500
_REPO = re.compile(r"(?P<namespace>[^/@:]+)/(?P<name>[^/@:]+)(:(?P<file>.+))?")
_NOT_NAMES = re.compile(r"[^a-z0-9]+")


@dataclass(frozen=True, slots=True)
class Problem:
    """Why this is not possible, in words of the page."""

    message: str

    @classmethod
    def of(cls, error: HubError | MergeError, bench: Bench) -> "Problem":
        if not isinstance(error, BadRecipe):
            return cls(str(error))
        where = bench.named(error.param)
        return cls(f"{where}: {error.detail}" if where else error.detail)


@dataclass(frozen=True, slots=True)
class Shown:
    """An adapter on the bench; `item` is None where the catalogue has none of this name."""

    row: Row
    item: AdapterItem | None
    text_encoders: tuple[str, ...]

    @property
    def title(self) -> str:
        return self.item.title if self.item is not None else self.row.ref

    @property
    def algorithm(self) -> str | None:
        name = self.item.algorithm if self.item is not None else None
        return ALGORITHM_TITLES.get(name, name) if name is not None else None


@router.get("/bench")
async def show_bench(
    request: Request, hub: HubDep, viewer: ViewerDep, report: str | None = None
) -> Response:
    """The bench; with `report` also what a merge would do, for browsers without script.

    What a form sent becomes an address that can be shared, and an empty one the bench as it was left.
    """
    fields = request.query_params
    bench = bench_state.read(fields if fields else _left(request))
    if not fields and bench.rows:
        return _kept(RedirectResponse(bench.address(), 303), bench)
    if report is None and _FORM & set(fields):
        return RedirectResponse(bench.address(), 303)
    shown, offered = await run_in_threadpool(_look_up, hub, viewer, bench)
    measured = await _measured(request, hub, viewer, bench, shown) if report is not None else None
    return _kept(_page(request, viewer, bench, shown, offered, measured), bench)


@router.get("/bench/add")
def add(request: Request, ref: str = Query(max_length=bench_state.MAX_TEXT)) -> Response:
    """Put one more adapter on the bench as it was left; from a list one stays where one is."""
    bench = bench_state.read(_left(request)).with_adapter(ref)
    if "HX-Request" not in request.headers:
        return _kept(RedirectResponse(bench.address(), 303), bench)
    n = len(bench.rows)
    words = f"On the bench with {n - 1} more" if n > 1 else "On the bench"
    answer = Response(status_code=204, headers={"HX-Trigger": json.dumps({"said": words})})
    return _kept(answer, bench)


@router.get("/bench/report")
async def show_report(request: Request, hub: HubDep, viewer: ViewerDep) -> Response:
    """The report alone, for the page to put in its place."""
    bench = bench_state.read(request.query_params)
    shown, _ = await run_in_threadpool(_look_up, hub, viewer, bench)
    measured = await _measured(request, hub, viewer, bench, shown)
    answer = part("bench_report.html", measured=measured, is_update=True, **_handy(bench, shown))
    answer.headers["HX-Replace-Url"] = bench.address()
    return _kept(answer, bench)


@router.get("/bench/adapters")
def offer_adapters(
    session: ReadSession, viewer: ViewerDep, add: str = Query("", max_length=200), family: str = ""
) -> Response:
    """What the field for one more adapter offers while somebody types."""
    return part("bench_offers.html", offered=_offers(session, viewer, add, family))


@router.post("/bench/merge")
async def merge(request: Request, hub: HubDep, viewer: WriterDep) -> Response:
    """Start the merge and go to its job; a refusal leaves the bench as it was."""
    return await _start(request, hub, viewer, JobKind.MERGE)


@router.post("/bench/bake")
async def bake(request: Request, hub: HubDep, viewer: WriterDep) -> Response:
    """Write the adapters into the base that the bench names."""
    return await _start(request, hub, viewer, JobKind.BAKE)


async def _start(request: Request, hub: Hub, viewer: Viewer, kind: JobKind) -> Response:
    fields = ImmutableMultiDict((await request.form()).multi_items())
    bench = bench_state.read(fields)
    shown, offered = await run_in_threadpool(_look_up, hub, viewer, bench)
    try:
        job = await run_in_threadpool(_submit, hub, viewer, kind, bench, shown)
    except (HubError, MergeError) as error:
        status = status_of(type(error)) if isinstance(error, HubError) else 422
        problem = Problem.of(error, bench)
        return _page(request, viewer, bench, shown, offered, None, problem=problem, status=status)
    request.app.state.jobs.offer()
    return RedirectResponse(f"/jobs/{job.id}", 303)


def _submit(hub: Hub, viewer: Viewer, kind: JobKind, bench: Bench, shown: Sequence[Shown]) -> Job:
    repo, path = _target(viewer, bench, shown)
    # As the engine decides it: PEFT's own names, which adapters of no family we know have.
    is_folder = bench.dialect == "peft" or not (bench.dialect or _family(shown))
    if kind == JobKind.BAKE:
        is_folder = ":" not in bench.base
    publish = Publish(repo=repo, path=None if is_folder else path)
    request = JobRequest(recipe=bench.recipe(_encoders(shown), kind), publish=publish)
    return jobs.submit(hub, viewer, (kind,), request)


async def _measured(
    request: Request, hub: Hub, viewer: Viewer, bench: Bench, shown: Sequence[Shown]
) -> ReportView | Problem | None:
    """None while there is nothing on the bench."""
    if not bench.rows:
        return None
    # On a base also what a bake into it loses; a merge takes one only where its inputs need it.
    document = bench.recipe(_encoders(shown), "bake" if bench.base else "merge")
    try:
        wanted = await run_in_threadpool(service.prepare, hub, viewer, document)
        report = json.loads(await reports.measure(request, wanted))
    except (HubError, MergeError) as error:
        return Problem.of(error, bench)
    return view(report, [one.title for one in shown], bench)


def _page(
    request: Request,
    viewer: Viewer,
    bench: Bench,
    shown: Sequence[Shown],
    offered: Sequence[AdapterItem],
    measured: ReportView | Problem | None,
    *,
    problem: Problem | None = None,
    status: int = 200,
) -> Response:
    repo, path = _target(viewer, bench, shown)
    return page(
        request,
        "bench.html",
        viewer,
        status=status,
        room="bench",
        bench=bench,
        shown=shown,
        offered=offered,
        family=_family(shown),
        methods=bench_state.METHODS,
        ranks=bench_state.RANKS,
        dialects=bench_state.DIALECTS,
        dtypes=bench_state.DTYPES,
        measured=measured,
        problem=problem,
        repo=repo,
        path=path,
        is_update=False,
        **_handy(bench, shown),
    )


def _handy(bench: Bench, shown: Sequence[Shown]) -> dict[str, Any]:
    """What people take along: the recipe, and the same strengths for a prompt."""
    prompt = " ".join(f"<lora:{_stem(one)}:{one.row.strength}>" for one in shown)
    return {"recipe_text": _recipe_text(bench, shown), "prompt": prompt}


def _look_up(
    hub: Hub, viewer: Viewer, bench: Bench
) -> tuple[Sequence[Shown], Sequence[AdapterItem]]:
    with hub.db.read() as session:
        shown = [_shown(session, viewer, row) for row in bench.rows]
        return shown, _offers(session, viewer, "", _family(shown))


def _shown(session: Session, viewer: Viewer, row: Row) -> Shown:
    match = _REPO.fullmatch(row.ref)
    if match is None:
        return Shown(row, None, ())
    try:
        repo = repos.get_repo(session, viewer, match["namespace"], match["name"])
        files = [item.file for item in catalogue.of_repo(session, repo)]
        found = catalogue.details(session, repo, match["file"] or (files[0] if files else ""))
    except NotFound:
        return Shown(row, None, ())
    parts: dict[str, Any] = next((f.value for f in found.facts if f.name == "components"), {})
    return Shown(row, found, tuple(name for name in parts if name.startswith("text_encoder")))


def _offers(session: Session, viewer: Viewer, words: str, family: str) -> Sequence[AdapterItem]:
    query = AdapterQuery(
        q=words,
        kind=(Kind.ADAPTER.value,),
        family=(family,) if family else (),
        sort=None if words else Sort.DOWNLOADS,
        limit=N_OFFERED,
    )
    return catalogue.items(session, search.search(session, viewer, query).rows)


def _family(shown: Sequence[Shown]) -> str:
    """Of the first adapter that has one: the others have to fit it."""
    known = (one.item.family for one in shown if one.item is not None and one.item.family)
    return next(known, "")


def _encoders(shown: Sequence[Shown]) -> Mapping[str, tuple[str, ...]]:
    return {one.row.ref: one.text_encoders for one in shown}


def _target(viewer: Viewer, bench: Bench, shown: Sequence[Shown]) -> tuple[str, str]:
    """Where the result goes: as said, else into a repo named after what it is made of."""
    stems = [_NOT_NAMES.sub("-", _stem(one).lower()).strip("-") for one in shown]
    name = "-".join(stem for stem in stems if stem)[:60].strip("-") or "merged"
    owner = viewer.user.name if viewer.user is not None else ""
    return bench.repo or (f"{owner}/{name}" if owner else ""), bench.path or f"{name}.safetensors"


def _stem(one: Shown) -> str:
    """The name a person knows a file by: its own, or its repo's where the file's says nothing."""
    file = one.item.file.rpartition("/")[2] if one.item is not None else ""
    stem = file.removesuffix(".safetensors")
    says_nothing = stem in ("", "adapter_model", "pytorch_lora_weights", "model")
    return one.row.ref.partition(":")[0].rpartition("/")[2] if says_nothing else stem


def _recipe_text(bench: Bench, shown: Sequence[Shown]) -> str:
    """For `graft recipe run`; nothing while it would be refused."""
    if not bench.rows:
        return ""
    try:
        return Recipe.parse(bench.recipe(_encoders(shown))).to_yaml()
    except MergeError:
        return ""


def _left(request: Request) -> QueryParams:
    """The bench as this browser last saw it."""
    return QueryParams(unquote(request.cookies.get(_COOKIE, "")))


def _kept(answer: Response, bench: Bench) -> Response:
    """The answer, and a cookie by which the bench is found again."""
    query = quote(bench.address().partition("?")[2])
    if query and len(query) <= _MAX_COOKIE:
        answer.set_cookie(_COOKIE, query, httponly=True, samesite="lax")
    else:
        answer.delete_cookie(_COOKIE)
    return answer
