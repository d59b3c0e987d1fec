"""Who may have the files of a gated repo: asking, deciding, and the lists of both."""

from sqlmodel import Session, col, select

from hub.audit import record
from hub.db import now
from hub.errors import AccessRequestNotFound, BadRequest, Forbidden
from hub.repos import permissions
from hub.repos.changes import locked
from hub.repos.models import AccessRequest, AccessState, Gate, Repo
from hub.users import service as users
from hub.users.models import User
from hub.users.service import Viewer

MAX_REASON = 1000


def ask(session: Session, viewer: Viewer, repo: Repo) -> AccessRequest:
    """The viewer's request; accepted at once where the repo lets everybody in who asks.

    Asking again changes nothing: who was rejected stays so.
    """
    user = permissions.require_participant(session, viewer, repo)
    repo = locked(session, repo)
    _require_gated(repo)
    present = _of(session, repo, user)
    if present is not None:
        return present
    state = AccessState.ACCEPTED if repo.gated == Gate.AUTO else AccessState.PENDING
    return _insert(session, repo, user, state)


def grant(session: Session, viewer: Viewer, repo: Repo, name: str) -> AccessRequest:
    """Let a user in who did not ask. BadRequest if they are in already; UserNotFound."""
    by = _require_manager(session, viewer, repo)
    repo = locked(session, repo)
    _require_gated(repo)
    user = users.find_user(session, name)
    present = _of(session, repo, user)
    if present is not None and present.state == AccessState.ACCEPTED:
        raise BadRequest(f"{user.name} has access to {repo.full_name} already", "user")
    record(session, by.id, "access.accepted", f"{repo.full_name}: {user.name}")
    if present is None:
        return _insert(session, repo, user, AccessState.ACCEPTED)
    present.state = AccessState.ACCEPTED
    session.add(present)
    return present


def decide(
    session: Session,
    viewer: Viewer,
    repo: Repo,
    state: AccessState,
    *,
    request_id: int | None = None,
    name: str | None = None,
    reason: str = "",
) -> AccessRequest:
    """Answer a request, or take the answer back by making it pending again.

    The request is named by its id or by its user. AccessRequestNotFound without one, or if it is
    in that state already.
    """
    by = _require_manager(session, viewer, repo)
    repo = locked(session, repo)
    _require_gated(repo)
    if request_id is not None:
        found = session.get(AccessRequest, request_id)
    else:
        found = _of(session, repo, users.find_user(session, name or ""))
    if found is None or found.repo_id != repo.id:
        raise AccessRequestNotFound(f"there is no such request for {repo.full_name}")
    user = session.get_one(User, found.user_id)
    if found.state == state:
        raise AccessRequestNotFound(f"the request of {user.name} is {state} already")
    found.state = state
    found.reason = reason[:MAX_REASON]
    session.add(found)
    record(session, by.id, f"access.{state}", f"{repo.full_name}: {user.name}")
    return found


def requests(
    session: Session, viewer: Viewer, repo: Repo, state: AccessState
) -> list[tuple[AccessRequest, User]]:
    """Those in that state, oldest first; for who may write to the repo."""
    _require_manager(session, viewer, repo)
    _require_gated(repo)
    query = (
        select(AccessRequest, User)
        .join(User, col(User.id) == col(AccessRequest.user_id))
        .where(AccessRequest.repo_id == repo.id, AccessRequest.state == state)
        .order_by(col(AccessRequest.id))
    )
    return list(session.exec(query))


def own(session: Session, viewer: Viewer, repo: Repo) -> AccessRequest | None:
    """The viewer's own request; None without one."""
    return _of(session, repo, viewer.user) if viewer.user is not None else None


def _of(session: Session, repo: Repo, user: User) -> AccessRequest | None:
    query = select(AccessRequest).where(
        AccessRequest.repo_id == repo.id, AccessRequest.user_id == user.id
    )
    return session.exec(query).first()


def _insert(session: Session, repo: Repo, user: User, state: AccessState) -> AccessRequest:
    assert repo.id is not None
    assert user.id is not None
    made = AccessRequest(repo_id=repo.id, user_id=user.id, state=state, created_at=now())
    session.add(made)
    session.flush()
    return made


def _require_gated(repo: Repo) -> None:
    if repo.gated is None:
        raise BadRequest(f"{repo.full_name} is not gated")


def _require_manager(session: Session, viewer: Viewer, repo: Repo) -> User:
    viewer = users.recheck(session, viewer)
    user = viewer.require_user()
    if not users.may_write(session, viewer, repo.namespace, repo.name):
        raise Forbidden(f"{user.name} may not decide who gets the files of {repo.full_name}")
    return user
