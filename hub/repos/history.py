"""What changes more than the end of a branch: squash, revert, forgetting files, and copies."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import delete
from sqlmodel import Session, col, select

from hub.audit import record
from hub.errors import BadRequest, Conflict
from hub.repos import commits, permissions, refs
from hub.repos import operations as ops
from hub.repos import service as repos
from hub.repos.changes import locked
from hub.repos.models import Commit, CommitEntry, Ref, RefKind, Repo
from hub.repos.refs import MAIN
from hub.users.service import Viewer


def squash(session: Session, viewer: Viewer, repo: Repo, branch: str, message: str) -> Commit:
    """One commit without a parent in the place of a branch's history; RevisionNotFound.

    The old commits stay readable by their ids, as those of a deleted branch do.
    """
    user = permissions.require_writer(session, viewer, repo.namespace, repo.name)
    repo = locked(session, repo)
    ref = refs.branch(session, repo, branch)
    head = session.get_one(Commit, ref.commit_id)
    files = ops.files_of(commits.entries(session, head))
    made = commits.add(session, repo, user.name, ref.name, None, {}, files, message, "")
    refs.point(session, repo, ref, made)
    record(session, user.id, "repo.squash", f"{repo.full_name}@{ref.name} {head.id} {made.id}")
    return made


def revert(session: Session, viewer: Viewer, repo: Repo, branch: str, revision: str) -> Commit:
    """A new commit on a branch that takes back what one commit changed.

    Conflict names a file that was changed again since; the first commit cannot be reverted.
    """
    user = permissions.require_writer(session, viewer, repo.namespace, repo.name)
    repo = locked(session, repo)
    ref = refs.branch(session, repo, branch)
    undone = refs.resolve(session, repo, revision)
    if undone.parent_id is None:
        raise BadRequest(f"{undone.id} has nothing before it to go back to", "revision")
    before = {
        entry.path: entry
        for entry in commits.entries(session, session.get_one(Commit, ref.commit_id))
    }
    was = ops.files_of(commits.entries(session, session.get_one(Commit, undone.parent_id)))
    became = ops.files_of(commits.entries(session, undone))
    after, conflicts = merged(base=became, ours=ops.files_of(before.values()), theirs=was)
    if conflicts:
        raise Conflict(f"{conflicts[0]} was changed again after {undone.id}", "revision")
    message = f"Revert {undone.message!r}"[:1000]
    return commits.advance(
        session, user, repo, ref, before, after, message, f"This takes back {undone.id}."
    )


def merged(
    *, base: Mapping[str, ops.File], ours: Mapping[str, ops.File], theirs: Mapping[str, ops.File]
) -> tuple[ops.Files, list[str]]:
    """`ours` with what changed from `base` to `theirs`, and the paths that both changed apart."""
    after = dict(ours)
    conflicts = []
    for path in sorted(base.keys() | theirs.keys()):
        old, new, present = base.get(path), theirs.get(path), ours.get(path)
        if new in (old, present):
            continue
        if present != old:
            conflicts.append(path)
        elif new is None:
            del after[path]
        else:
            after[path] = new
    return after, conflicts


@dataclass(frozen=True, slots=True)
class LFSFile:
    """A path that some commit of the repo has or had; `ref` is the first branch or tag with it."""

    sha256: str
    path: str
    size: int
    pushed_at: datetime
    ref: str | None


def lfs_files(session: Session, repo: Repo) -> list[LFSFile]:
    """Every LFS file in the history of a repo, newest first; each digest once."""
    query = (
        select(CommitEntry, Commit)
        .join(Commit, col(Commit.id) == col(CommitEntry.commit_id))
        .where(Commit.repo_id == repo.id, col(CommitEntry.lfs).is_(True))
        .order_by(col(Commit.created_at), col(CommitEntry.path))
    )
    named = {
        ref.commit_id: f"refs/{'heads' if ref.kind == RefKind.BRANCH else 'tags'}/{ref.name}"
        for ref in session.exec(
            # The branch main last, so that it wins where several refs have a commit.
            select(Ref)
            .where(Ref.repo_id == repo.id, Ref.kind != RefKind.PULL)
            .order_by((col(Ref.name) == MAIN), col(Ref.name).desc())
        )
    }
    found: dict[str, LFSFile] = {}
    for entry, commit in session.exec(query):
        first = found.get(entry.sha256)
        at = named.get(commit.id)
        if first is not None and (at is None or first.ref == f"refs/heads/{MAIN}"):
            continue
        pushed_at = first.pushed_at if first is not None else commit.created_at
        found[entry.sha256] = LFSFile(entry.sha256, entry.path, entry.size, pushed_at, at)
    return sorted(found.values(), key=lambda file: (file.pushed_at, file.path), reverse=True)


def forget(session: Session, viewer: Viewer, repo: Repo, digests: Sequence[str]) -> int:
    """Rewrite the history as if these LFS files had never been in it; how many commits changed.

    Every commit from the first that had one of them on gets a new id, because what a commit id
    stands for never changes. Branches, tags and pull requests follow.
    """
    user = permissions.require_writer(session, viewer, repo.namespace, repo.name)
    repo = locked(session, repo)
    hit = set(
        session.exec(
            select(CommitEntry.commit_id)
            .join(Commit, col(Commit.id) == col(CommitEntry.commit_id))
            .where(
                Commit.repo_id == repo.id,
                col(CommitEntry.lfs).is_(True),
                col(CommitEntry.sha256).in_(digests),
            )
        )
    )
    rewritten: dict[str, Commit] = {}
    for commit in _parents_first(session, repo):
        parent = rewritten.get(commit.parent_id or "")
        if commit.id in hit or parent is not None:
            rewritten[commit.id] = _without(session, repo, commit, parent, set(digests))
    for ref in session.exec(select(Ref).where(Ref.repo_id == repo.id)).all():
        if (made := rewritten.get(ref.commit_id)) is not None:
            refs.point(session, repo, ref, made)
    session.flush()
    for old in rewritten:
        session.execute(delete(Commit).where(col(Commit.id) == old))
    record(session, user.id, "repo.forget", f"{repo.full_name}: {' '.join(sorted(digests))}")
    return len(rewritten)


def _without(
    session: Session, repo: Repo, commit: Commit, parent: Commit | None, digests: set[str]
) -> Commit:
    entries = commits.entries(session, commit)
    left = ops.files_of(entry for entry in entries if entry.sha256 not in digests)
    if parent is None and commit.parent_id is not None:
        parent = session.get_one(Commit, commit.parent_id)
    before = _by_path(commits.entries(session, parent)) if parent is not None else {}
    return commits.add(
        session,
        repo,
        commit.author,
        # Tells the new id from the old one where the files are the same.
        f"without {' '.join(sorted(digests))}",
        parent,
        before,
        left,
        commit.message,
        commit.description,
        commit.created_at,
    )


def _parents_first(session: Session, repo: Repo) -> list[Commit]:
    children: dict[str | None, list[Commit]] = {}
    unsorted = session.exec(select(Commit).where(Commit.repo_id == repo.id)).all()
    ids = {commit.id for commit in unsorted}
    for commit in unsorted:
        parent = commit.parent_id if commit.parent_id in ids else None
        children.setdefault(parent, []).append(commit)
    found: list[Commit] = list(children.get(None, []))
    for commit in found:
        found += children.get(commit.id, [])
    return found


def _by_path(entries: Iterable[CommitEntry]) -> dict[str, CommitEntry]:
    return {entry.path: entry for entry in entries}


def duplicate(
    session: Session,
    viewer: Viewer,
    repo: Repo,
    namespace: str,
    name: str,
    *,
    private: bool | None = None,
) -> Repo:
    """A new repo with the files at `main` as its first commit; no byte is copied.

    As private as the source where `private` says nothing. RepoExists, GatedRepo, Forbidden.
    """
    permissions.require_files(session, viewer, repo)
    made = repos.create_repo(
        session,
        viewer,
        namespace,
        name,
        private=repo.private if private is None else private,
        type=repo.type,
    )
    made.gated = repo.gated
    user = permissions.require_writer(session, viewer, made.namespace, made.name)
    files = ops.files_of(commits.entries(session, refs.resolve(session, repo)))
    ref = refs.branch(session, made, MAIN)
    if files:
        commits.advance(session, user, made, ref, {}, files, f"Duplicate from {repo.full_name}")
    return made
