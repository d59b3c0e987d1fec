"""A first catalogue for an empty hub, so that there is something to look at."""

from collections.abc import Callable, Mapping
from pathlib import Path

from sqlmodel import select

from hub.adapters.service import publish
from hub.context import Hub
from hub.db import wait_for_others
from hub.repos import commits, refs
from hub.repos import service as repos
from hub.repos.models import Repo
from hub.repos.operations import Add
from hub.users import service as users
from hub.users.models import Namespace, Scope, User
from hub.users.names import key_of
from hub.users.service import Viewer


def seed(
    hub: Hub, folders: Mapping[str, Path], should_stop: Callable[[], bool] = lambda: False
) -> None:
    """Publish each folder as the repo it is named for; a repo that was ever there stays as it is.

    What was interrupted, or told to stop, is continued by the next start.
    """
    with hub.db.write() as session:
        wait_for_others(session.connection(), "demo")
        admin = session.exec(select(User).where(User.is_admin).order_by("id")).first()
        viewer = Viewer(admin, Scope.ADMIN)
        unfinished = []
        for name in sorted(folders):
            namespace, _, repo_name = name.partition("/")
            if session.get(Namespace, key_of(namespace)) is None:
                users.create_user(session, namespace, full_name="Demo catalogue")
            if repos.is_unused(session, name):
                repos.create_repo(session, viewer, namespace, repo_name)
            repo = session.exec(select(Repo).where(Repo.key == key_of(name))).first()
            if repo is not None and not commits.entries(session, refs.resolve(session, repo)):
                unfinished.append(name)
    for name in unfinished:
        if should_stop():
            return
        _publish(hub, viewer, name, folders[name])


def _publish(hub: Hub, viewer: Viewer, name: str, folder: Path) -> None:
    namespace, _, repo_name = name.partition("/")
    limit = hub.settings.max_regular_bytes
    operations = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as source:
            stored = hub.store.put(iter(lambda: source.read(1 << 20), b""))
        path = file.relative_to(folder).as_posix()
        operations.append(Add(path, stored, lfs=stored.size > limit))
    publish(hub, viewer, namespace, repo_name, operations=operations, message="Demo catalogue")
