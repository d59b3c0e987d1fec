"""Xet uploads: the token that the Hub side gives out, and the server of xorbs and shards (CAS).

Only what an upload needs. Clients read a 404 as "ask in the older way" or "not known here", and
downloads never come here, because no answer of ours offers it.
"""

import logging
import tempfile
import time
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Depends, Request, Response

from hub.deps import HubDep, Open, ReadSession, Signed, WriterDep, public_url
from hub.errors import (
    BadRequest,
    HubError,
    Invalid,
    NoSpace,
    PageNotFound,
    RepoNotFound,
    Unauthorized,
)
from hub.hf import routing
from hub.hf.commits import require_writable
from hub.hf.deps import RepoDep
from hub.hf.routing import HFRoute, hf_router
from hub.repos import permissions
from hub.repos.models import Repo
from hub.users import service as users
from hub.users.service import Viewer
from hub.xet import service
from hub.xet.hashes import XetHash, is_hash
from hub.xet.shards import MAX_SHARD_BYTES
from hub.xet.xorbs import MAX_XORB_BYTES

log = logging.getLogger(__name__)

TAG = "xet"
PURPOSE = "xet-upload"
# Clients ask for a new one before it ends; an upload may last longer.
TOKEN_S = 3600
# Shards whose files are rebuilt at the same time; each takes a core.
REBUILDS = 2

router = hf_router()
cas = APIRouter(route_class=HFRoute, tags=[TAG], include_in_schema=False, prefix="/xet/{cache}")


@router.get("/api/{kind:repos}/{namespace}/{name}/xet-write-token/{revision}")
def write_token(
    request: Request,
    response: Response,
    hub: HubDep,
    session: ReadSession,
    viewer: WriterDep,
    repo: RepoDep,
    revision: str,
    create_pr: str = "",
) -> dict[str, Any]:
    """Where this user sends what is to be committed to this repo, and with which token."""
    user = require_writable(session, viewer, repo, revision, create_pr)
    token = hub.signer.sign(PURPOSE, [viewer.token_id, repo.id, revision, create_pr])
    service.let_go(hub, user)
    with hub.db.read() as now_session:
        cache = service.cache_name(now_session, hub, user)
    address = f"{public_url(request)}/xet/{cache}"
    expires = int(time.time()) + TOKEN_S
    # Clients read one or the other, by version.
    response.headers["X-Xet-Access-Token"] = token
    response.headers["X-Xet-Token-Expiration"] = str(expires)
    response.headers["X-Xet-Cas-Url"] = address
    return {"accessToken": token, "exp": expires, "casUrl": address}


@dataclass(frozen=True, slots=True)
class Sender:
    """Who sends, and what for."""

    viewer: Viewer
    repo: Repo


def sender(request: Request, hub: HubDep) -> Sender:
    """Whose token it is, if it may still be used. Unauthorized, Forbidden, RepoNotFound."""
    token = request.headers.get("Authorization", "").removeprefix("Bearer ")
    signed = hub.signer.unsign_dated(PURPOSE, token, TOKEN_S)
    if signed is None:
        raise Unauthorized("this upload token is not valid any more")
    (token_id, repo_id, revision, create_pr), signed_at = signed
    with hub.db.read() as session:
        viewer = users.viewer_of_signed(session, token_id, signed_at)
        repo = session.get(Repo, repo_id)
        if repo is None or not permissions.may_read(session, viewer, repo):
            raise RepoNotFound("Repository not found")
        require_writable(session, viewer, repo, revision, create_pr)
    return Sender(viewer, repo)


SenderDep = Annotated[Sender, Depends(sender)]


@cas.post("/v1/xorbs/{prefix}/{xorb}", dependencies=[Signed], max_body_size=MAX_XORB_BYTES)
async def upload_xorb(
    request: Request, hub: HubDep, sender: SenderDep, xorb: str
) -> dict[str, bool]:
    """Kept once it is read to its end and is what its address says."""
    if not is_hash(xorb):
        raise BadRequest("a xorb's hash has 64 hexadecimal digits")
    announced = request.headers.get("Content-Length", "")
    size = int(announced) if announced.isdecimal() else None
    is_new = await service.receive_xorb(hub, sender.viewer, XetHash(xorb), request.stream(), size)
    return {"was_inserted": is_new}


@cas.post("/v1/shards", dependencies=[Signed], max_body_size=MAX_SHARD_BYTES)
# hf_xet 1.5, which huggingface_hub 1.20 still takes.
@cas.post("/shards", dependencies=[Signed], max_body_size=MAX_SHARD_BYTES)
async def upload_shard(request: Request, hub: HubDep, sender: SenderDep) -> dict[str, int]:
    """Answered when all its files are here; clients wait without a limit, and ask again."""
    with tempfile.TemporaryFile(dir=hub.scratch) as shard:
        async for piece in request.stream():
            await to_thread.run_sync(shard.write, piece)
        is_new = await to_thread.run_sync(
            service.register_shard,
            hub,
            sender.viewer,
            shard,
            sender.repo.namespace_key,
            limiter=request.app.state.rebuilds,
        )
    return {"result": int(is_new)}


@cas.api_route(
    "/{path:path}", methods=["GET", "HEAD", "POST", "PUT", "DELETE"], dependencies=[Open]
)
async def not_here(path: str) -> Response:
    """Newer calls, which clients do without, and whether others have sent a chunk: never told."""
    raise PageNotFound("this hub does not have this call")


def render(request: Request, error: HubError, status: HTTPStatus) -> Response:
    """As the other routes, but 400 for what stays wrong: clients repeat a 5xx for minutes.

    They show the status and not the message, so the log has it.
    """
    if isinstance(error, Invalid):
        status = HTTPStatus.BAD_REQUEST
    if isinstance(error, NoSpace):
        status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    if status in (HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE):
        log.warning("an upload over Xet was refused: %s", error.message)
    return routing.render(request, error, status)
