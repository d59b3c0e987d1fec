"""Commits and their entries: reading them, and making new ones. What was made is never changed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta

from sqlalchemy import bindparam, insert
from sqlmodel import Session, col, select

from hub.audit import record
from hub.db import now
from hub.errors import BadField, EntryNotFound, StaleParent
from hub.failpoints import reach
from hub.limits import quotas
from hub.repos import holds, permissions, refs
from hub.repos import operations as ops
from hub.repos.changes import id_of, locked
from hub.repos.models import Commit, CommitEntry, Ref, Repo
from hub.repos.refs import MAIN
from hub.users.models import User
from hub.users.service import Viewer

# A client that got no answer to a commit sends it again: huggingface_hub for minutes.
_REPEATED_WITHIN = timedelta(hours=1)
_REMEMBERED = 20
# Clients show it to people, and huggingface_hub's own tests compare it.
_MOVED_ON = "The branch was updated since you opened this page. Please refresh and try again."

# Of nearly every request, so they are made once: making a statement takes longer than running it.
_ENTRIES = (
    select(CommitEntry)
    .where(col(CommitEntry.commit_id) == bindparam("commit_id"))
    .order_by(col(CommitEntry.path))
)
_ENTRIES_OF_FOLDER = _ENTRIES.where(
    col(CommitEntry.path) >= bindparam("first"), col(CommitEntry.path) < bindparam("end")
)
_ENTRY = _ENTRIES.where(col(CommitEntry.path) == bindparam("path"))


def entries(session: Session, commit: Commit, under: str = "") -> list[CommitEntry]:
    """The files below a folder, by path; EntryNotFound if there is no such folder."""
    folder = under.strip("/")
    if folder:
        # "0" follows "/" in ASCII: the range holds all paths that begin with the folder.
        ends = {"first": f"{folder}/", "end": f"{folder}0"}
        rows = session.execute(_ENTRIES_OF_FOLDER, {"commit_id": commit.id, **ends})
    else:
        rows = session.execute(_ENTRIES, {"commit_id": commit.id})
    found = list(rows.scalars())
    if folder and not found:
        raise EntryNotFound(f"there is no folder {folder}", "path", commit.id)
    return found


def entry(session: Session, commit: Commit, path: str) -> CommitEntry:
    """EntryNotFound, which carries the commit that was looked in."""
    here = {"commit_id": commit.id, "path": path}
    found: CommitEntry | None = session.execute(_ENTRY, here).scalars().first()
    if found is None:
        raise EntryNotFound(f"there is no file {path[:200]}", "path", commit.id)
    return found


def history(
    session: Session, repo: Repo, commit: Commit, limit: int = 50, cursor: str | None = None
) -> tuple[list[Commit], str | None]:
    """History from `commit` back, newest first, and the cursor of the next page."""
    at = session.get(Commit, cursor or commit.id)
    found: list[Commit] = []
    while at is not None and at.repo_id == repo.id and len(found) < limit:
        found.append(at)
        at = session.get(Commit, at.parent_id) if at.parent_id else None
    return found, at.id if at is not None and at.repo_id == repo.id else None


def create(
    session: Session,
    viewer: Viewer,
    repo: Repo,
    *,
    branch: str = MAIN,
    operations: Sequence[ops.Operation],
    message: str,
    description: str = "",
    parent: str | None = None,
) -> Commit:
    """One new commit with all operations, or the present head if they change nothing.

    StaleParent if `parent` is given and the branch has moved; RevisionNotFound without the branch.
    Where that, or a file that is to be deleted and is not there, comes of the same request having
    been done before and its answer lost, the answer is the commit that it made.
    """
    user = permissions.require_committer(session, viewer, repo, branch)
    if not message or len(message) > 1000:
        raise BadField("a commit's message has 1 to 1000 characters", "message")
    repo = locked(session, repo)
    ref = refs.branch(session, repo, branch)
    head = session.get_one(Commit, ref.commit_id)

    def result_on(files: ops.Files) -> ops.Files:
        return ops.apply(
            files,
            operations,
            lambda revision: ops.files_of(entries(session, refs.resolve(session, repo, revision))),
        )

    before = {e.path: e for e in entries(session, head)}
    files = ops.files_of(before.values())
    try:
        if parent is not None and not (len(parent) >= 5 and head.id.startswith(parent)):
            raise StaleParent(_MOVED_ON, "parent")
        after = result_on(files)
    except (StaleParent, EntryNotFound):
        for made, on in _recent(session, head, user.name, message, description):
            if on.id.startswith(parent or "") and _makes(session, result_on, on, made):
                return made
        raise
    if after == files:
        return head
    holds.insert_blobs(session, [o.stored for o in operations if isinstance(o, ops.Add)])
    return advance(session, user, repo, ref, before, after, message, description)


def _recent(
    session: Session, head: Commit, author: str, message: str, description: str
) -> Iterator[tuple[Commit, Commit]]:
    """Commits that a request of this author with these words may have made, with their parents."""
    at = head
    for _ in range(_REMEMBERED):
        parent = session.get(Commit, at.parent_id) if at.parent_id is not None else None
        if parent is None or at.created_at < now() - _REPEATED_WITHIN:
            return
        if (at.author, at.message, at.description) == (author, message, description):
            yield at, parent
        at = parent


def _makes(
    session: Session, result_on: Callable[[ops.Files], ops.Files], on: Commit, made: Commit
) -> bool:
    try:
        return result_on(ops.files_of(entries(session, on))) == ops.files_of(entries(session, made))
    except EntryNotFound:
        return False


def advance(
    session: Session,
    user: User,
    repo: Repo,
    ref: Ref,
    before: Mapping[str, CommitEntry],
    after: ops.Files,
    message: str,
    description: str = "",
) -> Commit:
    """A new commit with the files `after` on a branch of a locked repo; `before` are its head's."""
    head = session.get_one(Commit, ref.commit_id)
    made = add(session, repo, user.name, ref.name, head, before, after, message, description)
    refs.point(session, repo, ref, made)
    record(session, user.id, "repo.commit", f"{repo.full_name}@{ref.name} {made.id}")
    reach("U9")
    return made


def add(
    session: Session,
    repo: Repo,
    author: str,
    branch: str,
    parent: Commit | None,
    before: Mapping[str, CommitEntry],
    after: ops.Files,
    message: str,
    description: str,
    created_at: datetime | None = None,
) -> Commit:
    """A commit of a locked repo that no ref points to yet; `before` are its parent's files."""
    # What the parent has is kept by it, and counted.
    kept = {entry.sha256 for entry in before.values()}
    new = {file.sha256: file.size for file in after.values() if file.sha256 not in kept}
    quotas.charge(session, repo.namespace_key, new)
    made = Commit(
        id="",
        repo_id=id_of(repo),
        parent_id=parent.id if parent is not None else None,
        author=author,
        message=message,
        description=description,
        created_at=created_at or now(),
    )
    made.id = ops.commit_id(made, after, repo=f"{repo.type}/{repo.id}", branch=branch)
    session.add(made)
    session.flush()
    unchanged = ops.files_of(before.values())
    holds.revive(session, set(new))
    rows = [
        {
            "commit_id": made.id,
            "path": path,
            "sha256": file.sha256,
            "git_oid": file.git_oid,
            "size": file.size,
            "lfs": file.lfs,
            "last_commit_id": before[path].last_commit_id
            if unchanged.get(path) == file
            else made.id,
        }
        for path, file in sorted(after.items())
    ]
    if rows:
        session.execute(insert(CommitEntry), rows)
    return made
