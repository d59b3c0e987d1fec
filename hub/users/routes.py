"""`/api/users` and `/api/tokens`: new users for administrators, one's own tokens for everybody."""

from datetime import datetime, timedelta

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from hub.db import now
from hub.deps import ReadSession, ViewerDep, WriterDep, WriteSession
from hub.errors import Forbidden
from hub.users import service as users
from hub.users.models import Role, Scope

router = APIRouter(prefix="/api", tags=["users"])


class UserCreate(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    full_name: str = ""


class OrganizationCreate(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str


class MemberSet(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Role


class TokenCreate(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    scope: Scope = Scope.WRITE
    days: int | None = Field(None, ge=1, le=3650, description="until it expires; never without")


class TokenPublic(BaseModel):
    id: int
    name: str
    scope: Scope
    created_at: datetime
    expires_at: datetime | None


class TokenSecret(BaseModel):
    """The only answer that ever holds the token itself."""

    token: str


@router.post("/users", status_code=201)
def create_user(body: UserCreate, viewer: WriterDep, session: WriteSession) -> TokenSecret:
    """A new user and a first token to hand over; for administrators."""
    if not users.recheck(session, viewer).is_admin:
        raise Forbidden("only an administrator makes users")
    user = users.create_user(session, body.name, full_name=body.full_name)
    return TokenSecret(token=users.issue_token(session, user, "first token"))


@router.post("/organizations", status_code=201)
def create_organization(
    body: OrganizationCreate, viewer: WriterDep, session: WriteSession
) -> dict[str, str]:
    """A namespace for several users; its first administrator is who makes it."""
    viewer = users.recheck(session, viewer)
    organization = users.create_organization(session, body.name, viewer.require_user())
    return {"name": organization.name}


@router.put("/organizations/{name}/members/{user}", status_code=204)
def set_member(
    name: str, user: str, body: MemberSet, viewer: WriterDep, session: WriteSession
) -> None:
    """Add a user or change their role; for administrators of the organisation."""
    viewer = users.recheck(session, viewer)
    users.set_role(session, viewer, name, user, body.role)


@router.get("/tokens")
def list_tokens(viewer: ViewerDep, session: ReadSession) -> list[TokenPublic]:
    """The caller's tokens that still work, newest first."""
    found = users.tokens(session, viewer.require_user())
    return [TokenPublic.model_validate(token, from_attributes=True) for token in found]


@router.post("/tokens", status_code=201)
def create_token(body: TokenCreate, viewer: WriterDep, session: WriteSession) -> TokenSecret:
    """A further token of the caller."""
    viewer = users.recheck(session, viewer)
    expires_at = now() + timedelta(days=body.days) if body.days is not None else None
    user = viewer.require_user()
    secret = users.issue_token(session, user, body.name, body.scope, expires_at=expires_at)
    return TokenSecret(token=secret)


@router.delete("/tokens/{token_id}", status_code=204)
def revoke_token(token_id: int, viewer: WriterDep, session: WriteSession) -> None:
    """It works no more, and neither do the page's sessions that began with it."""
    viewer = users.recheck(session, viewer)
    users.revoke_token(session, viewer.require_user(), token_id)
