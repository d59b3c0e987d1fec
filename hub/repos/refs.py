"""Branches, tags and the heads of pull requests: what a revision means, and where refs point."""

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import bindparam
from sqlmodel import Session, col, select

from hub.audit import record
from hub.db import now
from hub.errors import BadName, RefExists, RevisionNotFound
from hub.repos import permissions
from hub.repos.changes import id_of, locked, tell
from hub.repos.models import Commit, Ref, RefKind, Repo
from hub.repos.paths import check_ref_name
from hub.users.service import Viewer

MAIN = "main"
_FOLDERS = {RefKind.BRANCH: "heads", RefKind.TAG: "tags", RefKind.PULL: "pr"}

# Of nearly every request, so it is made once: making a statement takes longer than running it.
_OF_REF = (
    select(Commit)
    .join(Ref, col(Ref.commit_id) == col(Commit.id))
    .where(col(Ref.repo_id) == bindparam("repo_id"), col(Ref.name) == bindparam("name"))
    .where(col(Ref.kind).in_(bindparam("kinds", expanding=True)))
    .order_by(col(Ref.kind))  # "branch" before "tag"
    .limit(1)
)


def resolve(session: Session, repo: Repo, revision: str = MAIN) -> Commit:
    """Branch, then tag, then commit id or its unambiguous first 7 or more digits.

    `refs/heads/…`, `refs/tags/…` and `refs/pr/…` name their kind. RevisionNotFound.
    """
    for prefix, kinds in (
        ("refs/heads/", (RefKind.BRANCH,)),
        ("refs/tags/", (RefKind.TAG,)),
        ("refs/pr/", (RefKind.PULL,)),
        ("", (RefKind.BRANCH, RefKind.TAG)),
    ):
        if not revision.startswith(prefix):
            continue
        name = {"repo_id": repo.id, "kinds": kinds, "name": revision.removeprefix(prefix)}
        commit: Commit | None = session.execute(_OF_REF, name).scalars().first()
        if commit is not None:
            return commit
    if (commit := _by_prefix(session, repo, revision)) is not None:
        return commit
    raise RevisionNotFound(f"Invalid rev id: {revision[:200]}", "revision")


def _by_prefix(session: Session, repo: Repo, revision: str) -> Commit | None:
    text = revision.lower()
    if not 7 <= len(text) <= 40 or any(c not in "0123456789abcdef" for c in text):
        return None
    query = select(Commit).where(Commit.repo_id == repo.id, col(Commit.id).startswith(text))
    found = session.exec(query.limit(2)).all()
    return found[0] if len(found) == 1 else None


@dataclass(frozen=True, slots=True)
class Refs:
    """Names to commit ids, each by name."""

    branches: Mapping[str, str]
    tags: Mapping[str, str]
    pulls: Mapping[str, str]


def of_repo(session: Session, repo: Repo) -> Refs:
    """All branches, tags and pull requests."""
    rows = session.exec(select(Ref).where(Ref.repo_id == repo.id).order_by(col(Ref.name))).all()

    def of(kind: RefKind) -> dict[str, str]:
        return {row.name: row.commit_id for row in rows if row.kind == kind}

    pulls = sorted(of(RefKind.PULL).items(), key=lambda item: int(item[0]))
    return Refs(of(RefKind.BRANCH), of(RefKind.TAG), dict(pulls))


def branch(session: Session, repo: Repo, name: str) -> Ref:
    """The row of a branch, or of a pull request as `refs/pr/<number>`; RevisionNotFound."""
    kind = RefKind.PULL if name.startswith("refs/pr/") else RefKind.BRANCH
    short = name.removeprefix("refs/pr/").removeprefix("refs/heads/")
    ref = session.get(Ref, (repo.id, kind, short))
    if ref is None:
        raise RevisionNotFound(f"Invalid rev id: {name[:200]}", "branch")
    return ref


def point(session: Session, repo: Repo, ref: Ref, commit: Commit) -> None:
    """Let a branch of a locked repo end in another commit, and tell the projection."""
    old, ref.commit_id = ref.commit_id, commit.id
    repo.last_modified = now()
    if ref.kind == RefKind.BRANCH and ref.name == MAIN:
        repo.head = commit.id
    session.add_all([ref, repo])
    tell(session, "repo.committed", repo, commit, refs=[_changed(ref, old, commit.id)])


def create_branch(
    session: Session, viewer: Viewer, repo: Repo, name: str, start: str = MAIN
) -> Ref:
    """RefExists; RevisionNotFound for an unknown start."""
    return _create_ref(session, viewer, repo, RefKind.BRANCH, name, start)


def create_tag(
    session: Session, viewer: Viewer, repo: Repo, name: str, revision: str = MAIN
) -> Ref:
    """RefExists; RevisionNotFound for an unknown revision."""
    return _create_ref(session, viewer, repo, RefKind.TAG, name, revision)


def delete_branch(session: Session, viewer: Viewer, repo: Repo, name: str) -> None:
    """RevisionNotFound; `main` cannot be deleted. Its commits stay readable by their ids."""
    if name == MAIN:
        raise BadName("Cannot delete refs/heads/main", "branch")
    _delete_ref(session, viewer, repo, RefKind.BRANCH, name)


def delete_tag(session: Session, viewer: Viewer, repo: Repo, name: str) -> None:
    """RevisionNotFound."""
    _delete_ref(session, viewer, repo, RefKind.TAG, name)


def _create_ref(
    session: Session, viewer: Viewer, repo: Repo, kind: RefKind, name: str, revision: str
) -> Ref:
    user = permissions.require_writer(session, viewer, repo.namespace, repo.name)
    repo = locked(session, repo)
    target = resolve(session, repo, revision)
    check_ref_name(name, kind)
    if session.get(Ref, (repo.id, kind, name)) is not None:
        raise RefExists(f"Reference refs/{_FOLDERS[kind]}/{name} already exists", kind)
    ref = Ref(repo_id=id_of(repo), kind=kind, name=name, commit_id=target.id)
    session.add(ref)
    _tell_ref(session, repo, _changed(ref, None, target.id))
    record(session, user.id, f"{kind}.create", f"{repo.full_name}@{name} {target.id}")
    return ref


def _delete_ref(session: Session, viewer: Viewer, repo: Repo, kind: RefKind, name: str) -> None:
    user = permissions.require_writer(session, viewer, repo.namespace, repo.name)
    repo = locked(session, repo)
    ref = session.get(Ref, (repo.id, kind, name))
    if ref is None:
        raise RevisionNotFound(f"Invalid rev id: {name[:200]}", kind)
    session.delete(ref)
    _tell_ref(session, repo, _changed(ref, ref.commit_id, None))
    record(session, user.id, f"{kind}.delete", f"{repo.full_name}@{name} {ref.commit_id}")


def _tell_ref(session: Session, repo: Repo, changed: dict[str, str | None]) -> None:
    """The projection is of `main`, which neither begins nor ends so."""
    tell(session, "repo.ref", repo, refs=[changed]).done_at = now()


def _changed(ref: Ref, old: str | None, new: str | None) -> dict[str, str | None]:
    """What webhooks are told of a ref: None before it was made and after it was deleted."""
    return {"ref": f"refs/{_FOLDERS[RefKind(ref.kind)]}/{ref.name}", "oldSha": old, "newSha": new}
