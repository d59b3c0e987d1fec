"""Discussions and pull requests of a repo: the list, one with all that happened, and their forms."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Form, Query, Request
from fastapi.responses import Response
from markupsafe import Markup
from sqlmodel import Session

from hub.adapters.service import try_to_project
from hub.context import Hub
from hub.deps import HubDep, ReadSession, ViewerDep, WriterDep
from hub.errors import HubError, RevisionNotFound
from hub.repos import discussions, permissions, pulls, refs
from hub.repos.discussions import Rights
from hub.repos.models import Commit, Discussion, DiscussionEvent, DiscussionStatus, EventKind, Repo
from hub.users.models import User
from hub.users.service import Viewer
from hub.web.markdown import card_html
from hub.web.proposal import MAX_FILES, ChangedFile, changed_files
from hub.web.render import page, refused_page, see_other
from hub.web.repo_head import RepoDep, head_of, url_of

router = APIRouter(include_in_schema=False, tags=["web"])

Words = Annotated[str, Form(max_length=discussions.MAX_TEXT * 2)]
Title = Annotated[str, Form(max_length=discussions.MAX_TITLE * 2)]
KINDS = {"all": None, "discussion": False, "pull_request": True}
STATES = {
    DiscussionStatus.OPEN: "open",
    DiscussionStatus.DRAFT: "draft",
    DiscussionStatus.CLOSED: "closed",
    DiscussionStatus.MERGED: "merged",
}


@router.get("/{namespace}/{name}/discussions")
@router.get("/datasets/{namespace}/{name}/discussions")
def show_all(
    request: Request,
    repo: RepoDep,
    session: ReadSession,
    viewer: ViewerDep,
    status: Literal["open", "closed"] = "open",
    type: Literal["all", "discussion", "pull_request"] = "all",
    p: Annotated[int, Query(ge=0, le=10**6)] = 0,
) -> Response:
    """Open or closed ones, newest first."""
    wanted = KINDS[type]
    found = discussions.listed(session, repo, number=p, is_pull_request=wanted, status=status)
    comments = discussions.n_comments(session, repo, [item.num for item, _ in found.discussions])

    def here(**change: str | int) -> str:
        return "?" + urlencode({"status": status, "type": type} | change)

    return page(
        request,
        "discussions.html",
        viewer,
        **_head(session, viewer, repo),
        rows=[(item, author, comments.get(item.num, 0)) for item, author in found.discussions],
        chosen=status,
        type=type,
        counts=discussions.counts(session, repo, is_pull_request=wanted),
        here_with=here,
        older=here(p=p + 1) if found.start + len(found.discussions) < found.total else None,
        newer=here(p=p - 1) if p else None,
        may_start=permissions.may_participate(viewer, repo),
    )


@router.get("/{namespace}/{name}/discussions/new")
@router.get("/datasets/{namespace}/{name}/discussions/new")
def new(request: Request, repo: RepoDep, session: ReadSession, viewer: ViewerDep) -> Response:
    """The form; whoever is not signed in is asked to."""
    permissions.require_participant(session, viewer, repo)
    return _new_page(request, session, viewer, repo)


def _new_page(
    request: Request,
    session: Session,
    viewer: Viewer,
    repo: Repo,
    error: HubError | None = None,
    title: str = "",
    text: str = "",
) -> Response:
    return refused_page(
        request,
        "discussion_new.html",
        viewer,
        error,
        **_head(session, viewer, repo),
        new_title=title,
        text=text,
        problem=error.message if error is not None else None,
    )


@router.post("/{namespace}/{name}/discussions/new")
@router.post("/datasets/{namespace}/{name}/discussions/new")
def start(
    request: Request,
    viewer: WriterDep,
    repo: RepoDep,
    hub: HubDep,
    session: ReadSession,
    title: Title = "",
    text: Words = "",
) -> Response:
    try:
        with hub.db.write() as writing:
            made = discussions.start(writing, viewer, repo, title, _lines(text))
    except HubError as error:
        return _new_page(request, session, viewer, repo, error, title, text)
    return see_other(f"{url_of(repo)}/discussions/{made.num}")


@router.get("/{namespace}/{name}/discussions/{num}")
@router.get("/datasets/{namespace}/{name}/discussions/{num}")
def show(
    request: Request, repo: RepoDep, num: int, hub: HubDep, session: ReadSession, viewer: ViewerDep
) -> Response:
    """Everything that happened, and what may be done now."""
    return _page(request, hub, session, viewer, repo, num)


@dataclass(frozen=True, slots=True)
class Sent:
    """What every form about one discussion comes with."""

    request: Request
    viewer: WriterDep
    repo: RepoDep
    num: int
    hub: HubDep
    session: ReadSession


SentDep = Annotated[Sent, Depends()]


@router.post("/{namespace}/{name}/discussions/{num}/comment")
@router.post("/datasets/{namespace}/{name}/discussions/{num}/comment")
def comment(sent: SentDep, text: Words = "") -> Response:
    def say(writing: Session, found: Discussion) -> DiscussionEvent:
        return discussions.comment(writing, sent.viewer, sent.repo, found, _lines(text))

    return _change(sent, say, text)


@router.post("/{namespace}/{name}/discussions/{num}/status")
@router.post("/datasets/{namespace}/{name}/discussions/{num}/status")
def set_status(
    sent: SentDep, status: Annotated[Literal["open", "closed"], Form()], text: Words = ""
) -> Response:
    """Open or close it, with what was typed as the last word."""

    def turn(writing: Session, found: Discussion) -> DiscussionEvent:
        wanted = DiscussionStatus(status)
        return discussions.set_status(writing, sent.viewer, sent.repo, found, wanted, _lines(text))

    return _change(sent, turn, text)


@router.post("/{namespace}/{name}/discussions/{num}/title")
@router.post("/datasets/{namespace}/{name}/discussions/{num}/title")
def rename(sent: SentDep, title: Title = "") -> Response:
    def change(writing: Session, found: Discussion) -> DiscussionEvent:
        return discussions.rename(writing, sent.viewer, sent.repo, found, title)

    return _change(sent, change)


@router.post("/{namespace}/{name}/discussions/{num}/comments/{comment_id}/edit")
@router.post("/datasets/{namespace}/{name}/discussions/{num}/comments/{comment_id}/edit")
def edit(sent: SentDep, comment_id: int, text: Words = "") -> Response:
    def change(writing: Session, found: Discussion) -> DiscussionEvent:
        return discussions.edit(writing, sent.viewer, sent.repo, found, comment_id, _lines(text))

    return _change(sent, change)


@router.post("/{namespace}/{name}/discussions/{num}/comments/{comment_id}/hide")
@router.post("/datasets/{namespace}/{name}/discussions/{num}/comments/{comment_id}/hide")
def hide(sent: SentDep, comment_id: int) -> Response:
    def change(writing: Session, found: Discussion) -> DiscussionEvent:
        return discussions.hide(writing, sent.viewer, sent.repo, found, comment_id)

    return _change(sent, change)


@router.post("/{namespace}/{name}/discussions/{num}/merge")
@router.post("/datasets/{namespace}/{name}/discussions/{num}/merge")
def merge(sent: SentDep) -> Response:
    """One commit on the target, in the catalogue when the answer comes."""

    def change(writing: Session, found: Discussion) -> Commit:
        return pulls.merge(writing, sent.viewer, sent.repo, found)

    answer = _change(sent, change)
    if answer.status_code == 303 and sent.repo.id is not None:
        try_to_project(sent.hub, sent.repo.id)
    return answer


# Inside


@dataclass(frozen=True, slots=True)
class Moment:
    """One thing that happened: `id` is its anchor, as webhooks and clients write it."""

    id: str
    kind: str
    author: str
    at: datetime
    html: Markup | None = None
    number: int = 0
    raw: str = ""
    words: str = ""
    before: str = ""
    url: str = ""
    is_edited: bool = False
    is_hidden: bool = False
    may_edit: bool = False
    may_hide: bool = False


def _change(
    sent: Sent, change: Callable[[Session, Discussion], DiscussionEvent | Commit], text: str = ""
) -> Response:
    """Do it and show what became of it; a refusal is shown with what was typed."""
    try:
        with sent.hub.db.write() as writing:
            found = discussions.get(writing, sent.repo, sent.num)
            made = change(writing, found)
            anchor = f"#{made.id:024x}" if isinstance(made, DiscussionEvent) else ""
    except HubError as error:
        return _page(
            sent.request, sent.hub, sent.session, sent.viewer, sent.repo, sent.num, error, text
        )
    return see_other(f"{url_of(sent.repo)}/discussions/{sent.num}{anchor}")


def _page(
    request: Request,
    hub: Hub,
    session: Session,
    viewer: Viewer,
    repo: Repo,
    num: int,
    error: HubError | None = None,
    text: str = "",
) -> Response:
    found = discussions.get(session, repo, num)
    rights = discussions.rights(session, viewer, repo, found)
    author = session.get(User, found.author_id) if found.author_id is not None else None
    moments = _moments(session, repo, found, rights)
    return refused_page(
        request,
        "discussion.html",
        viewer,
        error,
        **_head(session, viewer, repo),
        talk=found,
        state=STATES[DiscussionStatus(found.status)],
        author=_name(author),
        rights=rights,
        moments=moments,
        n_comments=sum(moment.kind == EventKind.COMMENT for moment in moments),
        text=text,
        problem=error.message if error is not None else None,
        **(_proposal(hub, session, repo, found) if found.is_pull_request else {}),
    )


def _moments(session: Session, repo: Repo, found: Discussion, rights: Rights) -> list[Moment]:
    moments = [
        Moment(
            id=f"{event.id:024x}",
            number=event.id or 0,
            kind=event.kind,
            author=_name(author),
            at=event.created_at,
            html=_html(repo, event),
            raw=event.text,
            before=event.before,
            words=event.text,
            is_edited=event.is_edited,
            is_hidden=event.is_hidden,
            may_edit=rights.may_edit(event),
            may_hide=rights.may_hide(event),
        )
        for event, author in discussions.events(session, found)
    ]
    moments += [
        Moment(
            id=commit.id[:24],
            kind="commit",
            author=commit.author,
            at=commit.created_at,
            words=commit.message,
            before=commit.id[:8],
            url=f"{url_of(repo)}/tree/{commit.id}",
        )
        for commit in pulls.commits(session, repo, found)
    ]
    return sorted(moments, key=lambda moment: moment.at)


def _html(repo: Repo, event: DiscussionEvent) -> Markup | None:
    if event.kind != EventKind.COMMENT:
        return None
    # Pictures of the repo have their place in its card: here all become their descriptions.
    return card_html(event.text, url_of(repo), {})


def _proposal(hub: Hub, session: Session, repo: Repo, found: Discussion) -> dict[str, Any]:
    """What the page of a pull request has beside that of a discussion."""
    is_open = found.status in (DiscussionStatus.OPEN, DiscussionStatus.DRAFT)
    files: list[ChangedFile] = []
    conflicts: list[str] = []
    gone = False
    try:
        changes = pulls.changes(session, repo, found)
        conflicts = pulls.proposal(session, repo, found).conflicts if is_open else []
        files = changed_files(
            hub, session, changes, conflicts, f"{url_of(repo)}/blob/refs/pr/{found.num}"
        )
    except RevisionNotFound:
        changes, gone = [], True
    return {
        "files": files,
        "n_more_files": max(0, len(changes) - MAX_FILES),
        "conflicts": conflicts,
        "is_target_gone": gone,
        "is_open": is_open,
    }


def _head(session: Session, viewer: Viewer, repo: Repo) -> dict[str, Any]:
    commit = refs.resolve(session, repo)
    return head_of(session, viewer, repo, commit, None, tab="discussions")


def _name(user: User | None) -> str:
    return user.name if user is not None else "deleted"


def _lines(text: str) -> str:
    """Browsers send line ends of their own; clients of the protocol compare texts."""
    return text.replace("\r\n", "\n").strip()
