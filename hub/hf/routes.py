"""The routers of the façade, in the order in which `hub.app` includes them."""

from typing import Any

from fastapi import APIRouter, Request, Response

from hub.deps import Open
from hub.errors import NotImplementedHere, RepoNotFound
from hub.hf import (
    access,
    collections,
    commits,
    discussions,
    files,
    history,
    lfs,
    lfs_parts,
    repos,
    shards,
    social,
    xet,
)
from hub.hf.routing import hf_router

PARTS = (
    *(repos, access, social, collections, history, discussions),
    *(commits, lfs, lfs_parts, xet, shards, files),
)

router = APIRouter()
ROUTERS = (*(part.router for part in PARTS), router)

# Included after every other router: what nobody answers under /api.
fallback = hf_router()


@router.get("/api/agent-harnesses", include_in_schema=False)
async def agent_harnesses() -> dict[str, Any]:
    """Asked once a day after an answer, by every process without one."""
    return {"standardEnvVars": [], "harnesses": {}}


@router.head("/api/telemetry/{path:path}", include_in_schema=False)
async def telemetry(path: str) -> Response:
    """Nothing is kept."""
    return Response()


# One name alone, as "gpt2" on huggingface.co: no repo of ours, and clients know what that means.
# Methods of the routes that would take the second word for a name.
@fallback.api_route(
    "/api/{kind:repos}/{name}", methods=["GET", "PUT", "POST", "DELETE"], dependencies=[Open]
)
@fallback.api_route(
    "/api/{kind:repos}/{name}/{what:of_repo}",
    methods=["GET", "PUT", "POST", "DELETE"],
    dependencies=[Open],
)
@fallback.api_route(
    "/api/{kind:repos}/{name}/{what:of_repo}/{rest:path}",
    methods=["GET", "PUT", "POST", "DELETE"],
    dependencies=[Open],
)
@fallback.head("/{name}/resolve/{revision}/{path:path}")
async def no_namespace(request: Request, name: str) -> Response:
    raise RepoNotFound(f"{name[:96]}: repos are called namespace/name")


@fallback.api_route(
    "/api/{path:path}",
    methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"],
    dependencies=[Open],
)
async def not_here(request: Request, path: str) -> Response:
    """501: clients print the message and do not try again."""
    raise NotImplementedHere(f"this hub does not have {request.method} /api/{path}"[:200])
