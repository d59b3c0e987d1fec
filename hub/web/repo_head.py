"""What every page about one repo begins with: the repo, its head and its tabs."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

from fastapi import Depends, HTTPException, Request
from sqlmodel import Session, func, select

from hub.adapters.models import Adapter, Card
from hub.deps import ReadSession, ViewerDep
from hub.errors import RepoNotFound
from hub.repos import access, discussions, refs
from hub.repos import service as repos
from hub.repos.models import AccessState, Commit, CommitEntry, Repo, RepoType
from hub.repos.refs import MAIN
from hub.users import service as users
from hub.users.service import Viewer

DATASETS = "/datasets"


@dataclass(frozen=True, slots=True)
class RepoHead:
    """What the head of every page of a repo shows."""

    full_name: str
    namespace: str
    name: str
    url: str
    private: bool
    gated: str | None
    downloads: int
    likes: int
    last_modified: datetime


def _repo(
    request: Request, namespace: str, name: str, session: ReadSession, viewer: ViewerDep
) -> Repo:
    is_dataset = request.url.path.startswith(DATASETS + "/")
    type_ = RepoType.DATASET if is_dataset else RepoType.MODEL
    try:
        return repos.get_repo(session, viewer, namespace, name, type=type_)
    except RepoNotFound:
        moved = repos.moved_to(session, viewer, namespace, name, type=type_)
        if moved is None:
            raise
        raise HTTPException(307, headers={"Location": url_of(moved)}) from None


RepoDep = Annotated[Repo, Depends(_repo)]


def url_of(repo: Repo) -> str:
    return f"{DATASETS if repo.type == RepoType.DATASET else ''}/{repo.full_name}"


def head_of(
    session: Session,
    viewer: Viewer,
    repo: Repo,
    commit: Commit,
    entries: Sequence[CommitEntry] | None,
    *,
    tab: str,
    revision: str = MAIN,
) -> dict[str, Any]:
    """The context of `repo_base.html`; without `entries` the files of `commit` are counted."""
    card = session.get(Card, repo.id)
    speaker = session.exec(
        select(Adapter.title).where(Adapter.repo_id == repo.id, Adapter.position == 0)
    ).first()
    n_files = len(entries) if entries is not None else _n_files(session, commit)
    named = refs.of_repo(session, repo)
    shown = [{"kind": "branch", "name": name} for name in named.branches]
    shown += [{"kind": "tag", "name": name} for name in named.tags]
    n_commits = session.exec(select(func.count()).where(Commit.repo_id == repo.id)).one()
    may_write = users.may_write(session, viewer, repo.namespace, repo.name)
    n_requests = 0
    if may_write and repo.gated is not None:
        n_requests = len(access.requests(session, viewer, repo, AccessState.PENDING))
    return {
        "repo": RepoHead(
            repo.full_name,
            repo.namespace,
            repo.name,
            url_of(repo),
            repo.private,
            repo.gated,
            repo.downloads,
            repo.likes,
            repo.last_modified,
        ),
        "title": (card.title if card else None) or speaker or repo.name,
        "license": card.license if card else None,
        "tab": tab,
        "revision": revision,
        "revision_label": revision[:8] if len(revision) == 40 else revision,
        "refs": shown,
        "n_files": n_files,
        "n_commits": n_commits,
        "n_discussions": discussions.counts(session, repo).open,
        "may_write": may_write,
        "n_requests": n_requests,
    }


def _n_files(session: Session, commit: Commit) -> int:
    return session.exec(select(func.count()).where(CommitEntry.commit_id == commit.id)).one()
