"""Discussions and pull requests as Hugging Face clients see them."""

from contextlib import suppress
from typing import Annotated, Any, Literal

from fastapi import Body, Query
from sqlmodel import Session

from hub.adapters.service import try_to_project
from hub.deps import HubDep, ReadSession, WriterDep, WriteSession
from hub.errors import BadRequest, NotImplementedHere, RevisionNotFound
from hub.hf import bodies, info
from hub.hf.deps import RepoDep
from hub.hf.routing import hf_router
from hub.repos import commits, discussions, pulls, refs
from hub.repos.models import (
    Commit,
    Discussion,
    DiscussionEvent,
    DiscussionStatus,
    EventKind,
    Repo,
    RepoType,
)
from hub.users.models import User

ALL = "/api/{kind:repos}/{namespace}/{name}/discussions"
ONE = ALL + "/{num}"

router = hf_router()


@router.get(ALL)
def listed(
    session: ReadSession,
    repo: RepoDep,
    type: Literal["all", "discussion", "pull_request"] = "all",
    status: Literal["all", "open", "closed"] = "all",
    author: Annotated[str | None, Query(max_length=96)] = None,
    p: Annotated[int, Query(ge=0, le=10**6)] = 0,
) -> dict[str, Any]:
    """Page `p`, newest first."""
    _require_safe_to_list(session, repo)
    page = discussions.listed(
        session,
        repo,
        number=p,
        is_pull_request=None if type == "all" else type == "pull_request",
        status=None if status == "all" else status,
        author=author,
    )
    return {
        "discussions": [_item(repo, found, user) for found, user in page.discussions],
        "start": page.start,
        "count": page.total,
    }


def _require_safe_to_list(session: Session, repo: Repo) -> None:
    """Keeps transformers (5.23) from telling a service of Hugging Face the name and the token.

    It does so in a background thread for repos with pickled weights only, once this list has
    answered without a pull request that adds safetensors.
    """
    if repo.type != RepoType.MODEL:
        return
    paths = [entry.path for entry in commits.entries(session, refs.resolve(session, repo))]
    is_pickled = any(path.endswith(".bin") for path in paths)
    if is_pickled and not any(path.endswith(".safetensors") for path in paths):
        raise NotImplementedHere("discussions are not listed for repos of pickled weights alone")


@router.get(ONE)
def read(session: ReadSession, repo: RepoDep, num: int) -> dict[str, Any]:
    """One with all its events; a pull request with what it would do."""
    found = discussions.get(session, repo, num)
    author = session.get(User, found.author_id) if found.author_id is not None else None
    events = [_event(event, user) for event, user in discussions.events(session, found)]
    events += [_commit_event(item) for item in pulls.commits(session, repo, found)]
    answer = _item(repo, found, author) | {"events": sorted(events, key=lambda e: e["createdAt"])}
    if not found.is_pull_request:
        return answer
    conflicts: list[str] = []
    if found.status in (DiscussionStatus.OPEN, DiscussionStatus.DRAFT):
        with suppress(RevisionNotFound):  # of a target that was deleted
            conflicts = pulls.proposal(session, repo, found).conflicts
    changes: dict[str, Any] = {"base": f"refs/heads/{found.target}"}
    if found.merged_as is not None:
        changes["mergeCommitId"] = found.merged_as
    # No textual diff: what lies here is tensors.
    return answer | {"changes": changes, "filesWithConflicts": conflicts, "diff": ""}


@router.post(ALL)
def create(
    session: WriteSession, viewer: WriterDep, repo: RepoDep, body: bodies.NewDiscussion
) -> dict[str, Any]:
    """A pull request starts as a draft, without commits."""
    if body.pullRequest:
        made = pulls.propose(session, viewer, repo, body.title, body.description, is_draft=True)
    else:
        made = discussions.start(session, viewer, repo, body.title, body.description)
    return {"num": made.num, "pullRequest": made.is_pull_request}


@router.post(ONE + "/comment")
def comment(
    session: WriteSession, viewer: WriterDep, repo: RepoDep, num: int, body: bodies.Comment
) -> dict[str, Any]:
    found = discussions.get(session, repo, num)
    made = discussions.comment(session, viewer, repo, found, body.comment)
    return {"newMessage": _event(made, viewer.user)}


@router.post(ONE + "/comment/{comment_id}/edit")
def edit(
    session: WriteSession,
    viewer: WriterDep,
    repo: RepoDep,
    num: int,
    comment_id: str,
    body: bodies.Edit,
) -> dict[str, Any]:
    found = discussions.get(session, repo, num)
    done = discussions.edit(session, viewer, repo, found, _id_of(comment_id), body.content)
    return {"updatedComment": _event(done, viewer.user)}


@router.post(ONE + "/comment/{comment_id}/hide")
def hide(
    session: WriteSession, viewer: WriterDep, repo: RepoDep, num: int, comment_id: str
) -> dict[str, Any]:
    found = discussions.get(session, repo, num)
    done = discussions.hide(session, viewer, repo, found, _id_of(comment_id))
    author = session.get(User, done.author_id) if done.author_id is not None else None
    return {"updatedComment": _event(done, author)}


@router.post(ONE + "/title")
def rename(
    session: WriteSession, viewer: WriterDep, repo: RepoDep, num: int, body: bodies.Title
) -> dict[str, Any]:
    found = discussions.get(session, repo, num)
    done = discussions.rename(session, viewer, repo, found, body.title)
    return {"newTitle": _event(done, viewer.user)}


@router.post(ONE + "/status")
def set_status(
    session: WriteSession, viewer: WriterDep, repo: RepoDep, num: int, body: bodies.Status
) -> dict[str, Any]:
    found = discussions.get(session, repo, num)
    text = body.comment or ""
    done = discussions.set_status(session, viewer, repo, found, body.status, text)
    return {"newStatus": _event(done, viewer.user)}


@router.post(ONE + "/merge")
def merge(
    hub: HubDep,
    viewer: WriterDep,
    repo: RepoDep,
    num: int,
    body: Annotated[bodies.Merge | None, Body()] = None,
) -> dict[str, Any]:
    text = (body.comment if body is not None else None) or ""
    with hub.db.write() as session:
        found = discussions.get(session, repo, num)
        made = pulls.merge(session, viewer, repo, found, text)
    try_to_project(hub, made.repo_id)
    return {"mergeCommitId": made.id}


def _id_of(text: str) -> int:
    """Ids of events are shown as 24 hexadecimal digits."""
    try:
        return min(int(text, 16), 2**63 - 1)
    except ValueError:
        raise BadRequest(f"{text[:50]!r} is no id of a comment", "comment") from None


def _item(repo: Repo, found: Discussion, author: User | None) -> dict[str, Any]:
    return {
        "num": found.num,
        "title": found.title,
        "status": found.status,
        "isPullRequest": found.is_pull_request,
        "createdAt": info.date(found.created_at),
        "author": _author(author),
        "repo": {"name": repo.full_name, "type": repo.type},
    }


def _event(event: DiscussionEvent, author: User | None) -> dict[str, Any]:
    data: dict[str, Any]
    match event.kind:
        case EventKind.COMMENT:
            # Markdown, to be made safe by whoever shows it; no HTML of ours beside it.
            latest = {"raw": event.text, "html": ""}
            data = {"edited": event.is_edited, "hidden": event.is_hidden, "latest": latest}
        case EventKind.STATUS:
            data = {"status": event.text}
        case _:
            data = {"from": event.before, "to": event.text}
    return {
        "id": f"{event.id:024x}",
        "type": event.kind,
        "createdAt": info.date(event.created_at),
        "author": _author(author),
        "data": data,
    }


def _commit_event(commit: Commit) -> dict[str, Any]:
    return {
        "id": commit.id[:24],
        "type": "commit",
        "createdAt": info.date(commit.created_at),
        "author": {"name": commit.author, "type": "user"},
        "data": {"oid": commit.id, "subject": commit.message},
    }


def _author(user: User | None) -> dict[str, Any]:
    if user is None:
        return {"name": "deleted", "type": "user"}
    return {"name": user.name, "fullname": user.full_name or user.name, "type": "user"}
