"""Reports over HTTP: nothing is written, so nobody needs a token for what everybody may read."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from hub.deps import HubDep, Open, ViewerDep
from hub.reports import service
from hub.reports.service import Reports, Wanted

router = APIRouter(prefix="/api", tags=["jobs"])


class ReportRequest(BaseModel):
    """What to measure."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: dict[str, Any] = Field(description="of a merge, a bake or a resize; docs/merging.md")


@router.post("/reports", dependencies=[Open], response_model=dict[str, Any])
async def create_report(
    request: Request, hub: HubDep, viewer: ViewerDep, body: ReportRequest
) -> Response:
    """What a merge would do, as docs/reports.md explains it; nothing is written."""
    wanted = await run_in_threadpool(service.prepare, hub, viewer, body.recipe)
    return Response(await measure(request, wanted), media_type="application/json")


async def measure(request: Request, wanted: Wanted) -> bytes:
    """The report as JSON, for as long as the caller waits and the hub does not stop."""
    state = request.app.state
    reports: Reports = state.reports

    async def is_gone() -> bool:
        return state.stopping.is_set() or await request.is_disconnected()

    return await reports.measure(wanted, is_gone)
