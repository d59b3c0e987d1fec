"""Health, readiness and metrics."""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from sqlalchemy import text

from hub.db import now
from hub.deps import HubDep, ViewerDep, WriteSession
from hub.errors import Forbidden

router = APIRouter(tags=["operations"])


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process is alive; nothing is read or written."""
    return {"status": "ok"}


@router.get("/readyz")
def readyz(hub: HubDep, session: WriteSession) -> Response:
    """The catalogue takes transactions and the store takes uploads; 503 otherwise."""
    session.execute(text("SELECT 1"))
    ready = hub.store.is_writable()
    body = {"ready": ready, "catalogue": True, "store": ready, "time": now().isoformat()}
    return JSONResponse(body, 200 if ready else 503)


@router.get("/metrics")
def metrics(request: Request, viewer: ViewerDep) -> PlainTextResponse:
    """In the text format of Prometheus, for an administrator's token."""
    if not viewer.require_user().is_admin:
        raise Forbidden("metrics are for administrators")
    return PlainTextResponse(request.app.state.traffic.text())
