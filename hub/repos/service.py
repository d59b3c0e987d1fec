"""Repos: making, finding, moving and deleting them, and their settings. Sessions are passed in.

What is in them: `commits` and `refs`. Who may do what: `permissions`.
"""

from collections.abc import Sequence
from typing import Literal

from sqlalchemy import bindparam, delete
from sqlmodel import Session, col, or_, select

from hub.audit import record
from hub.db import wait_for_others
from hub.errors import RepoExists, RepoNotFound
from hub.limits import quotas
from hub.repos import commits, holds, permissions
from hub.repos import operations as ops
from hub.repos.changes import id_of, locked, tell
from hub.repos.models import Gate, Redirect, Ref, RefKind, Repo, RepoType
from hub.repos.refs import MAIN
from hub.users import service as users
from hub.users.models import NameTombstone, User
from hub.users.names import check_name, check_namespace, key_of
from hub.users.service import Viewer

# Of nearly every request, so it is made once: making a statement takes longer than running it.
_REPO = select(Repo).where(col(Repo.type) == bindparam("type"), col(Repo.key) == bindparam("key"))


def create_repo(
    session: Session,
    viewer: Viewer,
    namespace: str,
    name: str,
    *,
    private: bool = False,
    type: str = RepoType.MODEL,
    exist_ok: bool = False,
    first: Sequence[ops.Add] = (),
) -> Repo:
    """A new repo: one commit on `main`, without files or with those in `first`.

    RepoExists, BadName, Forbidden; with `exist_ok` the repo that is there.
    """
    user = permissions.require_writer(session, viewer, check_namespace(namespace), name)
    check_name(name, "name")
    canonical = users.require_namespace(session, user, namespace, "namespace")
    key = key_of(f"{namespace}/{name}")
    _wait_for_name(session, RepoType(type), key)
    if (existing := _find(session, key, RepoType(type))) is not None:
        if exist_ok:
            return existing
        raise RepoExists(f"You already created this {type} repo: {existing.full_name}", "name")
    _claim(session, key, RepoType(type), user)
    repo = Repo(
        type=RepoType(type),
        namespace=canonical,
        name=name,
        namespace_key=key_of(namespace),
        key=key,
        private=private,
        owner_id=user.id,
    )
    session.add(repo)
    session.flush()
    holds.insert_blobs(session, [item.stored for item in first])
    files = ops.apply({}, first, lambda _: {})
    root = commits.add(session, repo, user.name, MAIN, None, {}, files, "initial commit", "")
    session.add(Ref(repo_id=id_of(repo), kind=RefKind.BRANCH, name=MAIN, commit_id=root.id))
    repo.head = root.id
    tell(session, "repo.created", repo)
    record(session, user.id, "repo.create", repo.full_name)
    return repo


def get_repo(
    session: Session, viewer: Viewer, namespace: str, name: str, *, type: str = RepoType.MODEL
) -> Repo:
    """RepoNotFound if it is missing, or private and not for this viewer."""
    repo = _find(session, key_of(f"{namespace}/{name}"), RepoType(type))
    if repo is None or not permissions.may_read(session, viewer, repo):
        raise RepoNotFound("Repository not found")
    return repo


def moved_to(
    session: Session, viewer: Viewer, namespace: str, name: str, *, type: str = RepoType.MODEL
) -> Repo | None:
    """The repo that had this name before it was moved, if the viewer may see it."""
    old = session.get(Redirect, (RepoType(type), key_of(f"{namespace}/{name}")))
    repo = session.get(Repo, old.repo_id) if old is not None else None
    return repo if repo is not None and permissions.may_read(session, viewer, repo) else None


def list_repos(
    session: Session,
    viewer: Viewer,
    *,
    type: str = RepoType.MODEL,
    namespace: str | None = None,
    search: str | None = None,
    limit: int = 100,
    before: Repo | None = None,
) -> list[Repo]:
    """Visible repos, last changed first; `before` is the last one of the previous page."""
    query = select(Repo).where(Repo.type == RepoType(type))
    if namespace is not None:
        query = query.where(Repo.namespace_key == key_of(namespace))
    if search:
        query = query.where(col(Repo.key).contains(search.lower(), autoescape=True))
    query = query.where(permissions.visible_to(session, viewer))
    if before is not None:
        changed, seen = col(Repo.last_modified), col(Repo.id)
        query = query.where(
            or_(
                changed < before.last_modified,
                (changed == before.last_modified) & (seen < before.id),
            )
        )
    query = query.order_by(col(Repo.last_modified).desc(), col(Repo.id).desc()).limit(limit)
    return list(session.exec(query))


def update_settings(
    session: Session,
    viewer: Viewer,
    repo: Repo,
    *,
    private: bool | None = None,
    gated: Gate | Literal[False] | None = None,
) -> Repo:
    """Only what is given is changed; `gated=False` opens the files to all who see the repo."""
    user = permissions.require_writer(session, viewer, repo.namespace, repo.name)
    repo = locked(session, repo)
    if gated is not None and (gated or None) != repo.gated:
        repo.gated = gated or None
        tell(session, "repo.visibility", repo, config={"gated": gated})
        record(session, user.id, "repo.gated", f"{repo.full_name}: {gated or 'open'}")
    if private is not None and private != repo.private:
        repo.private = private
        tell(session, "repo.visibility", repo, config={"private": private})
        record(session, user.id, "repo.private" if private else "repo.public", repo.full_name)
    return repo


def move_repo(session: Session, viewer: Viewer, repo: Repo, namespace: str, name: str) -> Repo:
    """A new name; the old one redirects and stays its owner's. RepoExists, BadName, Forbidden."""
    user = permissions.require_writer(session, viewer, repo.namespace, repo.name)
    permissions.require_writer(session, viewer, check_namespace(namespace), name)
    check_name(name, "name")
    canonical = users.require_namespace(session, user, namespace, "namespace")
    key = key_of(f"{namespace}/{name}")
    _wait_for_name(session, repo.type, key)
    repo = locked(session, repo)
    old_name, old_key = repo.full_name, repo.key
    if key != old_key:
        if _find(session, key, repo.type) is not None:
            raise RepoExists(f"A {repo.type} repository called {namespace}/{name} already exists")
        _claim(session, key, repo.type, user, returning=repo)
        _bury(session, old_key, repo.type, user)
        session.add(Redirect(type=repo.type, key=old_key, repo_id=id_of(repo)))
    repo.namespace, repo.name = canonical, name
    moves_away = repo.namespace_key != key_of(namespace)
    repo.namespace_key, repo.key = key_of(namespace), key
    tell(session, "repo.moved", repo, moved_from=old_name)
    if moves_away:
        quotas.settle(session, repo.namespace_key)
    record(session, user.id, "repo.move", f"{old_name} -> {repo.full_name}")
    return repo


def is_unused(session: Session, full_name: str, *, type: str = RepoType.MODEL) -> bool:
    """Whether no repo has or ever had this name."""
    key = key_of(full_name)
    query = select(NameTombstone.id).where(NameTombstone.type == type, NameTombstone.key == key)
    return _find(session, key, type) is None and session.exec(query).first() is None


def delete_repo(session: Session, viewer: Viewer, repo: Repo) -> None:
    """Its rows go, its name stays taken, its blobs stay until nothing else refers to them."""
    user = permissions.require_writer(session, viewer, repo.namespace, repo.name)
    repo = locked(session, repo)
    for old in session.exec(select(Redirect).where(Redirect.repo_id == repo.id)).all():
        session.delete(old)
    _bury(session, repo.key, repo.type, user)
    tell(session, "repo.deleted", repo)
    record(session, user.id, "repo.delete", repo.full_name)
    session.flush()
    session.execute(delete(Repo).where(col(Repo.id) == repo.id))
    session.expunge(repo)


def _find(session: Session, key: str, type: str) -> Repo | None:
    return session.execute(_REPO, {"type": type, "key": key}).scalars().first()


def _wait_for_name(session: Session, type: str, key: str) -> None:
    wait_for_others(session.connection(), f"{type} {key}")


def _claim(
    session: Session, key: str, type: str, user: User, *, returning: Repo | None = None
) -> None:
    """Take a name out of the graveyard: its last owner may, an admin may, a repo coming back may."""
    query = select(NameTombstone).where(NameTombstone.type == type, NameTombstone.key == key)
    stone = session.exec(query).first()
    old = session.get(Redirect, (type, key))
    comes_back = old is not None and returning is not None and old.repo_id == returning.id
    if stone is not None and not comes_back and not (user.is_admin or stone.user_id == user.id):
        raise RepoExists(f"the name {key} was used by another repo and stays reserved", "name")
    if stone is not None:
        session.delete(stone)
    if old is not None:
        session.delete(old)
    session.flush()


def _bury(session: Session, key: str, type: str, user: User) -> None:
    session.add(NameTombstone(type=type, key=key, user_id=user.id))
