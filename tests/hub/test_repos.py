"""Repos, commits, refs and who may do what with them, through the services."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from sqlmodel import select

from hub.adapters.service import publish
from hub.audit import broken_link
from hub.blobs.store import Sha256, Stored
from hub.context import Hub
from hub.errors import (
    BadField,
    BadName,
    BadPath,
    BadUpload,
    EntryNotFound,
    Forbidden,
    HubError,
    RefExists,
    RepoExists,
    RepoNotFound,
    RevisionNotFound,
    StaleParent,
    Unauthorized,
)
from hub.repos import commits, discussions, holds, pulls, refs
from hub.repos import service as repos
from hub.repos.models import Blob, Commit, CommitEntry, Event, Hold, Ref, Repo
from hub.repos.operations import Add, Copy, Delete, DeleteFolder, Operation
from hub.users import service as users
from hub.users.models import Membership, Role, Scope
from hub.users.service import ANONYMOUS, Viewer
from tests.hub.conftest import both_databases, make_user

pytestmark = both_databases


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
        found = {e.path: e.last_commit_id for e in commits.entries(session, second)}
        assert found == {"a": first.id, "b/c": second.id}
        assert [e.path for e in commits.entries(session, second, "b")] == ["b/c"]
        history, more = commits.history(session, repo, second)
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


def test_a_commit_whose_answer_was_lost_is_made_once(hub: Hub, admin: Viewer) -> None:
    """huggingface_hub's upload_folder sends a commit again after a broken connection or a 5xx; its
    first one names the parent and what is deleted."""
    make_repo(hub, admin)
    base = publish(
        hub,
        admin,
        "admin",
        "ink",
        operations=[put(hub, "a", b"1"), put(hub, "b", b"2")],
        message="1",
    )

    def upload(**named: str) -> str:
        operations = [Delete("a"), put(hub, "c", b"3")]
        return publish(hub, admin, "admin", "ink", operations=operations, **named).id

    def n_commits() -> int:
        with hub.db.read() as session:
            return len(session.exec(select(Commit)).all())

    made = upload(message="2", parent=base.id)
    assert upload(message="2", parent=base.id) == made
    assert upload(message="2") == made
    # Others went on meanwhile.
    publish(hub, admin, "admin", "ink", operations=[put(hub, "d", b"4")], message="3")
    assert upload(message="2", parent=base.id) == made
    assert n_commits() == 4
    for other in ({"message": "another", "parent": base.id}, {"message": "2", "parent": made}):
        with pytest.raises(StaleParent):
            upload(**other)
    with pytest.raises(EntryNotFound):
        upload(message="another")
    with hub.db.write() as session:
        session.get_one(Commit, made).created_at -= timedelta(hours=2)
        head = session.exec(select(Commit).where(Commit.parent_id == made)).one()
        head.created_at -= timedelta(hours=2)
    with pytest.raises(StaleParent):
        upload(message="2", parent=base.id)
    assert n_commits() == 4


def head_of(hub: Hub, viewer: Viewer, name: str = "ink") -> str | None:
    assert viewer.user is not None
    with hub.db.read() as session:
        return repos.get_repo(session, viewer, viewer.user.name, name).head


def paths_of(hub: Hub, commit: Commit) -> list[str]:
    with hub.db.read() as session:
        return [entry.path for entry in commits.entries(session, commit)]


# Names


def test_a_repo_is_found_in_any_case_and_answers_in_its_own(hub: Hub, admin: Viewer) -> None:
    make_repo(hub, admin, "Ink_v1")
    with hub.db.read() as session:
        assert repos.get_repo(session, admin, "ADMIN", "ink_V1").full_name == "admin/Ink_v1"


def test_a_name_is_taken_once(hub: Hub, admin: Viewer) -> None:
    make_repo(hub, admin)
    with hub.db.write() as session:
        with pytest.raises(RepoExists, match="already created this model repo"):
            repos.create_repo(session, admin, "admin", "INK")
        again = repos.create_repo(session, admin, "admin", "ink", exist_ok=True, private=True)
        assert not again.private
        assert repos.create_repo(session, admin, "admin", "ink", type="dataset").id != again.id


@pytest.mark.parametrize(
    ("namespace", "name"), [("api", "x"), ("admin", "a..b"), ("nobody", "x"), ("a/b", "x")]
)
def test_a_bad_name_is_refused(hub: Hub, admin: Viewer, namespace: str, name: str) -> None:
    with hub.db.write() as session, pytest.raises(BadName):
        repos.create_repo(session, admin, namespace, name)


def test_a_deleted_name_is_only_for_its_last_owner_and_admins(hub: Hub, admin: Viewer) -> None:
    ada, bob = organisation_of_two(hub)
    with hub.db.write() as session:
        repo = repos.create_repo(session, ada, "acme", "ink")
        repos.delete_repo(session, ada, repo)
    with hub.db.write() as session:
        with pytest.raises(RepoNotFound):
            repos.get_repo(session, ada, "acme", "ink")
        with pytest.raises(RepoExists, match="stays reserved"):
            repos.create_repo(session, bob, "acme", "INK")
        assert not repos.is_unused(session, "acme/ink")
    with hub.db.write() as session:
        new = repos.create_repo(session, ada, "acme", "ink")
        assert new.id != repo.id
        repos.delete_repo(session, ada, new)
        repos.create_repo(session, admin, "acme", "ink")


def test_a_moved_repo_leaves_a_redirect_for_those_who_may_see_it(hub: Hub, admin: Viewer) -> None:
    ada, bob = organisation_of_two(hub)
    eve, _ = make_user(hub, "eve")
    with hub.db.write() as session:
        repo = repos.create_repo(session, ada, "ada", "ink", private=True)
        repos.move_repo(session, ada, repo, "acme", "paint")
    with hub.db.write() as session:
        with pytest.raises(RepoNotFound):
            repos.get_repo(session, ada, "ada", "ink")
        there = repos.moved_to(session, bob, "ADA", "ink")
        assert there is not None
        assert there.full_name == "acme/paint"
        assert repos.moved_to(session, eve, "ada", "ink") is None
        # And back again: the name was reserved for this repo.
        repos.move_repo(session, ada, there, "ada", "ink")
    with hub.db.read() as session:
        assert repos.get_repo(session, ada, "ada", "ink").id == repo.id
        there = repos.moved_to(session, ada, "acme", "paint")
        assert there is not None
        assert there.id == repo.id


def test_a_repo_cannot_move_onto_another_or_out_of_reach(hub: Hub, admin: Viewer) -> None:
    ada, _ = make_user(hub, "ada")
    make_repo(hub, ada, "ink")
    make_repo(hub, ada, "paint")
    with hub.db.write() as session:
        repo = repos.get_repo(session, ada, "ada", "ink")
        with pytest.raises(RepoExists):
            repos.move_repo(session, ada, repo, "ada", "Paint")
        with pytest.raises(Forbidden):
            repos.move_repo(session, ada, repo, "admin", "ink")


# Who may see and change


def organisation_of_two(hub: Hub) -> tuple[Viewer, Viewer]:
    ada, _ = make_user(hub, "ada")
    bob, _ = make_user(hub, "bob")
    assert ada.user is not None
    with hub.db.write() as session:
        acme = users.create_organization(session, "acme", ada.user)
        session.add(Membership(user_id=bob.user_id, organization_id=acme.id, role=Role.WRITER))
    return ada, bob


def test_a_private_repo_answers_like_a_missing_one(hub: Hub, admin: Viewer) -> None:
    make_repo(hub, admin, "secret", private=True)
    eve, _ = make_user(hub, "eve")
    with hub.db.read() as session:
        for viewer in (ANONYMOUS, eve):
            answers = []
            for name in ("secret", "missing"):
                with pytest.raises(RepoNotFound) as refused:
                    repos.get_repo(session, viewer, "admin", name)
                answers.append((refused.value.message, refused.value.param))
            assert answers[0] == answers[1]
            assert repos.list_repos(session, viewer) == []
        assert [r.name for r in repos.list_repos(session, admin)] == ["secret"]
        assert [r.name for r in repos.list_repos(session, eve, search="cre")] == []


def test_everything_that_changes_a_repo_needs_the_right_to(hub: Hub, admin: Viewer) -> None:
    make_repo(hub, admin)
    with hub.db.write() as session:
        refs.create_tag(session, admin, repos.get_repo(session, admin, "admin", "ink"), "v1")
    head = head_of(hub, admin)
    eve, _ = make_user(hub, "eve")
    reader = Viewer(admin.user, Scope.READ, admin.token_id)
    changes = {
        "create": lambda s, v, r: repos.create_repo(s, v, "admin", "new"),
        "settings": lambda s, v, r: repos.update_settings(s, v, r, private=True),
        "move": lambda s, v, r: repos.move_repo(s, v, r, "eve", "ink"),
        "delete": lambda s, v, r: repos.delete_repo(s, v, r),
        "commit": lambda s, v, r: commits.create(s, v, r, operations=[], message="x"),
        "branch": lambda s, v, r: refs.create_branch(s, v, r, "b"),
        "tag": lambda s, v, r: refs.create_tag(s, v, r, "t"),
        "delete branch": lambda s, v, r: refs.delete_branch(s, v, r, "b"),
        "delete tag": lambda s, v, r: refs.delete_tag(s, v, r, "v1"),
    }
    for what, change in changes.items():
        for viewer, expected in (
            (ANONYMOUS, Unauthorized), (eve, Forbidden), (reader, Forbidden),
        ):  # fmt: skip
            with hub.db.write() as session:
                repo = repos.get_repo(session, viewer, "admin", "ink")
                with pytest.raises(expected):
                    change(session, viewer, repo)
                assert not session.new, what
    assert head_of(hub, admin) == head


def test_visibility_can_be_changed_and_is_told_to_the_catalogue(hub: Hub, admin: Viewer) -> None:
    make_repo(hub, admin)
    with hub.db.write() as session:
        repo = repos.get_repo(session, ANONYMOUS, "admin", "ink")
        repos.update_settings(session, admin, repo, private=True)
    with hub.db.read() as session:
        with pytest.raises(RepoNotFound):
            repos.get_repo(session, ANONYMOUS, "admin", "ink")
        assert len(session.exec(select(Event).where(Event.kind == "repo.visibility")).all()) == 1


def test_repos_are_listed_last_changed_first_in_pages(hub: Hub, admin: Viewer) -> None:
    for name in ("a", "b", "c"):
        make_repo(hub, admin, name)
    publish(hub, admin, "admin", "a", operations=[put(hub, "x", b"1")], message="m")
    with hub.db.read() as session:
        page = repos.list_repos(session, ANONYMOUS, limit=2)
        rest = repos.list_repos(session, ANONYMOUS, limit=2, before=page[-1])
        assert [r.name for r in page + rest] == ["a", "c", "b"]
        assert repos.list_repos(session, ANONYMOUS, search="%") == []
        assert [r.name for r in repos.list_repos(session, ANONYMOUS, search="MIN/B")] == ["b"]
        assert repos.list_repos(session, ANONYMOUS, namespace="eve") == []


# Operations


def test_operations_apply_in_order(hub: Hub, admin: Viewer) -> None:
    make_repo(hub, admin)
    first = publish(
        hub, admin, "admin", "ink", message="1",
        operations=[put(hub, p, p.encode()) for p in ("a", "d/x", "d/e/y", "d0", "keep")],
    )  # fmt: skip
    assert paths_of(hub, first) == ["a", "d/e/y", "d/x", "d0", "keep"]
    second = publish(
        hub, admin, "admin", "ink", message="2",
        operations=[Delete("a"), DeleteFolder("d/"), Copy("keep", "kept/twice"), Copy("d", "f"),
                    put(hub, "a/b", b"now a folder")],
    )  # fmt: skip
    assert paths_of(hub, second) == ["a/b", "d0", "f/e/y", "f/x", "keep", "kept/twice"]
    third = publish(
        hub, admin, "admin", "ink", message="3", operations=[Copy("d/e", "back", first.id)]
    )
    assert "back/y" in paths_of(hub, third)
    assert paths_of(hub, first) == ["a", "d/e/y", "d/x", "d0", "keep"]


def test_a_commit_that_changes_nothing_is_the_present_head(hub: Hub, admin: Viewer) -> None:
    make_repo(hub, admin)
    first = publish(hub, admin, "admin", "ink", operations=[put(hub, "a", b"1")], message="1")
    again = publish(hub, admin, "admin", "ink", operations=[put(hub, "a", b"1")], message="2")
    assert again.id == first.id
    as_lfs = publish(
        hub, admin, "admin", "ink", operations=[put(hub, "a", b"1", True)], message="3"
    )
    assert as_lfs.id != first.id


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (Delete("missing"), EntryNotFound),
        (DeleteFolder("a"), EntryNotFound),
        (Copy("missing", "b"), EntryNotFound),
        (Copy("a", "../b"), BadPath),
        (Copy("a", "b", "no-such-revision"), RevisionNotFound),
        (Add("a/b", Stored(Sha256("0" * 64), "0" * 40, 1), lfs=False), BadPath),
        (Add("a\\b", Stored(Sha256("0" * 64), "0" * 40, 1), lfs=False), BadPath),
        (Add("big", Stored(Sha256("0" * 64), None, 2**40), lfs=False), BadUpload),
    ],
)
def test_one_bad_operation_refuses_the_whole_commit(
    hub: Hub, admin: Viewer, operation: Operation, expected: type[HubError]
) -> None:
    make_repo(hub, admin)
    head = publish(hub, admin, "admin", "ink", operations=[put(hub, "a", b"1")], message="1")
    good = put(hub, "good", b"2")
    with pytest.raises(expected):
        publish(hub, admin, "admin", "ink", operations=[good, operation], message="2")
    assert head_of(hub, admin) == head.id
    with hub.db.read() as session:
        assert len(session.exec(select(Commit)).all()) == 2


@pytest.mark.parametrize("message", ["", "x" * 1001])
def test_a_commit_says_what_it_is(hub: Hub, admin: Viewer, message: str) -> None:
    make_repo(hub, admin)
    with pytest.raises(BadField, match="1 to 1000"):
        publish(hub, admin, "admin", "ink", operations=[put(hub, "a", b"1")], message=message)


def test_two_repos_with_the_same_files_share_bytes_and_no_commit(hub: Hub, admin: Viewer) -> None:
    made = []
    for name in ("a", "b"):
        make_repo(hub, admin, name)
        made.append(
            publish(hub, admin, "admin", name, operations=[put(hub, "x", b"1")], message="m")
        )
    assert made[0].id != made[1].id
    with hub.db.read() as session:
        assert len(session.exec(select(Blob)).all()) == 1


def test_who_had_a_repo_does_not_change_it_where_it_was_moved_to(hub: Hub, admin: Viewer) -> None:
    eve = make_user(hub, "eve")[0]
    with hub.db.write() as session:
        seen = repos.create_repo(session, eve, "eve", "ink")
    with hub.db.write() as session:
        repos.move_repo(session, admin, seen, "admin", "ink")
    for change in (
        lambda session: repos.delete_repo(session, eve, seen),
        lambda session: repos.update_settings(session, eve, seen, private=True),
        lambda session: refs.create_tag(session, eve, seen, "v1"),
    ):
        with pytest.raises(RepoNotFound), hub.db.write() as session:
            change(session)


def test_nobody_takes_part_in_a_repo_that_was_closed_meanwhile(hub: Hub, admin: Viewer) -> None:
    eve = make_user(hub, "eve")[0]
    with hub.db.write() as session:
        seen = repos.create_repo(session, admin, "admin", "ink")
    with hub.db.write() as session:
        number = pulls.propose(session, eve, seen, "mine").num
        repos.update_settings(session, admin, seen, private=True)
    with pytest.raises(RepoNotFound), hub.db.write() as session:
        pulls.propose(session, eve, seen, "another")
    branch, added = f"refs/pr/{number}", [put(hub, "a", b"1")]
    with pytest.raises(RepoNotFound), hub.db.write() as session:
        commits.create(session, eve, seen, branch=branch, operations=added, message="m")
    with hub.db.write() as session:
        assert discussions.start(session, admin, seen, "ours").num == 2


def test_many_writers_at_once_lose_no_commit(hub: Hub, admin: Viewer) -> None:
    make_repo(hub, admin)

    def one(n: int) -> str:
        operations = [put(hub, f"f{n}", str(n).encode())]
        return publish(hub, admin, "admin", "ink", operations=operations, message=f"{n}").id

    with ThreadPoolExecutor(8) as pool:
        made = set(pool.map(one, range(24)))
    with hub.db.read() as session:
        repo = repos.get_repo(session, admin, "admin", "ink")
        head = refs.resolve(session, repo)
        assert len(commits.entries(session, head)) == 24
        history, _ = commits.history(session, repo, head, limit=100)
        assert {commit.id for commit in history[:-1]} == made
        assert broken_link(session) is None


# Revisions


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: Hub, admin: Viewer) -> None:
    make_repo(hub, admin)
    first = publish(hub, admin, "admin", "ink", operations=[put(hub, "a", b"1")], message="1")
    second = publish(hub, admin, "admin", "ink", operations=[put(hub, "a", b"2")], message="2")
    with hub.db.write() as session:
        repo = repos.get_repo(session, admin, "admin", "ink")
        refs.create_tag(session, admin, repo, "v1", first.id[:9])
        refs.create_branch(session, admin, repo, "dev", "v1")
        refs.create_branch(session, admin, repo, "both", "main")
        refs.create_tag(session, admin, repo, "both", "v1")
    on_dev = publish(
        hub, admin, "admin", "ink", branch="dev", operations=[put(hub, "b", b"3")], message="3"
    )
    with hub.db.read() as session:
        repo = repos.get_repo(session, admin, "admin", "ink")
        expected = {
            "main": second, "refs/heads/main": second, "v1": first, "refs/tags/v1": first,
            "dev": on_dev, "both": second, "refs/tags/both": first, first.id: first,
            first.id[:7]: first, first.id.upper(): first,
        }  # fmt: skip
        assert {r: refs.resolve(session, repo, r).id for r in expected} == {
            r: c.id for r, c in expected.items()
        }
        for revision in ("nope", "", first.id[:6], "0" * 40, "refs/heads/v1", "refs/pr/1", "%"):
            with pytest.raises(RevisionNotFound):
                refs.resolve(session, repo, revision)
        named = refs.of_repo(session, repo)
        assert named.branches == {"both": second.id, "dev": on_dev.id, "main": second.id}
        assert named.tags == {"both": first.id, "v1": first.id}
        assert repo.head == second.id


def test_a_commit_of_another_repo_is_not_a_revision_of_this_one(hub: Hub, admin: Viewer) -> None:
    make_repo(hub, admin, "a", private=True)
    make_repo(hub, admin, "b")
    secret = publish(hub, admin, "admin", "a", operations=[put(hub, "x", b"1")], message="m")
    with hub.db.read() as session:
        repo = repos.get_repo(session, ANONYMOUS, "admin", "b")
        with pytest.raises(RevisionNotFound):
            refs.resolve(session, repo, secret.id)


def test_a_ref_is_made_once_and_main_stays(hub: Hub, admin: Viewer) -> None:
    make_repo(hub, admin)
    with hub.db.write() as session:
        repo = repos.get_repo(session, admin, "admin", "ink")
        with pytest.raises(RefExists, match="Reference refs/heads/main already exists"):
            refs.create_branch(session, admin, repo, "main")
        with pytest.raises(BadName, match="Cannot delete refs/heads/main"):
            refs.delete_branch(session, admin, repo, "main")
        with pytest.raises(BadName):
            refs.create_branch(session, admin, repo, "refs/pr/5")
        with pytest.raises(RevisionNotFound):
            refs.delete_tag(session, admin, repo, "main")
        refs.create_branch(session, admin, repo, "b")
        refs.delete_branch(session, admin, repo, "b")
        assert refs.of_repo(session, repo).branches.keys() == {"main"}


def test_what_is_not_there_names_the_commit_that_was_looked_in(hub: Hub, admin: Viewer) -> None:
    make_repo(hub, admin)
    head = publish(hub, admin, "admin", "ink", operations=[put(hub, "a/b", b"1")], message="1")
    with hub.db.read() as session:
        assert commits.entry(session, head, "a/b").size == 1
        for look in (commits.entry, commits.entries):
            with pytest.raises(EntryNotFound) as refused:
                look(session, head, "A")
            assert refused.value.commit == head.id


# Bytes by their digest


def test_knowing_a_digest_is_no_right_to_the_bytes(hub: Hub, admin: Viewer) -> None:
    make_repo(hub, admin, "secret", private=True)
    added = put(hub, "x", b"1")
    publish(hub, admin, "admin", "secret", operations=[added], message="m")
    eve, _ = make_user(hub, "eve")
    with hub.db.write() as session:
        assert holds.known(session, admin, added.stored.sha256) == added.stored
        assert holds.known(session, eve, added.stored.sha256) is None
        assert holds.known(session, ANONYMOUS, added.stored.sha256) is None
        holds.hold(session, eve, added.stored)
        holds.hold(session, eve, added.stored)
    with hub.db.write() as session:
        assert holds.known(session, eve, added.stored.sha256) == added.stored
        assert len(session.exec(select(Hold)).all()) == 1
        repo = repos.get_repo(session, admin, "admin", "secret")
        repos.update_settings(session, admin, repo, private=False)
        assert holds.known(session, ANONYMOUS, added.stored.sha256) == added.stored


def test_downloads_are_added_up(hub: Hub, admin: Viewer) -> None:
    make_repo(hub, admin)
    with hub.db.read() as session:
        repo = repos.get_repo(session, admin, "admin", "ink")
    for _ in range(3):
        hub.downloads.count(repo)
    hub.downloads.flush(hub.db)
    hub.downloads.flush(hub.db)
    with hub.db.read() as session:
        assert repos.get_repo(session, admin, "admin", "ink").downloads == 3


def test_deleting_a_repo_leaves_no_row_of_it_but_the_audit(hub: Hub, admin: Viewer) -> None:
    make_repo(hub, admin)
    publish(hub, admin, "admin", "ink", operations=[put(hub, "a", b"1")], message="1")
    with hub.db.write() as session:
        repos.delete_repo(session, admin, repos.get_repo(session, admin, "admin", "ink"))
    with hub.db.read() as session:
        for table in (Repo, Commit, CommitEntry, Ref):
            assert session.exec(select(table)).all() == []
        assert len(session.exec(select(Blob)).all()) == 1
        assert broken_link(session) is None
