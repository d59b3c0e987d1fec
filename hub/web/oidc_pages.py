"""Signing in at an OpenID Connect provider, and what comes after the first time."""

from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import RedirectResponse, Response
from sqlmodel import Session

from hub.context import Hub
from hub.deps import AccountDep, HubDep, OpenForm, ViewerDep, public_url
from hub.errors import Forbidden, HubError, PageNotFound, SignInFailed
from hub.users import identities, invitations
from hub.users import service as users
from hub.users.models import User
from hub.users.names import check_namespace
from hub.users.oidc import Flow, Person, Provider
from hub.users.service import ANONYMOUS, Viewer
from hub.web.login_pages import Text, begin
from hub.web.render import local, page, refused_page, see_other

router = APIRouter(include_in_schema=False, tags=["web"])

FLOW, NEWCOMER, LINK = "oidc-flow", "oidc-newcomer", "oidc-link"  # purposes of signatures
FLOW_COOKIE, NEWCOMER_COOKIE = "graft_oidc", "graft_newcomer"
PATH = "/login/oidc"
FLOW_S = 600


def _provider(request: Request) -> Provider:
    provider: Provider | None = request.app.state.oidc
    if provider is None:
        raise PageNotFound("this hub has no OpenID Connect provider")
    return provider


ProviderDep = Annotated[Provider, Depends(_provider)]


@router.get(PATH)
def start(
    request: Request,
    hub: HubDep,
    viewer: ViewerDep,
    provider: ProviderDep,
    next: str = "/",
    link: str = "",
    code: Annotated[str, Query(max_length=200)] = "",
) -> Response:
    """Off to the provider. A link and no form: browsers keep forms within `form-action`.

    `link` comes from a page of the hub and names the login it was shown to, so that no other site
    can make somebody link what is not theirs.
    """
    token_id = None
    if link:
        viewer.require_account()
        token_id = hub.signer.unsign(LINK, link, 3600)
        if token_id is None or token_id != viewer.token_id:
            raise Forbidden("this link was not made for you: open it from your settings")
    flow, address = provider.begin(_callback(request), local(next), link=token_id, code=code)
    answer = RedirectResponse(address, HTTPStatus.SEE_OTHER)
    _remember(request, hub, answer, FLOW_COOKIE, FLOW, flow.pack())
    return answer


@router.get(PATH + "/callback")
def callback(request: Request, hub: HubDep, viewer: ViewerDep, provider: ProviderDep) -> Response:
    """Back from the provider: a login, one more way in, or a newcomer who picks a name."""
    kept = hub.signer.unsign(FLOW, request.cookies.get(FLOW_COOKIE, ""), FLOW_S)
    if kept is None:
        raise SignInFailed("This sign-in began in another browser, or too long ago")
    flow = Flow(**kept)
    person = provider.finish(flow, _callback(request), request.query_params)
    answer = _arrived(request, hub, viewer, flow, person)
    answer.delete_cookie(FLOW_COOKIE, path=PATH)
    return answer


def _arrived(request: Request, hub: Hub, viewer: Viewer, flow: Flow, person: Person) -> Response:
    if flow.link is not None:
        if viewer.token_id != flow.link:
            raise SignInFailed("You were signed out meanwhile: nothing was linked")
        with hub.db.write() as session:
            user = users.recheck(session, viewer).require_account()
            identities.link(session, user, person)
        return see_other("/settings")
    with hub.db.read() as session:
        found = identities.owner(session, person)
    if found is not None:
        if found.is_disabled:
            raise SignInFailed("This account is disabled")
        return begin(request, hub, found, "OpenID Connect", flow.next)
    if not (hub.settings.oidc_signup or flow.code):
        raise SignInFailed(
            "No account of this hub belongs to that sign-in: link it in the settings of yours,"
            " or ask an administrator for an invitation"
        )
    answer = see_other(PATH + "/name")
    newcomer = {"person": person.pack(), "next": flow.next, "code": flow.code}
    _remember(request, hub, answer, NEWCOMER_COOKIE, NEWCOMER, newcomer)
    return answer


@router.get(PATH + "/name")
def name_form(request: Request, hub: HubDep) -> Response:
    person = _newcomer(request, hub)[0]
    return page(request, "newcomer.html", ANONYMOUS, **_form(_possible(person.name), person))


@router.post(PATH + "/name", dependencies=[OpenForm])
def pick_name(request: Request, hub: HubDep, name: Text, full_name: Text = "") -> Response:
    """Whoever the provider vouched for becomes a user."""
    person, kept = _newcomer(request, hub)
    name, full_name = name.strip(), full_name.strip()
    try:
        with hub.db.write() as session:
            user = _make(session, kept["code"], name, full_name)
            identities.link(session, user, person)
    except HubError as error:
        context = _form(name, person) | {"full_name": full_name, "problem": error.message}
        return refused_page(request, "newcomer.html", ANONYMOUS, error, **context)
    answer = begin(request, hub, user, "OpenID Connect", kept["next"])
    answer.delete_cookie(NEWCOMER_COOKIE, path=PATH)
    return answer


def _make(session: Session, code: str, name: str, full_name: str) -> User:
    if code:
        return invitations.accept(session, code, name, full_name, None)
    return users.create_user(session, name, full_name=full_name)


@router.post("/settings/identities/{identity_id}/remove")
def unlink(hub: HubDep, viewer: AccountDep, identity_id: int) -> Response:
    """The provider signs this user in no more."""
    with hub.db.write() as session:
        user = users.recheck(session, viewer).require_account()
        identities.unlink(session, user, identity_id)
    return see_other("/settings")


def link_address(hub: Hub, viewer: Viewer) -> str:
    """Where this login goes to add a way in; for nobody else."""
    return f"{PATH}?link={hub.signer.sign(LINK, viewer.token_id)}"


def _callback(request: Request) -> str:
    return f"{public_url(request)}{PATH}/callback"


def _remember(
    request: Request, hub: Hub, answer: Response, cookie: str, purpose: str, value: dict[str, Any]
) -> None:
    answer.set_cookie(
        cookie,
        hub.signer.sign(purpose, value),
        max_age=FLOW_S,
        path=PATH,
        httponly=True,
        # Lax: the provider sends the browser back from its own site.
        samesite="lax",
        secure=public_url(request).startswith("https:"),
    )


def _newcomer(request: Request, hub: Hub) -> tuple[Person, dict[str, Any]]:
    kept = hub.signer.unsign(NEWCOMER, request.cookies.get(NEWCOMER_COOKIE, ""), FLOW_S)
    if kept is None:
        raise SignInFailed("This sign-in was too long ago: begin again")
    return Person(**kept["person"]), kept


def _form(name: str, person: Person) -> dict[str, Any]:
    return {"name": name, "full_name": person.full_name, "problem": None}


def _possible(name: str) -> str:
    try:
        return check_namespace(name)
    except HubError:
        return ""
