"""What routes ask for by type: the hub, a session, who is asking, and the right to write.

Every route that changes something names its policy: `WriterDep`, `AccountDep`, `AdminDep`, or one
of `Open`, `OpenForm` and `Signed` as a dependency; `hub.app` refuses to start otherwise.

A dependency that waits for nobody is `async`: the others run in threads, and going to one and back
takes longer than most of them.
"""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import nullcontext
from typing import Annotated
from urllib.parse import urlsplit

from anyio import to_thread
from fastapi import Depends, Request
from fastapi.concurrency import contextmanager_in_threadpool
from sqlmodel import Session

from hub.context import DAY_S, Hub
from hub.errors import Forbidden, Unauthorized
from hub.limits.rates import ACCEPTED
from hub.users import service as users
from hub.users.service import ANONYMOUS, Viewer

SESSION_COOKIE = "graft_session"
_SAFE = ("GET", "HEAD", "OPTIONS")


def hub_of(request: Request) -> Hub:
    hub: Hub = request.app.state.hub
    return hub


async def _hub(request: Request) -> Hub:
    return hub_of(request)


HubDep = Annotated[Hub, Depends(_hub)]


async def _read(request: Request, hub: HubDep) -> AsyncIterator[Session]:
    if hub.db.is_sqlite:
        # With a thread and a connection for each of many readers all become several times slower.
        # Who may wait for the writer, or for another hub, would keep the readers waiting.
        may_wait = request.method not in _SAFE or request.app.state.mirror is not None
        # Nothing begins before the first statement, and the end of a snapshot waits for nobody.
        async with nullcontext() if may_wait else request.app.state.readers:
            with hub.db.read() as session:
                yield session
    else:
        async with contextmanager_in_threadpool(hub.db.read()) as session:
            yield session


def _write(hub: HubDep) -> Iterator[Session]:
    with hub.db.write() as session:
        yield session


# "function": the transaction ends before the response begins, so a failed commit is a 500.
ReadSession = Annotated[Session, Depends(_read, scope="function")]
# The writer is taken by the first statement. Use it in the route's own body only, never in another
# dependency: a request that held it between two threads could wait for those that wait for it.
WriteSession = Annotated[Session, Depends(_write, scope="function")]


def viewer(request: Request, hub: HubDep) -> Viewer:
    """From `Authorization: Bearer`, else from the signed cookie; an invalid token is refused."""
    scheme, _, secret = request.headers.get("Authorization", "").partition(" ")
    if scheme:
        if scheme.lower() != "bearer":
            raise Unauthorized("Invalid credentials in Authorization header")
        with hub.db.read() as session:
            found = users.viewer_of(session, secret.strip())
        setattr(request.state, ACCEPTED, True)
    else:
        found = _of_cookie(request, hub)
    hub.uses.note(found.token_id)
    return found


async def _viewer(request: Request, hub: HubDep) -> Viewer:
    if not request.headers.get("Authorization") and SESSION_COOKIE not in request.cookies:
        return ANONYMOUS
    if hub.db.is_sqlite:  # One row by its index: going to a thread and back takes longer.
        return viewer(request, hub)
    return await to_thread.run_sync(viewer, request, hub)


ViewerDep = Annotated[Viewer, Depends(_viewer)]


async def writer(viewer: ViewerDep) -> Viewer:
    viewer.require_write()
    return viewer


# A viewer whose token may write; whether also here is the service's question.
WriterDep = Annotated[Viewer, Depends(writer)]


async def account(viewer: WriterDep) -> Viewer:
    viewer.require_account()
    return viewer


# A viewer who may change their own account: tokens, password, organisations.
AccountDep = Annotated[Viewer, Depends(account)]


async def administrator(viewer: WriterDep) -> Viewer:
    viewer.require_admin()
    return viewer


# An administrator of the hub, with a token that says so.
AdminDep = Annotated[Viewer, Depends(administrator)]


async def open_to_all() -> None:
    """Policy of a route that changes nothing, or only the caller's own cookie."""


async def open_form(request: Request) -> None:
    """Policy of a form for people who are not signed in: another site's page cannot send it."""
    if "Origin" in request.headers:
        _require_same_origin(request)


async def signed_address() -> None:
    """Policy of a route whose address carries a signature that the route checks."""


Open = Depends(open_to_all)
OpenForm = Depends(open_form)
Signed = Depends(signed_address)
POLICIES: tuple[Callable[..., object], ...] = (
    writer,
    open_to_all,
    open_form,
    signed_address,
)


def public_url(request: Request) -> str:
    """How the caller reaches this hub, without a final slash; the Host was checked before."""
    configured = hub_of(request).settings.public_url
    return (configured or str(request.base_url)).rstrip("/")


def address_of(request: Request) -> str:
    """Where a request comes from; a proxy on this machine says it in X-Forwarded-For."""
    return request.client.host if request.client is not None else ""


def session_cookie(hub: Hub, viewer: Viewer) -> str:
    """The value of the web page's cookie; it dies with the row that `viewer.token_id` names."""
    return hub.signer.sign("session", viewer.token_id)


def _of_cookie(request: Request, hub: Hub) -> Viewer:
    cookie = request.cookies.get(SESSION_COOKIE)
    if cookie is None:
        return ANONYMOUS
    signed = hub.signer.unsign_dated("session", cookie, hub.settings.session_days * DAY_S)
    if signed is None:
        return ANONYMOUS
    if request.method not in _SAFE:
        _require_same_origin(request)
    with hub.db.read() as session:
        try:
            return users.viewer_of_signed(session, *signed)
        except Unauthorized:
            return ANONYMOUS


def _require_same_origin(request: Request) -> None:
    # A cookie is sent by any page the browser shows; the Origin says which page asked.
    origin = request.headers.get("Origin")
    if origin is None or urlsplit(origin)[:2] != urlsplit(public_url(request))[:2]:
        raise Forbidden("this request did not come from a page of this hub")
