"""`/api/users`, `/api/organizations` and `/api/tokens`, for programs; people have `/settings`."""

from datetime import datetime, timedelta

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from hub.db import now
from hub.deps import AccountDep, AdminDep, ReadSession, ViewerDep, WriterDep, WriteSession
from hub.users import organizations
from hub.users import service as users
from hub.users.models import Role, Scope

router = APIRouter(prefix="/api", tags=["users"])


class UserCreate(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    full_name: str = Field("", max_length=200)


class UserChange(BaseModel):
    """What is not given stays."""

    model_config = ConfigDict(extra="forbid")

    full_name: str | None = Field(None, max_length=200)
    is_admin: bool | None = None
    is_disabled: bool | None = None


class UserPublic(BaseModel):
    name: str
    full_name: str
    is_admin: bool
    is_disabled: bool
    created_at: datetime


class OrganizationCreate(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    full_name: str = Field("", max_length=200)


class OrganizationPublic(BaseModel):
    name: str
    full_name: str
    role: Role


class MemberSet(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Role


class TokenCreate(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    scope: Scope = Scope.WRITE
    places: list[str] | None = Field(
        None, description="namespaces and repos it is confined to; everything its user may without"
    )
    days: int | None = Field(None, ge=1, le=3650, description="until it expires; never without")


class TokenPublic(BaseModel):
    id: int
    name: str
    scope: Scope
    places: list[str] | None
    created_at: datetime
    last_used_at: datetime | None
    expires_at: datetime | None


class TokenSecret(BaseModel):
    """The only answer that ever holds the token itself."""

    token: str


@router.post("/users", status_code=201)
def create_user(body: UserCreate, viewer: AdminDep, session: WriteSession) -> TokenSecret:
    """A new user and a first token to hand over, with scope admin; for administrators."""
    by = users.recheck(session, viewer).require_admin()
    user = users.create_user(session, body.name, full_name=body.full_name, by=by)
    return TokenSecret(token=users.issue_token(session, user, "first token", Scope.ADMIN))


@router.get("/users")
def list_users(viewer: ViewerDep, session: ReadSession) -> list[UserPublic]:
    """Every user by name; for administrators."""
    viewer.require_admin()
    found = users.all_users(session)
    return [UserPublic.model_validate(user, from_attributes=True) for user in found]


@router.patch("/users/{name}")
def change_user(name: str, body: UserChange, viewer: AdminDep, session: WriteSession) -> UserPublic:
    """A disabled user's tokens, sessions and links work no more at once; for administrators."""
    by = users.recheck(session, viewer).require_admin()
    changed = users.change_user(
        session,
        by,
        name,
        full_name=body.full_name,
        is_admin=body.is_admin,
        is_disabled=body.is_disabled,
    )
    return UserPublic.model_validate(changed, from_attributes=True)


@router.get("/organizations")
def list_organizations(viewer: ViewerDep, session: ReadSession) -> list[OrganizationPublic]:
    """The caller's organisations and the role in each."""
    found = users.organizations(session, viewer.require_user())
    return [
        OrganizationPublic(name=org.name, full_name=org.full_name, role=role) for org, role in found
    ]


@router.post("/organizations", status_code=201)
def create_organization(
    body: OrganizationCreate, viewer: AccountDep, session: WriteSession
) -> dict[str, str]:
    """A namespace for several users; its first administrator is who makes it."""
    user = users.recheck(session, viewer).require_account()
    made = users.create_organization(session, body.name, user, full_name=body.full_name)
    return {"name": made.name}


@router.put("/organizations/{name}/members/{user}", status_code=204)
def set_member(
    name: str, user: str, body: MemberSet, viewer: WriterDep, session: WriteSession
) -> None:
    """Add a user or change their role; for administrators of the organisation."""
    organizations.set_role(session, users.recheck(session, viewer), name, user, body.role)


@router.delete("/organizations/{name}/members/{user}", status_code=204)
def remove_member(name: str, user: str, viewer: WriterDep, session: WriteSession) -> None:
    """Take somebody out, or leave; the last administrator stays."""
    organizations.remove(session, users.recheck(session, viewer), name, user)


@router.get("/tokens")
def list_tokens(viewer: ViewerDep, session: ReadSession) -> list[TokenPublic]:
    """The caller's tokens that still work, newest first."""
    found = users.tokens(session, viewer.require_user())
    return [TokenPublic.model_validate(token, from_attributes=True) for token in found]


@router.post("/tokens", status_code=201)
def create_token(body: TokenCreate, viewer: AccountDep, session: WriteSession) -> TokenSecret:
    """A further token of the caller."""
    user = users.recheck(session, viewer).require_account()
    expires_at = now() + timedelta(days=body.days) if body.days is not None else None
    secret = users.issue_token(
        session, user, body.name, body.scope, expires_at=expires_at, places=body.places
    )
    return TokenSecret(token=secret)


@router.delete("/tokens/{token_id}", status_code=204)
def revoke_token(token_id: int, viewer: WriterDep, session: WriteSession) -> None:
    """It works no more, and neither do the page's sessions that began with it.

    A token may always revoke itself; others take scope admin.
    """
    viewer = users.recheck(session, viewer)
    if token_id != viewer.token_id:
        viewer.require_account()
    users.revoke_token(session, viewer.require_user(), token_id)
