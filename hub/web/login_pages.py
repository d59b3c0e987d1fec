"""Signing in, out and up: pages for people who are nobody yet."""

from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Form, Request
from fastapi.responses import RedirectResponse, Response

from hub.context import DAY_S, Hub
from hub.deps import (
    SESSION_COOKIE,
    HubDep,
    Open,
    OpenForm,
    ViewerDep,
    address_of,
    public_url,
    session_cookie,
)
from hub.errors import Forbidden, HubError, InvitationNotFound, TooManyTries, Unauthorized
from hub.users import invitations, passwords, sessions, throttle
from hub.users import service as users
from hub.users.models import Organization, User
from hub.users.service import ANONYMOUS, Viewer
from hub.web.render import local, page, refused_page, viewer_of_page

router = APIRouter(include_in_schema=False, tags=["web"])

Text = Annotated[str, Form(max_length=200)]
Secret = Annotated[str, Form(max_length=1000)]
Next = Annotated[str, Form(max_length=2000)]


def begin(
    request: Request, hub: Hub, user: User, how: str, next: str, parent: Viewer | None = None
) -> Response:
    """A new login of this browser, never the one it may have had; then on to `next`."""
    with hub.db.write() as session:
        if parent is not None:
            users.recheck(session, parent)
        viewer = sessions.start(
            session,
            user,
            how=how,
            days=hub.settings.session_days,
            agent=request.headers.get("User-Agent", ""),
            address=address_of(request),
            parent=parent,
        )
    answer = RedirectResponse(local(next), HTTPStatus.SEE_OTHER)
    answer.set_cookie(
        SESSION_COOKIE,
        session_cookie(hub, viewer),
        max_age=hub.settings.session_days * DAY_S,
        httponly=True,
        samesite="lax",
        secure=public_url(request).startswith("https:"),
    )
    return answer


# In


@router.get("/login")
def login_form(request: Request, hub: HubDep, viewer: ViewerDep, next: str = "/") -> Response:
    return _login_page(request, hub, viewer, next)


@router.post("/login", dependencies=[OpenForm])
def login(
    request: Request,
    hub: HubDep,
    name: Text = "",
    password: Secret = "",
    token: Secret = "",
    next: Next = "/",
) -> Response:
    """A password or a token becomes a signed cookie."""
    token = token.strip()
    try:
        if token:
            with hub.db.read() as session:
                parent = users.viewer_of(session, token)
            return begin(request, hub, parent.require_user(), "token", next, parent)
        user = passwords.sign_in(hub.db, name.strip(), password, address_of(request))
        return begin(request, hub, user, "password", next)
    except (Unauthorized, TooManyTries) as error:
        problem = "This token is unknown, revoked or too old" if token else error.message
        return _login_page(request, hub, viewer_of_page(request), next, error, problem, name)


def _login_page(
    request: Request,
    hub: Hub,
    viewer: Viewer,
    next: str,
    error: HubError | None = None,
    problem: str | None = None,
    name: str = "",
) -> Response:
    with hub.db.read() as session:
        has_passwords = passwords.exists(session)
    return refused_page(
        request,
        "login.html",
        viewer,
        error,
        next=local(next),
        problem=problem,
        name=name,
        has_passwords=has_passwords,
        may_sign_up=hub.settings.signup,
        oidc_name=hub.settings.oidc_name if hub.settings.oidc_issuer else None,
    )


@router.post("/logout", dependencies=[Open])
def logout(hub: HubDep, viewer: ViewerDep) -> Response:
    """Ends the login itself; asking for the viewer checks where the form came from."""
    if viewer.token_id is not None:
        with hub.db.write() as session:
            sessions.end(session, viewer)
    answer = RedirectResponse("/", HTTPStatus.SEE_OTHER)
    answer.delete_cookie(SESSION_COOKIE)
    return answer


# Up


@router.get("/signup")
def signup_form(request: Request, hub: HubDep, viewer: ViewerDep) -> Response:
    _require_signup(hub)
    return page(request, "join.html", viewer, **_join(action="/signup"))


@router.post("/signup", dependencies=[OpenForm])
def signup(
    request: Request,
    hub: HubDep,
    name: Text,
    password: Secret,
    full_name: Text = "",
) -> Response:
    """An account without an invitation, where the hub's settings allow it."""
    _require_signup(hub)
    name, full_name = name.strip(), full_name.strip()
    try:
        throttle.count_try(hub.db, throttle.keys_of("/signup " + name, address_of(request)))
        passwords.check(password, name)
        hashed = passwords.hashed(password)
        with hub.db.write() as session:
            user = users.create_user(session, name, full_name=full_name)
            passwords.store(session, user, hashed)
    except HubError as error:
        context = _join(action="/signup", name=name, full_name=full_name)
        return refused_page(
            request, "join.html", ANONYMOUS, error, **context | {"problem": error.message}
        )
    return begin(request, hub, user, "sign-up", "/settings")


def _require_signup(hub: Hub) -> None:
    if not hub.settings.signup:
        raise Forbidden("this hub makes accounts by invitation only")


@router.get("/invite")
def invite_form(request: Request, hub: HubDep, code: str = "") -> Response:
    return page(request, "join.html", ANONYMOUS, **_invited(hub, code))


@router.post("/invite", dependencies=[OpenForm])
def accept(
    request: Request,
    hub: HubDep,
    code: Text,
    password: Secret,
    name: Text = "",
    full_name: Text = "",
) -> Response:
    """The link of an invitation or of a new password, used."""
    context = _invited(hub, code) | {"name": name.strip(), "full_name": full_name.strip()}
    try:
        passwords.check(password, context["resets"] or context["name"])
        hashed = passwords.hashed(password)
        with hub.db.write() as session:
            user = invitations.accept(session, code, context["name"], context["full_name"], hashed)
    except InvitationNotFound:
        raise
    except HubError as error:
        return refused_page(
            request, "join.html", ANONYMOUS, error, **context | {"problem": error.message}
        )
    return begin(request, hub, user, "invitation", "/settings")


def _invited(hub: Hub, code: str) -> dict[str, Any]:
    with hub.db.read() as session:
        row = invitations.find(session, code)
        user = session.get(User, row.user_id) if row.user_id is not None else None
        organization = (
            session.get(Organization, row.organization_id)
            if row.organization_id is not None
            else None
        )
    return _join(
        action="/invite",
        code=code,
        resets=user.name if user is not None else None,
        organization=organization.name if organization is not None else None,
        oidc_name=hub.settings.oidc_name if hub.settings.oidc_issuer and user is None else None,
    )


def _join(**known: str | None) -> dict[str, Any]:
    fields = (
        "action",
        "code",
        "resets",
        "organization",
        "name",
        "full_name",
        "problem",
        "oidc_name",
    )
    return dict.fromkeys(fields) | known
