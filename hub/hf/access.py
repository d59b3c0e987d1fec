"""Gated repos as Hugging Face clients see them: the check before a download, and the requests."""

from typing import Any

from hub.deps import ReadSession, ViewerDep, WriterDep, WriteSession
from hub.errors import Forbidden
from hub.hf import bodies, info
from hub.hf.deps import RepoDep
from hub.hf.routing import hf_router
from hub.repos import access, permissions
from hub.repos.models import AccessRequest, AccessState
from hub.users import service as users
from hub.users.models import User

API = "/api/{kind:repos}/{namespace}/{name}"

router = hf_router()


@router.get(API + "/auth-check")
def auth_check(session: ReadSession, viewer: ViewerDep, repo: RepoDep) -> dict[str, Any]:
    """200 if the viewer may have the files of the repo."""
    permissions.require_files(session, viewer, repo)
    return {}


@router.get(API + "/auth-check/write")
def auth_check_write(session: ReadSession, viewer: ViewerDep, repo: RepoDep) -> dict[str, Any]:
    """200 if the viewer may write to the repo."""
    user = viewer.require_write()
    if not users.may_write(session, viewer, repo.namespace, repo.name):
        raise Forbidden(f"{user.name} may not write to {repo.full_name}")
    return {}


@router.post(API + "/ask-access")
def ask(session: WriteSession, viewer: WriterDep, repo: RepoDep) -> dict[str, Any]:
    """A request for the files of a gated repo; clients have no call for it, the page has a button."""
    return {"status": access.ask(session, viewer, repo).state}


@router.get(API + "/user-access-request/{state}")
def requests(
    session: ReadSession, viewer: ViewerDep, repo: RepoDep, state: AccessState
) -> list[dict[str, Any]]:
    """Pending, accepted or rejected ones, for who may write to the repo."""
    found = access.requests(session, viewer, repo, state)
    return [_item(request, user) for request, user in found]


@router.post(API + "/user-access-request/handle")
def handle(
    session: WriteSession, viewer: WriterDep, repo: RepoDep, body: bodies.Decision
) -> dict[str, Any]:
    """By the user's name up to huggingface_hub 2.3, by the request's id after."""
    done = access.decide(
        session,
        viewer,
        repo,
        body.status,
        request_id=body.requestId,
        name=body.user,
        reason=body.rejectionReason or "",
    )
    return _item(done, session.get_one(User, done.user_id))


@router.post(API + "/user-access-request/grant")
def grant(
    session: WriteSession, viewer: WriterDep, repo: RepoDep, body: bodies.Grant
) -> dict[str, Any]:
    done = access.grant(session, viewer, repo, body.user)
    return _item(done, session.get_one(User, done.user_id))


def _item(request: AccessRequest, user: User) -> dict[str, Any]:
    return {
        "requestId": f"{request.id:024x}",
        "user": {"user": user.name, "fullname": user.full_name or user.name, "email": None},
        "status": request.state,
        "timestamp": info.date(request.created_at),
        "rejectionReason": request.reason or None,
    }
