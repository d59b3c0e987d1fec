"""The web page: rooms that belong to no single repo, and what a refusal looks like."""

from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Form, Request
from fastapi.responses import RedirectResponse, Response

from hub.context import DAY_S
from hub.deps import Open
from hub.errors import HubError, PageNotFound, SignInFailed, render
from hub.users.service import ANONYMOUS, Viewer
from hub.web import (
    admin_pages,
    bench,
    collection_pages,
    curation_pages,
    discussion_pages,
    gallery,
    job_pages,
    login_pages,
    oidc_pages,
    organization_pages,
    repo_pages,
    repo_settings_pages,
    settings_pages,
    static_files,
    webhook_pages,
)
from hub.web.render import THEMES, local, page, sentence, viewer_of_page

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
        "Ask somebody who may, or sign in as somebody else. Nothing was changed.",
    ),
    HTTPStatus.UNAUTHORIZED: (
        "Please sign in",
        "Then you come back here. Nothing was changed.",
    ),
    HTTPStatus.INTERNAL_SERVER_ERROR: (
        "The hub made a mistake",
        "Its log says more. Your files are safe: nothing is changed by a page that fails.",
    ),
    HTTPStatus.BAD_GATEWAY: ("No answer", "Try again in a moment, or tell who runs this hub."),
    HTTPStatus.SERVICE_UNAVAILABLE: ("Busy", "Reload the page in a moment."),
}
OTHER_ADVICE = ("That did not work", "Nothing was changed. Go back and try it differently.")


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


def refusal(request: Request, error: HubError, status: HTTPStatus) -> Response:
    """A page for people; programs that ask at the same addresses get the API's body."""
    if not _is_for_people(request):
        return render(request, error, status)
    viewer, message = viewer_of_page(request), error.message
    is_sign_in = isinstance(error, SignInFailed)
    if status == HTTPStatus.UNAUTHORIZED and viewer.user is None and not is_sign_in:
        # What is missing is said to programs in words of their own.
        message = "This is for people who are signed in"
    return _error_page(request, viewer, message, status)


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
        status_code=int(status),
        heading=heading,
        message=sentence(message),
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
    login_pages.router,
    oidc_pages.router,
    settings_pages.router,
    webhook_pages.router,
    organization_pages.router,
    admin_pages.router,
    job_pages.router,
    bench.router,
    collection_pages.router,
    curation_pages.router,
    repo_pages.router,
    discussion_pages.router,
    repo_settings_pages.router,
    catch_all,
)
