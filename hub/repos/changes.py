"""How a change of a repo begins and ends: its row locked, and a row of the outbox."""

from typing import Any

from sqlmodel import Session, select

from hub.errors import RepoNotFound
from hub.repos.models import Commit, Event, Repo


def locked(session: Session, repo: Repo) -> Repo:
    """The row as it is now; on PostgreSQL other writers of this repo wait from here on.

    RepoNotFound too if it was moved: who may write to it was asked of its old name.
    """
    seen = repo.key
    query = select(Repo).where(Repo.id == repo.id).with_for_update()
    found = session.exec(query.execution_options(populate_existing=True)).first()
    if found is None or found.key != seen:
        raise RepoNotFound("Repository not found")
    return found


def tell(session: Session, kind: str, repo: Repo, made: Commit | None = None, **said: Any) -> Event:
    """One row of the outbox; `said` is what webhooks need to know beside the repo."""
    document = {
        "type": repo.type,
        "namespace": repo.namespace,
        "name": repo.name,
        "private": repo.private,
        "head": repo.head,
        "owner": repo.owner_id,
        **said,
    }
    event = Event(
        kind=kind,
        repo_id=id_of(repo),
        commit_id=made.id if made else None,
        document=document,
    )
    session.add(event)
    session.flush()
    return event


def id_of(repo: Repo) -> int:
    assert repo.id is not None, "a repo that is not in the database yet"
    return repo.id
