"""Who may know of a repo, have its files, speak in it and write to it.

Reading never tells a missing repo from one the viewer may not see.
Writing checks the right to do so again inside the transaction.
"""

from sqlalchemy import ColumnElement, and_, true
from sqlmodel import Session, col, or_, select

from hub.errors import Forbidden, GatedRepo, RepoNotFound
from hub.repos.models import AccessRequest, AccessState, Discussion, Repo
from hub.users import service as users
from hub.users.models import Scope, User
from hub.users.service import Viewer


def visible_to(session: Session, viewer: Viewer) -> ColumnElement[bool]:
    """The condition on `Repo` that `may_read` decides for one."""
    keys = users.private_keys(session, viewer)
    if keys is None:
        return true()
    return or_(
        col(Repo.private).is_(False),
        col(Repo.namespace_key).in_(keys.namespaces),
        col(Repo.key).in_(keys.repos),
    )


def may_read(session: Session, viewer: Viewer, repo: Repo) -> bool:
    """Whether the viewer may know of a repo at all."""
    return not repo.private or users.may_read_private(session, viewer, repo.namespace, repo.name)


def files_visible_to(session: Session, viewer: Viewer) -> ColumnElement[bool]:
    """The condition on `Repo` that `may_read_files` decides for one."""
    keys = users.private_keys(session, viewer)
    if keys is None:
        return true()
    accepted = select(AccessRequest.repo_id).where(
        AccessRequest.user_id == viewer.user_id, AccessRequest.state == AccessState.ACCEPTED
    )
    let_in: ColumnElement[bool] = col(Repo.id).in_(accepted)
    if viewer.places is not None:
        inside = (col(Repo.namespace_key).in_(viewer.places), col(Repo.key).in_(viewer.places))
        let_in = and_(let_in, or_(*inside))
    return or_(
        and_(col(Repo.private).is_(False), or_(col(Repo.gated).is_(None), let_in)),
        col(Repo.namespace_key).in_(keys.namespaces),
        col(Repo.key).in_(keys.repos),
    )


def may_read_files(session: Session, viewer: Viewer, repo: Repo) -> bool:
    """Whether the viewer may have the bytes of a repo too: not those of a gated one unasked."""
    query = select(Repo.id).where(Repo.id == repo.id, files_visible_to(session, viewer))
    return session.exec(query).first() is not None


def require_files(session: Session, viewer: Viewer, repo: Repo) -> None:
    """GatedRepo, for a repo that the viewer may see."""
    if not may_read_files(session, viewer, repo):
        raise GatedRepo(repo.full_name, repo.type)


def require_writer(session: Session, viewer: Viewer, namespace: str, name: str) -> User:
    viewer.require_write()
    viewer = users.recheck(session, viewer)
    user = viewer.require_write()
    if not users.may_write(session, viewer, namespace, name):
        raise Forbidden(f"{user.name} may not write to {namespace}/{name}")
    return user


def require_participant(session: Session, viewer: Viewer, repo: Repo) -> User:
    """Who may speak in a repo they see without writing to it.

    Unauthorized, Forbidden; RepoNotFound if they do not see it any more.
    """
    viewer = users.recheck(session, viewer)
    user = viewer.require_write()
    present = session.get(Repo, repo.id)
    if present is None or not may_read(session, viewer, present):
        raise RepoNotFound("Repository not found")
    if not viewer.covers(repo.namespace, repo.name):
        raise Forbidden(f"this token may not be used in {repo.full_name}")
    return user


def may_participate(viewer: Viewer, repo: Repo) -> bool:
    """Whether `require_participant` would let the viewer in, for a repo they see."""
    return viewer.has(Scope.WRITE) and viewer.covers(repo.namespace, repo.name)


def require_committer(session: Session, viewer: Viewer, repo: Repo, branch: str) -> User:
    """Who may write to the repo, and for a pull request who opened it; Forbidden."""
    if branch.startswith("refs/pr/"):
        user = require_participant(session, viewer, repo)
        number = branch.removeprefix("refs/pr/")
        opened_by = session.exec(
            select(Discussion.author_id).where(
                Discussion.repo_id == repo.id, Discussion.num == _number(number)
            )
        ).first()
        if opened_by is not None and opened_by == user.id:
            return user
    return require_writer(session, viewer, repo.namespace, repo.name)


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
