"""Organisations: one's own, and who is in one."""

from typing import Annotated

from fastapi import APIRouter, Form, Request
from fastapi.responses import Response

from hub.context import Hub
from hub.deps import AccountDep, HubDep, ViewerDep, WriterDep
from hub.errors import HubError
from hub.users import organizations
from hub.users import service as users
from hub.users.models import Role
from hub.users.service import Viewer
from hub.web.login_pages import Text
from hub.web.render import refused_page, see_other

router = APIRouter(include_in_schema=False, tags=["web"])

ROLES = {
    Role.READER: "sees private repos",
    Role.WRITER: "also publishes",
    Role.ADMIN: "also says who is a member",
}


@router.get("/settings/organizations")
def own(request: Request, hub: HubDep, viewer: ViewerDep) -> Response:
    return _own_page(request, hub, viewer)


def _own_page(
    request: Request, hub: Hub, viewer: Viewer, error: HubError | None = None
) -> Response:
    with hub.db.read() as session:
        return refused_page(
            request,
            "settings_organizations.html",
            viewer,
            error,
            tab="organizations",
            manages=viewer.manages,
            organizations=users.organizations(session, viewer.require_user()),
            problem=error.message if error is not None else None,
        )


@router.post("/settings/organizations")
def create(
    request: Request, hub: HubDep, viewer: AccountDep, name: Text = "", full_name: Text = ""
) -> Response:
    """Whoever makes it is its first administrator."""
    try:
        with hub.db.write() as session:
            user = users.recheck(session, viewer).require_account()
            made = users.create_organization(
                session, name.strip(), user, full_name=full_name.strip()
            )
    except HubError as error:
        return _own_page(request, hub, viewer, error)
    return see_other(f"/organizations/{made.name}")


@router.get("/organizations/{name}")
def members(request: Request, hub: HubDep, viewer: ViewerDep, name: str) -> Response:
    return _members_page(request, hub, viewer, name)


def _members_page(
    request: Request, hub: Hub, viewer: Viewer, name: str, error: HubError | None = None
) -> Response:
    with hub.db.read() as session:
        found = organizations.members(session, viewer, name)
        return refused_page(
            request,
            "organization.html",
            viewer,
            error,
            organization=organizations.find(session, name),
            members=found,
            roles=ROLES,
            role_choices=[(role, f"{role}: {words}") for role, words in ROLES.items()],
            may_manage=users.may_manage(session, viewer, name),
            is_member=any(member.name == viewer.require_user().name for member in found),
            manages=viewer.manages,
            problem=error.message if error is not None else None,
        )


@router.post("/organizations/{name}/members")
def set_member(
    request: Request,
    hub: HubDep,
    viewer: WriterDep,
    name: str,
    user: Text,
    role: Annotated[Role, Form()],
) -> Response:
    """Add somebody, or change their role."""
    try:
        with hub.db.write() as session:
            by = users.recheck(session, viewer)
            organizations.set_role(session, by, name, user.strip(), role)
    except HubError as error:
        return _members_page(request, hub, viewer, name, error)
    return see_other(f"/organizations/{name}")


@router.post("/organizations/{name}/remove")
def remove_member(
    request: Request, hub: HubDep, viewer: WriterDep, name: str, user: Text
) -> Response:
    """Take somebody out, or leave."""
    try:
        with hub.db.write() as session:
            organizations.remove(session, users.recheck(session, viewer), name, user)
    except HubError as error:
        return _members_page(request, hub, viewer, name, error)
    left = viewer.user is not None and viewer.user.name == user and not viewer.is_admin
    return see_other("/settings/organizations" if left else f"/organizations/{name}")
