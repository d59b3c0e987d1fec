"""The one way to commit, whichever façade the bytes came through."""

from collections.abc import Sequence

from hub.context import Hub
from hub.repos import service as repos
from hub.repos.models import Commit, RepoType
from hub.repos.operations import Operation
from hub.users.service import Viewer


def publish(
    hub: Hub,
    viewer: Viewer,
    namespace: str,
    name: str,
    *,
    branch: str = repos.MAIN,
    operations: Sequence[Operation],
    message: str,
    description: str = "",
    parent: str | None = None,
    type: str = RepoType.MODEL,
) -> Commit:
    """Commit to a repo in a write transaction of its own."""
    with hub.db.write() as session:
        repo = repos.get_repo(session, viewer, namespace, name, type=type)
        return repos.commit(
            session,
            viewer,
            repo,
            branch=branch,
            operations=operations,
            message=message,
            description=description,
            parent=parent,
        )
