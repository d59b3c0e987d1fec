"""Conversations about a repo, and pull requests: a branch of their own with a proposal in it.

Whoever may read a repo may open one, comment and push to their own pull request; merging, and
closing what others opened, is for those who may write to the repo.
"""

import itertools
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, func, literal
from sqlmodel import Session, col, select

from hub.db import now
from hub.errors import BadField, BadRequest, Conflict, DiscussionNotFound, Forbidden
from hub.repos import history, permissions, refs
from hub.repos import operations as ops
from hub.repos.changes import locked, tell
from hub.repos.commits import advance, entries
from hub.repos.models import (
    Commit,
    Discussion,
    DiscussionEvent,
    DiscussionStatus,
    EventKind,
    Ref,
    RefKind,
    Repo,
)
from hub.repos.refs import MAIN
from hub.users import service as users
from hub.users.models import User
from hub.users.service import Viewer

_OPEN = (DiscussionStatus.OPEN, DiscussionStatus.DRAFT)
MAX_TITLE = 300
MAX_TEXT = 2**16
PAGE = 50


def start(session: Session, viewer: Viewer, repo: Repo, title: str, text: str = "") -> Discussion:
    """A new discussion, with its first comment."""
    user = permissions.require_participant(session, viewer, repo)
    repo = locked(session, repo)
    made = _insert(session, repo, user, title, text, None)
    _announce(session, "discussion.created", repo, made)
    return made


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
    made = _insert(session, repo, user, title, text, target.name)
    if is_draft:
        made.status = DiscussionStatus.DRAFT
    assert repo.id is not None
    pull = Ref(repo_id=repo.id, kind=RefKind.PULL, name=str(made.num), commit_id=begins)
    session.add(pull)
    session.flush()
    _announce(session, "discussion.created", repo, made)
    return made


@dataclass(frozen=True, slots=True)
class Page:
    """`total` counts all that fit, `start` those before this page."""

    discussions: list[tuple[Discussion, User | None]]
    start: int
    total: int


def listed(
    session: Session,
    repo: Repo,
    *,
    number: int = 0,
    is_pull_request: bool | None = None,
    status: str | None = None,
    author: str | None = None,
) -> Page:
    """Page `number` of a repo's discussions, newest first; `status` is open, closed or None."""
    query = (
        select(Discussion, User)
        .join(User, col(User.id) == col(Discussion.author_id), isouter=True)
        .where(Discussion.repo_id == repo.id)
    )
    if is_pull_request is not None:
        query = query.where(_is_pull_request(is_pull_request))
    if status is not None:
        is_open = col(Discussion.status).in_(_OPEN)
        query = query.where(is_open if status == DiscussionStatus.OPEN else ~is_open)
    if author is not None:
        query = query.where(func.lower(User.name) == author.lower())
    total = session.exec(select(func.count()).select_from(query.subquery())).one()
    start = number * PAGE
    newest_first = query.order_by(col(Discussion.num).desc()).offset(start).limit(PAGE)
    return Page([(item, user) for item, user in session.exec(newest_first)], start, total)


@dataclass(frozen=True, slots=True)
class Counts:
    """How many discussions of a repo are open, drafts too, and how many are over."""

    open: int
    closed: int


def counts(session: Session, repo: Repo, *, is_pull_request: bool | None = None) -> Counts:
    query = select(Discussion.status, func.count()).where(Discussion.repo_id == repo.id)
    if is_pull_request is not None:
        query = query.where(_is_pull_request(is_pull_request))
    found = dict(session.exec(query.group_by(Discussion.status)).all())
    n_open = sum(n for status, n in found.items() if status in _OPEN)
    return Counts(n_open, sum(found.values()) - n_open)


def n_comments(session: Session, repo: Repo, numbers: Collection[int]) -> dict[int, int]:
    """By number, how many comments discussions have; those without any are left out."""
    query = (
        select(DiscussionEvent.num, func.count())
        .where(DiscussionEvent.repo_id == repo.id, DiscussionEvent.kind == EventKind.COMMENT)
        .where(col(DiscussionEvent.num).in_(numbers))
        .group_by(col(DiscussionEvent.num))
    )
    return dict(session.exec(query).all())


def get(session: Session, repo: Repo, num: int) -> Discussion:
    """DiscussionNotFound."""
    found = session.get(Discussion, (repo.id, num)) if 0 < num < 2**31 else None
    if found is None:
        raise DiscussionNotFound(f"{repo.full_name} has no discussion {num}", "num")
    return found


def events(session: Session, discussion: Discussion) -> list[tuple[DiscussionEvent, User | None]]:
    """Everything that happened, oldest first."""
    query = (
        select(DiscussionEvent, User)
        .join(User, col(User.id) == col(DiscussionEvent.author_id), isouter=True)
        .where(DiscussionEvent.repo_id == discussion.repo_id, DiscussionEvent.num == discussion.num)
        .order_by(col(DiscussionEvent.id))
    )
    return [(event, user) for event, user in session.exec(query)]


def comment(
    session: Session, viewer: Viewer, repo: Repo, discussion: Discussion, text: str
) -> DiscussionEvent:
    user = permissions.require_participant(session, viewer, repo)
    _lock(session, discussion)
    made = _tell(session, discussion, user, EventKind.COMMENT, _text(text))
    _announce(session, "comment.created", repo, discussion, made)
    return made


def edit(
    session: Session,
    viewer: Viewer,
    repo: Repo,
    discussion: Discussion,
    event_id: int,
    text: str,
) -> DiscussionEvent:
    """Forbidden for all but its author."""
    user = permissions.require_participant(session, viewer, repo)
    event = _comment(session, discussion, event_id)
    if event.author_id != user.id:
        raise Forbidden("a comment is edited by its author alone")
    event.text, event.is_edited = _text(text), True
    session.add(event)
    _announce(session, "comment.updated", repo, discussion, event)
    return event


def hide(
    session: Session, viewer: Viewer, repo: Repo, discussion: Discussion, event_id: int
) -> DiscussionEvent:
    """For its author and who may write to the repo; the text is gone for ever."""
    user = permissions.require_participant(session, viewer, repo)
    event = _comment(session, discussion, event_id)
    _require_owner(session, viewer, repo, event.author_id, user)
    event.text, event.is_hidden = "", True
    session.add(event)
    _announce(session, "comment.updated", repo, discussion, event)
    return event


def rename(
    session: Session, viewer: Viewer, repo: Repo, discussion: Discussion, title: str
) -> DiscussionEvent:
    """For its author and who may write to the repo."""
    user = permissions.require_participant(session, viewer, repo)
    _require_owner(session, viewer, repo, discussion.author_id, user)
    _lock(session, discussion)
    old, discussion.title = discussion.title, _title(title)
    session.add(discussion)
    _announce(session, "discussion.updated", repo, discussion)
    return _tell(session, discussion, user, EventKind.TITLE, discussion.title, before=old)


def set_status(
    session: Session,
    viewer: Viewer,
    repo: Repo,
    discussion: Discussion,
    status: DiscussionStatus,
    text: str = "",
) -> DiscussionEvent:
    """Open or close; for its author and who may write to the repo. A merged one stays merged."""
    user = permissions.require_participant(session, viewer, repo)
    _require_owner(session, viewer, repo, discussion.author_id, user)
    if status not in (DiscussionStatus.OPEN, DiscussionStatus.CLOSED):
        raise BadField("a discussion is opened or closed", "status")
    _lock(session, discussion)
    if discussion.status == DiscussionStatus.MERGED:
        raise Conflict(f"discussion {discussion.num} was merged")
    if text:
        said = _tell(session, discussion, user, EventKind.COMMENT, _text(text))
        _announce(session, "comment.created", repo, discussion, said)
    old, discussion.status = discussion.status, status
    session.add(discussion)
    _announce(session, "discussion.updated", repo, discussion)
    return _tell(session, discussion, user, EventKind.STATUS, status, before=old)


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


@dataclass(frozen=True, slots=True)
class Rights:
    """What a viewer would not be refused in a discussion."""

    user_id: int | None
    may_comment: bool
    may_rename: bool
    may_close: bool
    may_merge: bool
    may_write: bool

    def may_edit(self, event: DiscussionEvent) -> bool:
        """A comment; the same for `may_hide`."""
        return self.may_comment and event.author_id is not None and event.author_id == self.user_id

    def may_hide(self, event: DiscussionEvent) -> bool:
        return self.may_write or self.may_edit(event)


def rights(session: Session, viewer: Viewer, repo: Repo, discussion: Discussion) -> Rights:
    takes_part = permissions.may_participate(viewer, repo)
    may_write = users.may_write(session, viewer, repo.namespace, repo.name)
    is_owner = takes_part and _is_owner(session, viewer, repo, discussion.author_id)
    return Rights(
        user_id=viewer.user_id,
        may_comment=takes_part,
        may_rename=is_owner,
        may_close=is_owner and discussion.status != DiscussionStatus.MERGED,
        may_merge=may_write and discussion.is_pull_request and discussion.status in _OPEN,
        may_write=may_write,
    )


def merge(
    session: Session, viewer: Viewer, repo: Repo, discussion: Discussion, text: str = ""
) -> Commit:
    """One new commit on the target with what the pull request changes; Conflict names a file."""
    user = permissions.require_writer(session, viewer, repo.namespace, repo.name)
    repo = locked(session, repo)
    _lock(session, discussion)
    if not discussion.is_pull_request:
        raise BadRequest(f"discussion {discussion.num} is no pull request")
    if discussion.status not in _OPEN:
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
    _tell(session, discussion, user, EventKind.STATUS, DiscussionStatus.MERGED, before=old)
    _announce(session, "discussion.updated", repo, discussion)
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


def _is_pull_request(wanted: bool) -> ColumnElement[bool]:
    target = col(Discussion.target)
    return target.is_not(None) if wanted else target.is_(None)


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


def _insert(
    session: Session, repo: Repo, user: User, title: str, text: str, target: str | None
) -> Discussion:
    assert repo.id is not None
    last = session.exec(
        select(func.max(Discussion.num)).where(Discussion.repo_id == repo.id)
    ).first()
    made = Discussion(
        repo_id=repo.id,
        num=(last or 0) + 1,
        author_id=user.id,
        title=_title(title),
        target=target,
        created_at=now(),
    )
    session.add(made)
    session.flush()
    if text:
        _tell(session, made, user, EventKind.COMMENT, _text(text))
    return made


def _lock(session: Session, discussion: Discussion) -> None:
    """Read the row as it is now; others who would change it wait from here on."""
    key = (discussion.repo_id, discussion.num)
    if session.get(Discussion, key, with_for_update=True, populate_existing=True) is None:
        raise DiscussionNotFound(f"there is no discussion {discussion.num} any more", "num")


def _tell(
    session: Session,
    discussion: Discussion,
    user: User,
    kind: EventKind,
    text: str,
    *,
    before: str = "",
) -> DiscussionEvent:
    event = DiscussionEvent(
        repo_id=discussion.repo_id,
        num=discussion.num,
        author_id=user.id,
        kind=kind,
        before=before,
        text=text,
        created_at=now(),
    )
    session.add(event)
    session.flush()
    return event


def _announce(
    session: Session,
    kind: str,
    repo: Repo,
    discussion: Discussion,
    comment: DiscussionEvent | None = None,
) -> None:
    """To the outbox, for webhooks alone: the catalogue shows no discussions.

    Without the text of a comment, which would outlive its hiding there.
    """
    about: dict[str, Any] = {
        "num": discussion.num,
        "title": discussion.title,
        "status": discussion.status,
        "author": discussion.author_id,
        "base": discussion.target,
        "merged_as": discussion.merged_as,
    }
    said: dict[str, Any] = {}
    if comment is not None:
        said["comment"] = {
            "id": comment.id,
            "author": comment.author_id,
        }
    event = tell(session, kind, repo, discussion=about, **said)
    event.done_at = now()


def _comment(session: Session, discussion: Discussion, event_id: int) -> DiscussionEvent:
    event = session.get(DiscussionEvent, event_id, with_for_update=True)
    is_here = event is not None and (event.repo_id, event.num, event.kind) == (
        discussion.repo_id,
        discussion.num,
        EventKind.COMMENT,
    )
    if event is None or not is_here or event.is_hidden:
        raise DiscussionNotFound(f"discussion {discussion.num} has no such comment", "comment")
    return event


def _require_owner(
    session: Session, viewer: Viewer, repo: Repo, author_id: int | None, user: User
) -> None:
    if not _is_owner(session, viewer, repo, author_id):
        raise Forbidden(f"{user.name} may not change this in {repo.full_name}")


def _is_owner(session: Session, viewer: Viewer, repo: Repo, author_id: int | None) -> bool:
    """Its author, or who may write to the repo."""
    is_author = author_id is not None and author_id == viewer.user_id
    return is_author or users.may_write(session, viewer, repo.namespace, repo.name)


def _title(title: str) -> str:
    title = " ".join(title.split())
    if not 1 <= len(title) <= MAX_TITLE:
        raise BadField(f"a title has 1 to {MAX_TITLE} characters", "title")
    return title


def _text(text: str) -> str:
    if not 1 <= len(text) <= MAX_TEXT:
        raise BadField(f"a comment has 1 to {MAX_TEXT} characters", "comment")
    return text
