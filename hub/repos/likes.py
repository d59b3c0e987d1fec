"""Which repos a user likes; the number of likes stands in the repo's own row."""

from sqlalchemy import func
from sqlmodel import Session, col, select

from hub.repos import permissions
from hub.repos.changes import locked
from hub.repos.models import Like, Repo
from hub.users.models import User
from hub.users.service import Viewer


def like(session: Session, viewer: Viewer, repo: Repo) -> None:
    """Liking twice is liking once."""
    user = permissions.require_participant(session, viewer, repo)
    repo = locked(session, repo)
    assert repo.id is not None
    assert user.id is not None
    if session.get(Like, (repo.id, user.id)) is None:
        session.add(Like(repo_id=repo.id, user_id=user.id))
        _count(session, repo)


def unlike(session: Session, viewer: Viewer, repo: Repo) -> None:
    user = permissions.require_participant(session, viewer, repo)
    repo = locked(session, repo)
    present = session.get(Like, (repo.id, user.id))
    if present is not None:
        session.delete(present)
        _count(session, repo)


def is_liked(session: Session, viewer: Viewer, repo: Repo) -> bool:
    """Whether the viewer likes it; nobody does who is not signed in."""
    return viewer.user is not None and session.get(Like, (repo.id, viewer.user.id)) is not None


def of_user(session: Session, viewer: Viewer, user: User) -> list[tuple[Like, Repo]]:
    """What a user likes, newest first, as far as the viewer may know of it."""
    query = (
        select(Like, Repo)
        .join(Repo, col(Repo.id) == col(Like.repo_id))
        .where(Like.user_id == user.id, permissions.visible_to(session, viewer))
        .order_by(col(Like.created_at).desc(), col(Like.repo_id).desc())
    )
    return list(session.exec(query))


def of_repo(session: Session, repo: Repo) -> list[User]:
    """Who likes a repo, newest first."""
    query = (
        select(User)
        .join(Like, col(Like.user_id) == col(User.id))
        .where(Like.repo_id == repo.id)
        .order_by(col(Like.created_at).desc(), col(Like.user_id).desc())
    )
    return list(session.exec(query))


def _count(session: Session, repo: Repo) -> None:
    session.flush()
    repo.likes = session.exec(select(func.count()).where(Like.repo_id == repo.id)).one()
    session.add(repo)
