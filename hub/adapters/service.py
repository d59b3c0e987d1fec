"""The one way to commit, whichever façade the bytes came through, and the catalogue's upkeep."""

import logging
from collections.abc import Callable, Sequence

from sqlmodel import Session, col, select

from hub.adapters import projection
from hub.adapters.projection import project
from hub.context import Hub
from hub.failpoints import reach
from hub.repos import commits
from hub.repos import service as repos
from hub.repos.models import Commit, Repo, RepoType
from hub.repos.operations import Operation
from hub.repos.refs import MAIN
from hub.users.service import Viewer

log = logging.getLogger(__name__)

__all__ = ["catch_up", "project", "publish", "reindex", "try_to_project"]


def publish(
    hub: Hub,
    viewer: Viewer,
    namespace: str,
    name: str,
    *,
    branch: str = MAIN,
    operations: Sequence[Operation],
    message: str,
    description: str = "",
    parent: str | None = None,
    type: str = RepoType.MODEL,
) -> Commit:
    """Commit to a repo, then project it: readers see both when this returns.

    Errors are those of `commits.create`: what is committed stays committed. A process that dies
    between the two, or a repo that cannot be projected, leaves an event, and the next start
    tries again.
    """

    def steps(session: Session) -> tuple[Repo, Commit]:
        repo = repos.get_repo(session, viewer, namespace, name, type=type)
        made = commits.create(
            session,
            viewer,
            repo,
            branch=branch,
            operations=operations,
            message=message,
            description=description,
            parent=parent,
        )
        return repo, made

    repo, made = hub.db.change(steps)
    reach("U10")
    if repo.head == made.id:
        assert repo.id is not None
        try_to_project(hub, repo.id)
    return made


def catch_up(hub: Hub, should_stop: Callable[[], bool] = lambda: False) -> int:
    """Project every repo with events that were not seen yet; how many there were."""
    with hub.db.read() as session:
        waiting = projection.pending(session)
    for n, repo_id in enumerate(waiting):
        if should_stop():
            return n
        try_to_project(hub, repo_id)
    return len(waiting)


def reindex(hub: Hub, report: Callable[[int, int], None] = lambda done, total: None) -> int:
    """Make the whole catalogue anew from the blobs; how many repos there are."""
    with hub.db.write() as session:
        projection.forget(session)
    with hub.db.read() as session:
        ids = [i for i in session.exec(select(Repo.id).order_by(col(Repo.id))) if i is not None]
    for n, repo_id in enumerate(ids):
        report(n, len(ids))
        try_to_project(hub, repo_id)
    report(len(ids), len(ids))
    return len(ids)


def try_to_project(hub: Hub, repo_id: int) -> None:
    """After a change was committed: what cannot be read now is tried again at the next start."""
    try:
        project(hub, repo_id)
    except Exception:  # one repo's files must not hold the others hostage
        log.exception("repo %s is not in the catalogue as it is now", repo_id)
