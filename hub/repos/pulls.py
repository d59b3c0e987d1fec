"""Pull requests: a branch of their own with a proposal in it, and a discussion about it."""

import itertools
from dataclasses import dataclass

from sqlalchemy import literal
from sqlmodel import Session, col, select

from hub.errors import BadRequest, Conflict
from hub.repos import discussions, history, permissions, refs
from hub.repos import operations as ops
from hub.repos.changes import locked
from hub.repos.commits import advance, entries
from hub.repos.models import (
    Commit,
    Discussion,
    DiscussionStatus,
    EventKind,
    Ref,
    RefKind,
    Repo,
)
from hub.repos.refs import MAIN
from hub.users.service import Viewer


def propose(
    session: Session,
    viewer: Viewer,
    repo: Repo,
    title: str,
    text: str = "",
    *,
    branch: str = MAIN,
    parent: str | None = None,
    is_draft: bool = False,
) -> Discussion:
    """A new pull request for a branch: `refs/pr/<num>` begins at its head, or at `parent`.

    RevisionNotFound without the branch.
    """
    user = permissions.require_participant(session, viewer, repo)
    repo = locked(session, repo)
    target = refs.branch(session, repo, branch)
    if target.kind != RefKind.BRANCH:
        raise BadRequest("a pull request is made for a branch", "revision")
    begins = refs.resolve(session, repo, parent).id if parent is not None else target.commit_id
    made = discussions.insert(session, repo, user, title, text, target.name)
    if is_draft:
        made.status = DiscussionStatus.DRAFT
    assert repo.id is not None
    pull = Ref(repo_id=repo.id, kind=RefKind.PULL, name=str(made.num), commit_id=begins)
    session.add(pull)
    session.flush()
    discussions.announce(session, "discussion.created", repo, made)
    return made


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a pull request would do: the files after it, and the paths that cannot be merged."""

    after: ops.Files
    conflicts: list[str]


def proposal(session: Session, repo: Repo, discussion: Discussion) -> Proposal:
    """The three-way merge of the pull request's branch into its target."""
    pull = refs.branch(session, repo, f"refs/pr/{discussion.num}")
    target = refs.branch(session, repo, discussion.target or "")
    base = _common(session, target.commit_id, pull.commit_id)
    ours, theirs = _files(session, target.commit_id), _files(session, pull.commit_id)
    return Proposal(*history.merged(base=_files(session, base), ours=ours, theirs=theirs))


@dataclass(frozen=True, slots=True)
class Change:
    """A file that a pull request adds (no `before`), removes (no `after`) or changes."""

    path: str
    before: ops.File | None
    after: ops.File | None


def changes(session: Session, repo: Repo, discussion: Discussion) -> list[Change]:
    """What a pull request changes since it left its target, by path.

    RevisionNotFound if its target is gone.
    """
    pull = refs.branch(session, repo, f"refs/pr/{discussion.num}")
    target = refs.branch(session, repo, discussion.target or "")
    before = _files(session, _common(session, target.commit_id, pull.commit_id))
    after = _files(session, pull.commit_id)
    return [
        Change(path, before.get(path), after.get(path))
        for path in sorted(before.keys() | after.keys())
        if before.get(path) != after.get(path)
    ]


def merge(
    session: Session, viewer: Viewer, repo: Repo, discussion: Discussion, text: str = ""
) -> Commit:
    """One new commit on the target with what the pull request changes; Conflict names a file."""
    user = permissions.require_writer(session, viewer, repo.namespace, repo.name)
    repo = locked(session, repo)
    discussions.lock(session, discussion)
    if not discussion.is_pull_request:
        raise BadRequest(f"discussion {discussion.num} is no pull request")
    if discussion.status not in discussions.OPEN:
        raise Conflict(f"pull request {discussion.num} is {discussion.status}")
    found = proposal(session, repo, discussion)
    if found.conflicts:
        raise Conflict(f"{found.conflicts[0]} was changed in {discussion.target} too")
    target = refs.branch(session, repo, discussion.target or "")
    head = session.get_one(Commit, target.commit_id)
    before = {entry.path: entry for entry in entries(session, head)}
    made = head
    if found.after != ops.files_of(before.values()):
        message = f"{discussion.title} (#{discussion.num})"
        made = advance(session, user, repo, target, before, found.after, message, text)
    old, discussion.status = discussion.status, DiscussionStatus.MERGED
    discussion.merged_as = made.id
    session.add(discussion)
    discussions.add_event(
        session, discussion, user, EventKind.STATUS, DiscussionStatus.MERGED, before=old
    )
    discussions.announce(session, "discussion.updated", repo, discussion)
    return made


def commits(session: Session, repo: Repo, discussion: Discussion) -> list[Commit]:
    """What was pushed to the pull request, oldest first."""
    pull = session.get(Ref, (repo.id, RefKind.PULL, str(discussion.num)))
    target = session.get(Ref, (repo.id, RefKind.BRANCH, discussion.target or ""))
    if pull is None:
        return []
    known = set(_history(session, target.commit_id)) if target is not None else set()
    own = itertools.takewhile(lambda c: c not in known, _history(session, pull.commit_id))
    return [session.get_one(Commit, commit_id) for commit_id in own][::-1]


def _files(session: Session, commit_id: str | None) -> ops.Files:
    if commit_id is None:
        return {}
    return ops.files_of(entries(session, session.get_one(Commit, commit_id)))


def _common(session: Session, one: str, other: str) -> str | None:
    """The newest commit that both histories have."""
    ancestors = set(_history(session, one))
    return next((commit for commit in _history(session, other) if commit in ancestors), None)


def _history(session: Session, commit_id: str) -> list[str]:
    """The commit and all before it, newest first."""
    newest = select(Commit.id, Commit.parent_id, literal(0).label("depth"))
    line = newest.where(Commit.id == commit_id).cte(recursive=True)
    older = select(Commit.id, Commit.parent_id, line.c.depth + 1)
    line = line.union_all(older.join(line, col(Commit.id) == line.c.parent_id))
    return list(session.exec(select(line.c.id).order_by(line.c.depth)))
