"""One's own account: password, access tokens, logins."""

from datetime import timedelta
from typing import Annotated

from fastapi import APIRouter, Form, Request
from fastapi.responses import Response

from hub.context import Hub
from hub.db import now
from hub.deps import AccountDep, HubDep, ViewerDep, address_of
from hub.errors import BadField, HubError
from hub.users import identities, passwords, throttle
from hub.users import service as users
from hub.users.models import Scope, TokenKind
from hub.users.service import Viewer
from hub.web.login_pages import Secret, Text, begin
from hub.web.oidc_pages import link_address
from hub.web.render import refused_page, see_other

router = APIRouter(prefix="/settings", include_in_schema=False, tags=["web"])

LIFETIMES = {"30": "30 days", "90": "90 days", "365": "a year", "": "no end"}
SCOPES = {
    Scope.READ: "what you may see, private repos too",
    Scope.WRITE: "also publish, and ask for jobs",
    Scope.ADMIN: "also manage your account, tokens and organisations",
}


# Account


@router.get("")
def account(request: Request, hub: HubDep, viewer: ViewerDep) -> Response:
    return _account_page(request, hub, viewer)


def _account_page(
    request: Request, hub: Hub, viewer: Viewer, error: HubError | None = None
) -> Response:
    with hub.db.read() as session:
        user = users.find_user(session, viewer.require_user().name)
        return refused_page(
            request,
            "settings_account.html",
            viewer,
            error,
            tab="account",
            manages=viewer.manages,
            account=user,
            has_password=passwords.exists(session, user),
            identities=identities.of(session, user),
            oidc_name=hub.settings.oidc_name if hub.settings.oidc_issuer else None,
            link_address=link_address(hub, viewer),
            problem=error.message if error is not None else None,
        )


@router.post("/name")
def rename(hub: HubDep, viewer: AccountDep, full_name: Text = "") -> Response:
    """The name that is shown; the one in addresses is given for ever."""
    with hub.db.write() as session:
        user = users.recheck(session, viewer).require_account()
        users.change_user(session, user, user.name, full_name=full_name.strip())
    return see_other("/settings")


@router.post("/password")
def set_password(
    request: Request, hub: HubDep, viewer: AccountDep, password: Secret, current: Secret = ""
) -> Response:
    """A first or another password. Every login ends, and this browser gets a new one."""
    user = viewer.require_account()
    try:
        with hub.db.read() as session:
            has_password = passwords.exists(session, user)
        if has_password:
            # Whoever found an open browser does not guess here either.
            throttle.count_try(hub.db, throttle.keys_of(user.name, address_of(request)))
            if not passwords.is_right(hub.db, user, current):
                raise BadField("The present password is wrong", "current")
        passwords.check(password, user.name)
        hashed = passwords.hashed(password)
        with hub.db.write() as session:
            user = users.recheck(session, viewer).require_account()
            passwords.store(session, user, hashed)
    except HubError as error:
        return _account_page(request, hub, viewer, error)
    return begin(request, hub, user, "new password", "/settings")


# Access tokens


@router.get("/tokens")
def tokens(request: Request, hub: HubDep, viewer: ViewerDep) -> Response:
    return _tokens_page(request, hub, viewer)


def _tokens_page(
    request: Request,
    hub: Hub,
    viewer: Viewer,
    error: HubError | None = None,
    secret: str | None = None,
) -> Response:
    with hub.db.read() as session:
        answer = refused_page(
            request,
            "settings_tokens.html",
            viewer,
            error,
            tab="tokens",
            manages=viewer.manages,
            tokens=users.tokens(session, viewer.require_user()),
            scopes=SCOPES,
            lifetimes=LIFETIMES,
            secret=secret,
            problem=error.message if error is not None else None,
        )
    if secret is not None:
        answer.headers["Cache-Control"] = "private, no-store"
    return answer


@router.post("/tokens")
def create_token(
    request: Request,
    hub: HubDep,
    viewer: AccountDep,
    name: Text = "",
    scope: Annotated[Scope, Form()] = Scope.READ,
    days: Annotated[str, Form(max_length=4)] = "",
    places: Annotated[str, Form(max_length=20_000)] = "",
) -> Response:
    """The answer is the only page that ever shows the new token."""
    try:
        if days not in LIFETIMES:
            raise BadField("choose how long it lives from the list", "days")
        expires_at = now() + timedelta(days=int(days)) if days else None
        named = places.replace(",", " ").split()
        with hub.db.write() as session:
            user = users.recheck(session, viewer).require_account()
            secret = users.issue_token(
                session, user, name.strip(), scope, expires_at=expires_at, places=named or None
            )
    except HubError as error:
        return _tokens_page(request, hub, viewer, error)
    return _tokens_page(request, hub, viewer, secret=secret)


@router.post("/tokens/{token_id}/revoke")
def revoke_token(hub: HubDep, viewer: AccountDep, token_id: int) -> Response:
    """It works no more, nor do logins that began with it."""
    with hub.db.write() as session:
        users.revoke_token(session, users.recheck(session, viewer).require_account(), token_id)
    return see_other("/settings/tokens")


# Logins


@router.get("/sessions")
def logins(request: Request, hub: HubDep, viewer: ViewerDep) -> Response:
    with hub.db.read() as session:
        return refused_page(
            request,
            "settings_sessions.html",
            viewer,
            None,
            tab="sessions",
            manages=viewer.manages,
            logins=users.tokens(session, viewer.require_user(), TokenKind.SESSION),
            this_one=viewer.token_id,
        )


@router.post("/sessions/{token_id}/end")
def end_login(hub: HubDep, viewer: AccountDep, token_id: int) -> Response:
    """Signs one browser out."""
    with hub.db.write() as session:
        users.revoke_token(session, users.recheck(session, viewer).require_account(), token_id)
    return see_other("/settings/sessions")


@router.post("/sessions/end-others")
def end_other_logins(hub: HubDep, viewer: AccountDep) -> Response:
    """Signs every browser out but this one."""
    with hub.db.write() as session:
        user = users.recheck(session, viewer).require_account()
        passwords.end_sessions(session, user, but=viewer.token_id)
    return see_other("/settings/sessions")
