"""The only place where the parts of the hub are joined."""

import logging
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, nullcontext
from itertools import count
from threading import Event
from urllib.parse import urlsplit

from anyio import CapacityLimiter, Semaphore, create_task_group, sleep
from fastapi import FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.routing import RouteContext, iter_route_contexts
from starlette.concurrency import run_in_threadpool
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from hub import errors, health
from hub.adapters import routes as adapters
from hub.adapters.service import catch_up
from hub.context import Hub, open_hub
from hub.db import READERS, UNREACHABLE, why
from hub.deps import POLICIES
from hub.errors import CannotStart
from hub.hf import routes as hf_routes
from hub.hf import routing as hf
from hub.hf import xet
from hub.http import EveryResponse, Traffic
from hub.jobs import routes as jobs
from hub.jobs.dispatcher import LocalDispatcher
from hub.limits import routes as quotas
from hub.limits.rates import RateLimits
from hub.limits.slow import IdleLimit
from hub.mirror import routes as mirror_routes
from hub.mirror.service import Mirror
from hub.mirror.upstream import Upstream
from hub.reports import routes as reports
from hub.reports.pool import Pool
from hub.reports.service import Reports
from hub.settings import Settings
from hub.upkeep import sweep as upkeep
from hub.users import audit_routes as audit
from hub.users import routes as users
from hub.users.oidc import Provider, is_safe
from hub.web import routes as web
from hub.webhooks import routes as webhooks
from hub.webhooks import sending
from hub.zerocopy import ZeroCopySend

log = logging.getLogger(__name__)

ROUTERS = (
    health.router,
    users.router,
    audit.router,
    quotas.router,
    mirror_routes.router,
    adapters.router,
    adapters.thumbs,
    jobs.router,
    reports.router,
    *hf_routes.ROUTERS,
    webhooks.router,
    xet.cas,
    hf_routes.fallback,  # It answers whatever else is asked for under /api.
    *web.ROUTERS,  # Last: the page of a repo has an address of any two names.
)
COUNTS_EVERY_S = 10
SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}


def create_app(settings: Settings, *, hub: Hub | None = None) -> FastAPI:
    """The hub as an ASGI application.

    Without an opened `hub` it opens its data when it starts, not when it is made.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with nullcontext(hub) if hub is not None else open_hub(settings) as opened:
            app.state.hub = opened
            app.state.jobs = LocalDispatcher(opened, settings.workers, stopping=app.state.stopping)
            app.state.reports = Reports(Pool(opened))
            app.state.mirror = _mirror(opened)
            async with create_task_group() as background:
                background.start_soon(_count, opened)
                background.start_soon(run_in_threadpool, _catch_up, opened, app.state.stopping)
                background.start_soon(_keep_up, opened)
                background.start_soon(sending.run, opened)
                app.state.jobs.start()
                try:
                    yield
                finally:
                    await run_in_threadpool(app.state.reports.pool.stop)
                    await run_in_threadpool(app.state.jobs.stop)
                    if app.state.mirror is not None:
                        await run_in_threadpool(app.state.mirror.close)
                background.cancel_scope.cancel()

    app = FastAPI(
        title="Grafthub",
        lifespan=lifespan,
        openapi_url="/api/openapi.json",
        docs_url=None,  # Both would load scripts from a CDN.
        redoc_url=None,
    )
    app.state.traffic = Traffic()
    app.state.oidc = _provider(settings)
    app.state.readers = Semaphore(READERS)
    app.state.rebuilds = CapacityLimiter(xet.REBUILDS)
    # Set when the process is told to end: event streams and jobs end before their connections.
    app.state.stopping = Event()
    # A route that takes more says so with its own `max_body_size`.
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=settings.max_body_bytes)
    # Outermost last: the headers belong on the refusal of a wrong host too.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=_hosts(settings), www_redirect=False)
    app.add_middleware(IdleLimit, idle_s=settings.idle_s)
    app.add_middleware(
        RateLimits,
        per_token=settings.requests_per_token,
        per_address=settings.requests_per_address,
        at_once=settings.requests_at_once,
    )
    app.add_middleware(EveryResponse, traffic=app.state.traffic, bug_page=web.bug_page)
    app.add_middleware(ZeroCopySend)
    errors.install(app, renderers={hf.TAG: hf.render, xet.TAG: xet.render, "web": web.refusal})

    # As they are, not included once more: that would prepare each again, and try each twice.
    app.router.routes.extend(route for router in ROUTERS for route in router.routes)
    _require_policies(app)
    return app


def _mirror(hub: Hub) -> Mirror | None:
    url, token = hub.settings.mirror_url, hub.settings.mirror_token
    if url is None:
        return None
    return Mirror(hub, Upstream(url, token.get_secret_value() if token is not None else None))


def _provider(settings: Settings) -> Provider | None:
    """CannotStart if what is set of it does not suffice."""
    issuer, secret = settings.oidc_issuer, settings.oidc_client_secret
    if issuer is None:
        if settings.oidc_client_id is not None:
            raise CannotStart("GRAFT_OIDC_CLIENT_ID needs GRAFT_OIDC_ISSUER")
        return None
    if not is_safe(issuer):
        raise CannotStart(f"GRAFT_OIDC_ISSUER is {issuer}: an address that begins with https://")
    if settings.oidc_client_id is None:
        raise CannotStart("GRAFT_OIDC_ISSUER needs GRAFT_OIDC_CLIENT_ID")
    return Provider(issuer, settings.oidc_client_id, secret.get_secret_value() if secret else None)


def _catch_up(hub: Hub, stopping: Event) -> None:
    try:
        catch_up(hub, stopping.is_set)
    except Exception:
        # A hub with an old catalogue serves more than one that does not start.
        log.exception("the catalogue could not catch up; `graft admin reindex` makes it anew")


async def _count(hub: Hub) -> None:
    while True:
        await sleep(COUNTS_EVERY_S)
        for counted in (hub.downloads, hub.uses):
            try:
                await run_in_threadpool(counted.flush, hub.db)
            except UNREACHABLE as error:
                # The counts of these seconds are lost; the server is not to go with them.
                log.warning("the database does not take counts: %s", why(error))


async def _keep_up(hub: Hub) -> None:
    for minute in count():
        await run_in_threadpool(upkeep.keep_up, hub, minute)
        await sleep(upkeep.EVERY_S)


def mutating_routes(app: FastAPI) -> Iterator[RouteContext]:
    """Every route with a method that may change something."""
    for route in iter_route_contexts(app.routes):
        if (route.methods or set()) - SAFE_METHODS:
            yield route


def policies_of(route: RouteContext) -> set[Callable[..., object]]:
    """The policies among a route's dependencies, its router's included."""
    dependant = getattr(route, "dependant", None)
    return set() if dependant is None else {c for c in _calls(dependant) if c in POLICIES}


def _require_policies(app: FastAPI) -> None:
    for route in mutating_routes(app):
        assert policies_of(route), f"{route.methods} {route.path} names no policy, see hub/deps.py"


def _calls(dependant: Dependant) -> Iterator[Callable[..., object]]:
    if dependant.call is not None:
        yield dependant.call
    for inner in dependant.dependencies:
        yield from _calls(inner)


def _hosts(settings: Settings) -> list[str]:
    names = ["localhost", "127.0.0.1", "[::1]", settings.host, *settings.allowed_hosts]
    if settings.public_url is not None:
        names.append(urlsplit(settings.public_url).hostname or "")
    else:
        names.append(socket.gethostname())
    return [name for name in names if name and name not in ("0.0.0.0", "::")]
