"""For administrators of the hub: who there is, and what was done."""

from enum import StrEnum
from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from hub import audit
from hub.context import Hub
from hub.deps import AdminDep, HubDep, ViewerDep, public_url
from hub.errors import HubError, UserNotFound
from hub.users import invitations, organizations
from hub.users import service as users
from hub.users.audit_routes import AuditPage, page_of
from hub.users.service import Viewer
from hub.web.login_pages import Text
from hub.web.render import refused_page, see_other

router = APIRouter(prefix="/settings", include_in_schema=False, tags=["web"])


ROWS = 100


class Change(StrEnum):
    DISABLE = "disable"
    ENABLE = "enable"
    PROMOTE = "promote"
    DEMOTE = "demote"


IS_DISABLED = {Change.DISABLE: True, Change.ENABLE: False}
IS_ADMIN = {Change.PROMOTE: True, Change.DEMOTE: False}


@router.get("/users")
def everybody(request: Request, hub: HubDep, viewer: ViewerDep) -> Response:
    return _users_page(request, hub, viewer)


def _users_page(
    request: Request,
    hub: Hub,
    viewer: Viewer,
    error: HubError | None = None,
    link: str | None = None,
    link_for: str | None = None,
) -> Response:
    viewer.require_admin()
    with hub.db.read() as session:
        answer = refused_page(
            request,
            "settings_users.html",
            viewer,
            error,
            tab="users",
            manages=True,
            users=users.all_users(session),
            days=invitations.DAYS,
            link=link,
            link_for=link_for,
            problem=error.message if error is not None else None,
        )
    if link is not None:
        answer.headers["Cache-Control"] = "private, no-store"
    return answer


@router.post("/users/invite")
def invite(request: Request, hub: HubDep, viewer: AdminDep, organization: Text = "") -> Response:
    """The answer is the only page that ever shows the link."""
    try:
        with hub.db.write() as session:
            by = users.recheck(session, viewer).require_admin()
            into = organizations.find(session, organization.strip()) if organization else None
            code = invitations.invite(session, by, organization=into)
    except HubError as error:
        return _users_page(request, hub, viewer, error)
    return _users_page(request, hub, viewer, link=_link(request, code), link_for="a new account")


@router.post("/users/{name}/reset")
def reset(request: Request, hub: HubDep, viewer: AdminDep, name: str) -> Response:
    """As `invite`, for a new password of a user; the present one works until then."""
    with hub.db.write() as session:
        by = users.recheck(session, viewer).require_admin()
        user = users.find_user(session, name)
        code = invitations.reset(session, by, user)
    link_for = f"a new password of {user.name}"
    return _users_page(request, hub, viewer, link=_link(request, code), link_for=link_for)


@router.post("/users/{name}/{change}")
def change(request: Request, hub: HubDep, viewer: AdminDep, name: str, change: Change) -> Response:
    """Disable, enable, promote or demote."""
    try:
        with hub.db.write() as session:
            by = users.recheck(session, viewer).require_admin()
            users.change_user(
                session,
                by,
                name,
                is_disabled=IS_DISABLED.get(change),
                is_admin=IS_ADMIN.get(change),
            )
    except HubError as error:
        return _users_page(request, hub, viewer, error)
    return see_other("/settings/users")


def _link(request: Request, code: str) -> str:
    return f"{public_url(request)}/invite?code={code}"


@router.get("/audit")
def log(
    request: Request,
    hub: HubDep,
    viewer: ViewerDep,
    user: Annotated[str, Query(max_length=200)] = "",
    action: Annotated[str, Query(max_length=100)] = "",
    before: Annotated[int | None, Query(ge=1, lt=2**63)] = None,
    verify: Annotated[str, Query(max_length=1)] = "",
) -> Response:
    """What was done and by whom; with `verify` every row is read."""
    viewer.require_admin()
    error: HubError | None = None
    with hub.db.read() as session:
        chain = audit.verify(session) if verify else None
        try:
            found = page_of(
                session, user=user.strip(), action=action.strip(), before=before, limit=ROWS
            )
        except UserNotFound as unknown:
            error, found = unknown, AuditPage(items=[], next_before=None)
    query = {"user": user, "action": action, "before": found.next_before or ""}
    return refused_page(
        request,
        "settings_audit.html",
        viewer,
        error,
        tab="audit",
        manages=True,
        chain=chain,
        log=found,
        older=f"/settings/audit?{urlencode(query)}" if found.next_before else None,
        chosen_user=user,
        chosen_action=action,
        problem=error.message if error is not None else None,
    )
