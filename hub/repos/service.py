"""Repos: names, visibility, commits, branches and tags. Sessions are passed in.

In this order: repos, reading, writing, bytes on their way into a commit, helpers.

Reading never tells a missing repo from one the viewer may not see.
Writing checks the right to do so again inside the transaction.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import ColumnElement, and_, bindparam, case, delete, insert, true
from sqlmodel import Session, col, or_, select

from hub.audit import record
from hub.blobs.store import BlobStore, Sha256, Stored
from hub.db import insert_once, now, wait_for_others
from hub.errors import (
    BadField,
    BadName,
    Busy,
    EntryNotFound,
    Forbidden,
    GatedRepo,
    RefExists,
    RepoExists,
    RepoNotFound,
    RevisionNotFound,
    StaleParent,
)
from hub.failpoints import reach
from hub.limits import quotas
from hub.repos import operations as ops
from hub.repos.models import (
    AccessRequest,
    AccessState,
    Blob,
    BlobState,
    Commit,
    CommitEntry,
    Discussion,
    Event,
    Gate,
    Hold,
    Redirect,
    Ref,
    RefKind,
    Repo,
    RepoType,
)
from hub.repos.paths import check_ref_name
from hub.users import service as users
from hub.users.models import NameTombstone, Scope, User
from hub.users.names import check_name, check_namespace, key_of
from hub.users.service import Viewer

MAIN = "main"
STORE = "store"  # of `session.info` in a writing session
HOLD_FOR = timedelta(hours=48)
# A client that got no answer to a commit sends it again: huggingface_hub for minutes.
_REPEATED_WITHIN = timedelta(hours=1)
_REMEMBERED = 20
_FOLDERS = {RefKind.BRANCH: "heads", RefKind.TAG: "tags", RefKind.PULL: "pr"}
_AT_ONCE = 500  # rows of one statement: databases limit its parameters
# Clients show it to people, and huggingface_hub's own tests compare it.
_MOVED_ON = "The branch was updated since you opened this page. Please refresh and try again."

# Of nearly every request, so they are made once: making a statement takes longer than running it.
_REPO = select(Repo).where(col(Repo.type) == bindparam("type"), col(Repo.key) == bindparam("key"))
_OF_REF = (
    select(Commit)
    .join(Ref, col(Ref.commit_id) == col(Commit.id))
    .where(col(Ref.repo_id) == bindparam("repo_id"), col(Ref.name) == bindparam("name"))
    .where(col(Ref.kind).in_(bindparam("kinds", expanding=True)))
    .order_by(col(Ref.kind))  # "branch" before "tag"
    .limit(1)
)
_ENTRIES = (
    select(CommitEntry)
    .where(col(CommitEntry.commit_id) == bindparam("commit_id"))
    .order_by(col(CommitEntry.path))
)
_ENTRIES_OF_FOLDER = _ENTRIES.where(
    col(CommitEntry.path) >= bindparam("first"), col(CommitEntry.path) < bindparam("end")
)
_ENTRY = _ENTRIES.where(col(CommitEntry.path) == bindparam("path"))


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
    user = require_writer(session, viewer, check_namespace(namespace), name)
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
    _keep(session, [item.stored for item in first])
    files = ops.apply({}, first, lambda _: {})
    root = insert_commit(session, repo, user.name, MAIN, None, {}, files, "initial commit", "")
    session.add(Ref(repo_id=_id(repo), kind=RefKind.BRANCH, name=MAIN, commit_id=root.id))
    repo.head = root.id
    tell(session, "repo.created", repo)
    record(session, user.id, "repo.create", repo.full_name)
    return repo


def get_repo(
    session: Session, viewer: Viewer, namespace: str, name: str, *, type: str = RepoType.MODEL
) -> Repo:
    """RepoNotFound if it is missing, or private and not for this viewer."""
    repo = _find(session, key_of(f"{namespace}/{name}"), RepoType(type))
    if repo is None or not may_read(session, viewer, repo):
        raise RepoNotFound("Repository not found")
    return repo


def moved_to(
    session: Session, viewer: Viewer, namespace: str, name: str, *, type: str = RepoType.MODEL
) -> Repo | None:
    """The repo that had this name before it was moved, if the viewer may see it."""
    old = session.get(Redirect, (RepoType(type), key_of(f"{namespace}/{name}")))
    repo = session.get(Repo, old.repo_id) if old is not None else None
    return repo if repo is not None and may_read(session, viewer, repo) else None


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
    query = query.where(visible_to(session, viewer))
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
    user = require_writer(session, viewer, repo.namespace, repo.name)
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
    user = require_writer(session, viewer, repo.namespace, repo.name)
    require_writer(session, viewer, check_namespace(namespace), name)
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
        session.add(Redirect(type=repo.type, key=old_key, repo_id=_id(repo)))
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
    user = require_writer(session, viewer, repo.namespace, repo.name)
    repo = locked(session, repo)
    for old in session.exec(select(Redirect).where(Redirect.repo_id == repo.id)).all():
        session.delete(old)
    _bury(session, repo.key, repo.type, user)
    tell(session, "repo.deleted", repo)
    record(session, user.id, "repo.delete", repo.full_name)
    session.flush()
    session.execute(delete(Repo).where(col(Repo.id) == repo.id))
    session.expunge(repo)


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


def commits(
    session: Session, repo: Repo, commit: Commit, limit: int = 50, cursor: str | None = None
) -> tuple[list[Commit], str | None]:
    """History from `commit` back, newest first, and the cursor of the next page."""
    at = session.get(Commit, cursor or commit.id)
    found: list[Commit] = []
    while at is not None and at.repo_id == repo.id and len(found) < limit:
        found.append(at)
        at = session.get(Commit, at.parent_id) if at.parent_id else None
    return found, at.id if at is not None and at.repo_id == repo.id else None


@dataclass(frozen=True, slots=True)
class Refs:
    """Names to commit ids, each by name."""

    branches: Mapping[str, str]
    tags: Mapping[str, str]
    pulls: Mapping[str, str]


def refs(session: Session, repo: Repo) -> Refs:
    """All branches, tags and pull requests."""
    rows = session.exec(select(Ref).where(Ref.repo_id == repo.id).order_by(col(Ref.name))).all()

    def of(kind: RefKind) -> dict[str, str]:
        return {row.name: row.commit_id for row in rows if row.kind == kind}

    pulls = sorted(of(RefKind.PULL).items(), key=lambda item: int(item[0]))
    return Refs(of(RefKind.BRANCH), of(RefKind.TAG), dict(pulls))


def commit(
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
    user = require_committer(session, viewer, repo, branch)
    if not message or len(message) > 1000:
        raise BadField("a commit's message has 1 to 1000 characters", "message")
    repo = locked(session, repo)
    ref = branch_ref(session, repo, branch)
    head = session.get_one(Commit, ref.commit_id)

    def result_on(files: ops.Files) -> ops.Files:
        return ops.apply(
            files,
            operations,
            lambda revision: ops.files_of(entries(session, resolve(session, repo, revision))),
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
    _keep(session, [o.stored for o in operations if isinstance(o, ops.Add)])
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
    made = insert_commit(
        session, repo, user.name, ref.name, head, before, after, message, description
    )
    point(session, repo, ref, made)
    record(session, user.id, "repo.commit", f"{repo.full_name}@{ref.name} {made.id}")
    reach("U9")
    return made


def point(session: Session, repo: Repo, ref: Ref, commit: Commit) -> None:
    """Let a branch of a locked repo end in another commit, and tell the projection."""
    old, ref.commit_id = ref.commit_id, commit.id
    repo.last_modified = now()
    if ref.kind == RefKind.BRANCH and ref.name == MAIN:
        repo.head = commit.id
    session.add_all([ref, repo])
    tell(session, "repo.committed", repo, commit, refs=[_changed(ref, old, commit.id)])


def _changed(ref: Ref, old: str | None, new: str | None) -> dict[str, str | None]:
    """What webhooks are told of a ref: None before it was made and after it was deleted."""
    return {"ref": f"refs/{_FOLDERS[RefKind(ref.kind)]}/{ref.name}", "oldSha": old, "newSha": new}


def branch_ref(session: Session, repo: Repo, name: str) -> Ref:
    """The row of a branch, or of a pull request as `refs/pr/<number>`; RevisionNotFound."""
    kind = RefKind.PULL if name.startswith("refs/pr/") else RefKind.BRANCH
    short = name.removeprefix("refs/pr/").removeprefix("refs/heads/")
    ref = session.get(Ref, (repo.id, kind, short))
    if ref is None:
        raise RevisionNotFound(f"Invalid rev id: {name[:200]}", "branch")
    return ref


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


def hold(session: Session, viewer: Viewer, stored: Stored, keep: timedelta = HOLD_FOR) -> None:
    """Remember that this user has sent these bytes; without a commit they are kept for `keep`.

    Busy if the same bytes were being collected at this moment: they have to be sent again.
    """
    user = viewer.require_write()
    _keep(session, [stored])
    _revive(session, [stored.sha256])
    assert user.id is not None
    _hold(session, user.id, stored.sha256, keep)


def keep(session: Session, stored: Stored) -> None:
    """The row of bytes that something other than a commit or a hold refers to from now on."""
    _keep(session, [stored])
    _revive(session, [stored.sha256])


def hold_known(session: Session, viewer: Viewer, digests: Collection[str]) -> set[str]:
    """Keep for 48 hours what a client is told it need not send; those of `digests` still here.

    `known` says what the viewer may be told of; this makes it true until the commit.
    """
    user = viewer.require_write()
    assert user.id is not None
    rows = select(Blob).where(col(Blob.sha256).in_(digests)).order_by(col(Blob.sha256))
    kept = set()
    for blob in session.exec(rows.with_for_update()):
        if blob.state != BlobState.DELETING:
            blob.state, blob.condemned_at = BlobState.PRESENT, None
            session.add(blob)
            _hold(session, user.id, blob.sha256, HOLD_FOR)
            kept.add(blob.sha256)
    return kept


def _hold(session: Session, user_id: int, sha256: str, keep: timedelta) -> None:
    row = {"sha256": sha256, "user_id": user_id, "expires_at": now() + keep}
    new = insert_once(session, Hold).values(row)
    later = case(
        (col(Hold.expires_at) > new.excluded.expires_at, Hold.expires_at),
        else_=new.excluded.expires_at,
    )
    session.execute(
        new.on_conflict_do_update(index_elements=["sha256", "user_id"], set_={"expires_at": later})
    )


def known(session: Session, viewer: Viewer, sha256: Sha256) -> Stored | None:
    """The blob if the viewer has sent it or can read it in some repo; else None.

    Knowing a digest is no right to the bytes, so everybody else has to send them again.
    """
    blob = session.get(Blob, sha256)
    if blob is None or blob.state == BlobState.DELETING:
        return None
    stored = Stored(sha256, blob.git_oid, blob.size)
    if viewer.user_id is not None:
        query = select(Hold.id).where(Hold.sha256 == sha256, Hold.user_id == viewer.user_id)
        if session.exec(query).first() is not None:
            return stored
    readable = (
        select(Repo.id)
        .join(Commit, col(Commit.repo_id) == col(Repo.id))
        .join(CommitEntry, col(CommitEntry.commit_id) == col(Commit.id))
        .where(CommitEntry.sha256 == sha256, files_visible_to(session, viewer))
    )
    return stored if session.exec(readable.limit(1)).first() is not None else None


def _id(repo: Repo) -> int:
    assert repo.id is not None, "a repo that is not in the database yet"
    return repo.id


def _find(session: Session, key: str, type: str) -> Repo | None:
    return session.execute(_REPO, {"type": type, "key": key}).scalars().first()


def _wait_for_name(session: Session, type: str, key: str) -> None:
    wait_for_others(session.connection(), f"{type} {key}")


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
        repo_id=_id(repo),
        commit_id=made.id if made else None,
        document=document,
    )
    session.add(event)
    session.flush()
    return event


def _keep(session: Session, stored: Sequence[Stored]) -> None:
    """Rows of bytes that have arrived; another writer may add the same ones at this moment."""
    fresh = Blob(sha256="", size=0).model_dump()
    rows = [
        fresh | {"sha256": item.sha256, "size": item.size, "git_oid": item.git_oid}
        for _, item in sorted({item.sha256: item for item in stored}.items())
    ]
    for start in range(0, len(rows), _AT_ONCE):
        new = insert_once(session, Blob).values(rows[start : start + _AT_ONCE])
        # A row that is there is written too, so that nobody removes it before this is over.
        session.execute(
            new.on_conflict_do_update(index_elements=["sha256"], set_={"size": new.excluded.size})
        )


def _revive(session: Session, digests: Collection[str]) -> None:
    """Take blobs that something refers to from now on back from the collection; Busy.

    The row is locked before its state is read, and the collection removes bytes only while it has
    that lock, so what the store says here stays true until this transaction ends.
    """
    wanted = sorted(digests)
    for start in range(0, len(wanted), _AT_ONCE):
        query = (
            select(Blob)
            .where(col(Blob.sha256).in_(wanted[start : start + _AT_ONCE]))
            .where(col(Blob.state) != BlobState.PRESENT)
            .order_by(col(Blob.sha256))
            .with_for_update()
            .execution_options(populate_existing=True)
        )
        for blob in session.exec(query):
            if blob.state == BlobState.DELETING:
                store: BlobStore = session.info[STORE]
                if store.size(Sha256(blob.sha256)) != blob.size:
                    raise Busy(f"{blob.sha256} was just collected; send the file again")
            blob.state, blob.condemned_at = BlobState.PRESENT, None
            session.add(blob)
    session.flush()


def insert_commit(
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
        repo_id=_id(repo),
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
    _revive(session, set(new))
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


def _by_prefix(session: Session, repo: Repo, revision: str) -> Commit | None:
    text = revision.lower()
    if not 7 <= len(text) <= 40 or any(c not in "0123456789abcdef" for c in text):
        return None
    query = select(Commit).where(Commit.repo_id == repo.id, col(Commit.id).startswith(text))
    found = session.exec(query.limit(2)).all()
    return found[0] if len(found) == 1 else None


def _create_ref(
    session: Session, viewer: Viewer, repo: Repo, kind: RefKind, name: str, revision: str
) -> Ref:
    user = require_writer(session, viewer, repo.namespace, repo.name)
    repo = locked(session, repo)
    target = resolve(session, repo, revision)
    check_ref_name(name, kind)
    if session.get(Ref, (repo.id, kind, name)) is not None:
        raise RefExists(f"Reference refs/{_FOLDERS[kind]}/{name} already exists", kind)
    ref = Ref(repo_id=_id(repo), kind=kind, name=name, commit_id=target.id)
    session.add(ref)
    _tell_ref(session, repo, _changed(ref, None, target.id))
    record(session, user.id, f"{kind}.create", f"{repo.full_name}@{name} {target.id}")
    return ref


def _delete_ref(session: Session, viewer: Viewer, repo: Repo, kind: RefKind, name: str) -> None:
    user = require_writer(session, viewer, repo.namespace, repo.name)
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
