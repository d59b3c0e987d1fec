"""`POST /api/mirrors`: fetch a repo of the upstream now."""

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from hub.deps import AdminDep
from hub.errors import NotImplementedHere
from hub.mirror.service import Mirror

router = APIRouter(prefix="/api/mirrors", tags=["mirrors"])


class MirrorCreate(BaseModel):
    model_config = ConfigDict(extra="forbid")

    repo: str = Field(max_length=200, description="namespace/name on the upstream, and here")


class MirrorPublic(BaseModel):
    repo: str
    commit: str
    message: str


def mirror_of(request: Request) -> Mirror | None:
    """None unless the settings name an upstream."""
    mirror: Mirror | None = request.app.state.mirror
    return mirror


@router.post("")
def mirror(request: Request, viewer: AdminDep, body: MirrorCreate) -> MirrorPublic:
    """Answers when all files are here; what is here already is not sent again."""
    mirror = mirror_of(request)
    if mirror is None:
        raise NotImplementedHere("this hub mirrors nothing: GRAFT_MIRROR_URL is not set")
    made = mirror.fetch(viewer, body.repo)
    return MirrorPublic(repo=body.repo, commit=made.id, message=made.message)
