"""Gates, likes, pull requests and rewritten history as services, on both databases."""

import pytest
from sqlmodel import Session, select

from hub.blobs.store import Stored
from hub.context import Hub
from hub.errors import AccessRequestNotFound, Conflict, Forbidden, GatedRepo
from hub.repos import access, commits, discussions, history, likes, permissions, pulls, refs
from hub.repos import service as repos
from hub.repos.models import AccessState, Commit, CommitEntry, Gate, Repo
from hub.repos.operations import Add, Delete
from hub.users.service import Viewer
from tests.hub.conftest import both_databases, make_user


def put(hub: Hub, content: bytes) -> Stored:
    return hub.store.put([content], size=len(content))


def commit(session: Session, viewer: Viewer, repo: Repo, branch: str, *what: Add | Delete) -> str:
    return commits.create(
        session, viewer, repo, branch=branch, operations=what, message=f"on {branch}"
    ).id


@both_databases
def test_a_gate_opens_for_one_and_closes_again(hub: Hub, admin: Viewer) -> None:
    ben, _ = make_user(hub, "ben")
    with hub.db.write() as session:
        repo = repos.create_repo(session, admin, "admin", "ink")
        repos.update_settings(session, admin, repo, gated=Gate.MANUAL)
        assert access.ask(session, ben, repo).state == AccessState.PENDING
        assert access.ask(session, ben, repo).state == AccessState.PENDING
        with pytest.raises(GatedRepo):
            permissions.require_files(session, ben, repo)
        with pytest.raises(Forbidden):
            access.decide(session, ben, repo, AccessState.ACCEPTED, name="ben")
        access.decide(session, admin, repo, AccessState.ACCEPTED, name="BEN")
        permissions.require_files(session, ben, repo)
        with pytest.raises(AccessRequestNotFound):
            access.decide(session, admin, repo, AccessState.ACCEPTED, name="ben")
        access.decide(session, admin, repo, AccessState.REJECTED, name="ben")
        assert permissions.may_read_files(session, ben, repo) is False
        other = repos.create_repo(session, admin, "admin", "other")
        repos.update_settings(session, admin, other, gated=Gate.AUTO)
        (request, _), *_ = access.requests(session, admin, repo, AccessState.REJECTED)
        with pytest.raises(AccessRequestNotFound):
            access.decide(session, admin, other, AccessState.ACCEPTED, request_id=request.id)


@both_databases
def test_a_pull_request_is_merged_and_history_is_rewritten(hub: Hub, admin: Viewer) -> None:
    ben, _ = make_user(hub, "ben")
    one, two, secret = put(hub, b"1"), put(hub, b"2"), put(hub, b"secret")
    with hub.db.write() as session:
        repo = repos.create_repo(session, admin, "admin", "ink")
        root = repo.head
        commit(session, admin, repo, "main", Add("a", one, False), Add("s", secret, True))
        pull = pulls.propose(session, ben, repo, "mine", "text")
        commit(session, ben, repo, "refs/pr/1", Add("b", two, False))
        assert [item.message for item in pulls.commits(session, repo, pull)] == ["on refs/pr/1"]
        with pytest.raises(Forbidden):
            pulls.merge(session, ben, repo, pull)
        other = pulls.propose(session, admin, repo, "other")
        commit(session, admin, repo, "refs/pr/2", Add("b", one, False))
        with pytest.raises(Forbidden):
            commit(session, ben, repo, "refs/pr/2", Delete("a"))
        made = pulls.merge(session, admin, repo, pull)
        assert repo.head == made.id
        with pytest.raises(Conflict, match="b was changed in main too"):
            pulls.merge(session, admin, repo, other)
        page = discussions.listed(session, repo, author="Ben", is_pull_request=True)
        assert [(found.num, found.status) for found, _ in page.discussions] == [(1, "merged")]
        assert history.forget(session, admin, repo, [secret.sha256]) == 4
        paths = [entry.path for entry in commits.entries(session, refs.resolve(session, repo))]
        assert paths == ["a", "b"]
        left = select(CommitEntry.path).where(CommitEntry.sha256 == secret.sha256)
        assert session.exec(left).all() == []
        found = commits.history(session, repo, refs.resolve(session, repo))[0]
        assert [item.message for item in found] == ["mine (#1)", "on main", "initial commit"]
        assert found[-1].id == root
        assert session.get(Commit, made.id) is None


@both_databases
def test_likes_are_counted_and_go_with_the_repo(hub: Hub, admin: Viewer) -> None:
    ben, _ = make_user(hub, "ben")
    assert ben.user is not None
    with hub.db.write() as session:
        repo = repos.create_repo(session, admin, "admin", "ink")
        for viewer in (ben, admin, ben):
            likes.like(session, viewer, repo)
        assert session.get_one(Repo, repo.id).likes == 2
        assert {user.name for user in likes.of_repo(session, repo)} == {"admin", "ben"}
        assert [liked.name for _, liked in likes.of_user(session, admin, ben.user)] == ["ink"]
        discussions.start(session, ben, repo, "hello", "text")
        repos.delete_repo(session, admin, repo)
        assert likes.of_user(session, admin, ben.user) == []
