"""`/api/quotas`: what users and organisations keep on this hub, and may keep."""

from typing import Annotated, Literal, Self

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from hub.deps import AdminDep, HubDep, ReadSession, ViewerDep, WriteSession
from hub.errors import UserNotFound
from hub.limits import quotas
from hub.limits.models import UNLIMITED
from hub.limits.quotas import Usage
from hub.users import service as users
from hub.users.names import key_of

router = APIRouter(prefix="/api/quotas", tags=["quotas"])


class QuotaSet(BaseModel):
    model_config = ConfigDict(extra="forbid")

    limit_bytes: Annotated[int, Field(ge=0, lt=2**63)] | Literal["unlimited"] | None = Field(
        description="bytes, `unlimited`, or null for the hub's default"
    )


class QuotaPublic(BaseModel):
    """`used_bytes` is every blob that some commit refers to, once; no limit is null."""

    namespace: str
    used_bytes: int
    limit_bytes: int | None
    is_default: bool

    @classmethod
    def of(cls, usage: Usage) -> Self:
        return cls.model_validate(usage, from_attributes=True)


@router.get("")
def all_quotas(hub: HubDep, session: ReadSession, viewer: ViewerDep) -> list[QuotaPublic]:
    """Of everybody who keeps something; for administrators."""
    viewer.require_admin()
    return [QuotaPublic.of(found) for found in quotas.usages(session, hub.settings.quota_bytes)]


@router.get("/{namespace}")
def one_quota(hub: HubDep, session: ReadSession, viewer: ViewerDep, namespace: str) -> QuotaPublic:
    """One's own, of an organisation one is in, or any for an administrator."""
    viewer.require_user()
    if not users.may_read_private(session, viewer, namespace):
        raise UserNotFound(f"you are not in {namespace!r}")
    default = hub.settings.quota_bytes
    return QuotaPublic.of(quotas.usage(session, key_of(namespace), default))


@router.put("/{namespace}")
def set_quota(
    hub: HubDep, session: WriteSession, viewer: AdminDep, namespace: str, body: QuotaSet
) -> QuotaPublic:
    """What is there already stays; only what would be added is refused."""
    limit = UNLIMITED if body.limit_bytes == "unlimited" else body.limit_bytes
    key = key_of(namespace)
    quotas.set_limit(session, viewer.user, key, limit)
    return QuotaPublic.of(quotas.usage(session, key, hub.settings.quota_bytes))
