"""Conversations about a repo and, as far as they are conversations, its pull requests.

Whoever may read a repo may open one, comment and push to their own pull request; merging, and
closing what others opened, is for those who may write to the repo.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, func
from sqlmodel import Session, col, select

from hub.db import now
from hub.errors import BadField, Conflict, DiscussionNotFound, Forbidden
from hub.repos import permissions
from hub.repos.changes import locked, tell
from hub.repos.models import (
    Discussion,
    DiscussionEvent,
    DiscussionStatus,
    EventKind,
    Repo,
)
from hub.users import service as users
from hub.users.models import User
from hub.users.service import Viewer

OPEN = (DiscussionStatus.OPEN, DiscussionStatus.DRAFT)
MAX_TITLE = 300
MAX_TEXT = 2**16
PAGE = 50


def start(session: Session, viewer: Viewer, repo: Repo, title: str, text: str = "") -> Discussion:
    """A new discussion, with its first comment."""
    user = permissions.require_participant(session, viewer, repo)
    repo = locked(session, repo)
    made = insert(session, repo, user, title, text, None)
    announce(session, "discussion.created", repo, made)
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
        is_open = col(Discussion.status).in_(OPEN)
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
    n_open = sum(n for status, n in found.items() if status in OPEN)
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
    lock(session, discussion)
    made = add_event(session, discussion, user, EventKind.COMMENT, _text(text))
    announce(session, "comment.created", repo, discussion, made)
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
    announce(session, "comment.updated", repo, discussion, event)
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
    announce(session, "comment.updated", repo, discussion, event)
    return event


def rename(
    session: Session, viewer: Viewer, repo: Repo, discussion: Discussion, title: str
) -> DiscussionEvent:
    """For its author and who may write to the repo."""
    user = permissions.require_participant(session, viewer, repo)
    _require_owner(session, viewer, repo, discussion.author_id, user)
    lock(session, discussion)
    old, discussion.title = discussion.title, _title(title)
    session.add(discussion)
    announce(session, "discussion.updated", repo, discussion)
    return add_event(session, discussion, user, EventKind.TITLE, discussion.title, before=old)


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
    lock(session, discussion)
    if discussion.status == DiscussionStatus.MERGED:
        raise Conflict(f"discussion {discussion.num} was merged")
    if text:
        said = add_event(session, discussion, user, EventKind.COMMENT, _text(text))
        announce(session, "comment.created", repo, discussion, said)
    old, discussion.status = discussion.status, status
    session.add(discussion)
    announce(session, "discussion.updated", repo, discussion)
    return add_event(session, discussion, user, EventKind.STATUS, status, before=old)


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
        may_merge=may_write and discussion.is_pull_request and discussion.status in OPEN,
        may_write=may_write,
    )


def _is_pull_request(wanted: bool) -> ColumnElement[bool]:
    target = col(Discussion.target)
    return target.is_not(None) if wanted else target.is_(None)


def insert(
    session: Session, repo: Repo, user: User, title: str, text: str, target: str | None
) -> Discussion:
    """A new one of a locked repo, with the next number and its first comment, if it has one."""
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
        add_event(session, made, user, EventKind.COMMENT, _text(text))
    return made


def lock(session: Session, discussion: Discussion) -> None:
    """Read the row as it is now; others who would change it wait from here on."""
    key = (discussion.repo_id, discussion.num)
    if session.get(Discussion, key, with_for_update=True, populate_existing=True) is None:
        raise DiscussionNotFound(f"there is no discussion {discussion.num} any more", "num")


def add_event(
    session: Session,
    discussion: Discussion,
    user: User,
    kind: EventKind,
    text: str,
    *,
    before: str = "",
) -> DiscussionEvent:
    """What happened, as a row of the conversation."""
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


def announce(
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
