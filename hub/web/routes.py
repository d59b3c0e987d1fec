"""The web page: rooms that belong to no single repo, and what a refusal looks like."""

from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Form, Request
from fastapi.responses import RedirectResponse, Response

from hub.context import DAY_S
from hub.deps import SESSION_COOKIE, HubDep, Open, ReadSession, ViewerDep, public_url
from hub.deps import session_cookie as make_cookie
from hub.errors import HubError, PageNotFound, Unauthorized, render
from hub.users import service as users
from hub.users.service import ANONYMOUS, Viewer
from hub.web import bench, gallery, job_pages, repo_pages, static_files
from hub.web.render import THEMES, page, viewer_of_page

router = APIRouter(include_in_schema=False, tags=["web"])

HIDDEN = (
    "It may have been moved or deleted, or it is private and you are not signed in as somebody"
    " who may see it. Nothing was changed."
)
# Heading, and what to do now.
ADVICE = {
    HTTPStatus.NOT_FOUND: ("Not here", HIDDEN),
    HTTPStatus.FORBIDDEN: (
        "Not yours to do",
        "Ask somebody of that namespace, or sign in with another token. Nothing was changed.",
    ),
    HTTPStatus.UNAUTHORIZED: ("Please sign in", "Signing in takes an access token of this hub."),
    HTTPStatus.INTERNAL_SERVER_ERROR: (
        "The hub made a mistake",
        "Its log says more. Your files are safe: nothing is changed by a page that fails.",
    ),
    HTTPStatus.SERVICE_UNAVAILABLE: ("Busy", "Reload the page in a moment."),
}
OTHER_ADVICE = ("That did not work", "Nothing was changed. Go back and try it differently.")


@router.get("/login")
def login_form(request: Request, viewer: ViewerDep, next: str = "/") -> Response:
    return page(request, "login.html", viewer, next=local(next), problem=None)


@router.post("/login", dependencies=[Open])
def login(
    request: Request,
    hub: HubDep,
    session: ReadSession,
    token: Annotated[str, Form(max_length=200)],
    next: Annotated[str, Form(max_length=2000)] = "/",
) -> Response:
    """A token becomes a signed cookie that ends with it."""
    try:
        viewer = users.viewer_of(session, token.strip())
    except Unauthorized:
        problem = "This token is unknown, revoked or too old."
        nobody = viewer_of_page(request)
        return page(request, "login.html", nobody, status=401, next=local(next), problem=problem)
    answer = RedirectResponse(local(next), HTTPStatus.SEE_OTHER)
    answer.set_cookie(
        SESSION_COOKIE,
        make_cookie(hub, viewer),
        max_age=hub.settings.session_days * DAY_S,
        httponly=True,
        samesite="lax",
        secure=public_url(request).startswith("https:"),
    )
    return answer


@router.post("/logout", dependencies=[Open])
def logout(viewer: ViewerDep) -> Response:
    """Ends the session in this browser; asking for the viewer checks where the form came from."""
    answer = RedirectResponse("/", HTTPStatus.SEE_OTHER)
    answer.delete_cookie(SESSION_COOKIE)
    return answer


@router.post("/settings/theme", dependencies=[Open])
def set_theme(
    theme: Annotated[str, Form(max_length=10)],
    next: Annotated[str, Form(max_length=2000)] = "/",
) -> Response:
    """Without script: the theme is a cookie that pages are rendered with."""
    answer = RedirectResponse(local(next), HTTPStatus.SEE_OTHER)
    if theme in THEMES:
        answer.set_cookie("theme", theme, max_age=365 * DAY_S, samesite="lax")
    return answer


def local(address: str) -> str:
    """An address of this hub, "/" for all others: nobody is sent elsewhere by a link to us.

    Browsers read "//host" and "/\\host" as another host, and drop control characters first.
    """
    is_path = address.startswith("/") and address[1:2] not in ("/", "\\")
    return address if is_path and address.isprintable() else "/"


def refusal(request: Request, error: HubError, status: HTTPStatus) -> Response:
    """A page for people; programs that ask at the same addresses get the API's body."""
    if not _is_for_people(request):
        return render(request, error, status)
    return _error_page(request, viewer_of_page(request), error.message, status)


def bug_page(request: Request) -> Response | None:
    """What people see of an error of ours; who they are is not asked, that may be what failed."""
    if not _is_for_people(request):
        return None
    status = HTTPStatus.INTERNAL_SERVER_ERROR
    return _error_page(request, ANONYMOUS, "Something here failed that should not.", status)


def _is_for_people(request: Request) -> bool:
    is_api = request.url.path.startswith("/api/")
    return not is_api and "text/html" in request.headers.get("Accept", "")


def _error_page(request: Request, viewer: Viewer, message: str, status: HTTPStatus) -> Response:
    heading, advice = ADVICE.get(status, OTHER_ADVICE)
    return page(
        request,
        "error.html",
        viewer,
        status=status,
        heading=heading,
        message=message[:1].upper() + message[1:].rstrip(".") + ".",
        advice=advice,
        offer_login=viewer.user is None and status in (401, 403, 404),
    )


catch_all = APIRouter(include_in_schema=False, tags=["web"])


@catch_all.get("/{path:path}")
def nothing_here(path: str) -> Response:
    raise PageNotFound("There is nothing at this address")


# Last of all routers: `/{namespace}/{name}` would take nearly any address.
ROUTERS = (
    static_files.router,
    gallery.router,
    router,
    job_pages.router,
    bench.router,
    repo_pages.router,
    catch_all,
)
