"""Repos, commits, refs and who may do what with them, through the services."""

import pytest
from sqlmodel import select

from hub.adapters.service import publish
from hub.context import Hub
from hub.errors import StaleParent
from hub.repos import service as repos
from hub.repos.models import Commit, Event
from hub.repos.operations import Add
from hub.users.service import Viewer


def put(hub: Hub, path: str, content: bytes, lfs: bool = False) -> Add:
    return Add(path, hub.store.put([content], size=len(content)), lfs)


def make_repo(hub: Hub, viewer: Viewer, name: str = "ink", *, private: bool = False) -> None:
    assert viewer.user is not None
    with hub.db.write() as session:
        repos.create_repo(session, viewer, viewer.user.name, name, private=private)


def test_a_commit_is_read_back_with_the_commit_that_last_changed_each_path(
    hub: Hub, admin: Viewer
) -> None:
    make_repo(hub, admin)
    first = publish(hub, admin, "admin", "ink", operations=[put(hub, "a", b"1")], message="one")
    second = publish(hub, admin, "admin", "ink", operations=[put(hub, "b/c", b"2")], message="two")
    with hub.db.read() as session:
        repo = repos.get_repo(session, admin, "Admin", "INK")
        assert repo.head == second.id
        found = {e.path: e.last_commit_id for e in repos.entries(session, second)}
        assert found == {"a": first.id, "b/c": second.id}
        assert [e.path for e in repos.entries(session, second, "b")] == ["b/c"]
        history, more = repos.commits(session, repo, second)
        assert [c.message for c in history] == ["two", "one", "initial commit"]
        assert more is None
        assert len(session.exec(select(Event).where(Event.kind == "repo.committed")).all()) == 2


def test_a_commit_on_a_branch_that_has_moved_is_refused_and_changes_nothing(
    hub: Hub, admin: Viewer
) -> None:
    make_repo(hub, admin)
    base = publish(hub, admin, "admin", "ink", operations=[put(hub, "a", b"1")], message="1")
    head = publish(hub, admin, "admin", "ink", operations=[put(hub, "a", b"2")], message="2")
    with pytest.raises(StaleParent):
        publish(
            hub, admin, "admin", "ink", operations=[put(hub, "a", b"3")], message="3",
            parent=base.id,
        )  # fmt: skip
    with hub.db.read() as session:
        assert repos.get_repo(session, admin, "admin", "ink").head == head.id
        assert len(session.exec(select(Commit)).all()) == 3
