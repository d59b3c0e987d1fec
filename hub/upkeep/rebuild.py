"""A catalogue from the blobs alone: repos, names, visibility, commits, branches and tags, and which
names are reserved or lead elsewhere.

What no manifest says is lost: tokens, passwords and members, likes, requests for access, jobs and
their lineage, the audit log, and what was published in the last minute.
A commit without all of its bytes is left out, and with it what follows only from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import insert, text
from sqlmodel import Session, select

from hub.audit import record
from hub.blobs.store import Sha256
from hub.context import Hub
from hub.errors import Conflict
from hub.limits import quotas
from hub.limits.models import Quota
from hub.repos.models import Blob, Commit, CommitEntry, Redirect, Ref, RefKind, Repo
from hub.upkeep.manifests import MAGIC, Manifest, unpack
from hub.upkeep.stock import Stock, take_stock
from hub.users import service as users
from hub.users.models import Namespace, NameTombstone, Organization, User
from hub.users.names import key_of


class NotEmpty(Conflict):
    """A catalogue that has repos is never rebuilt over."""


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What came back, and the ids of commits and names of repos that could not."""

    repos: int
    commits: int
    unsigned: int
    lost_commits: tuple[str, ...]
    lost_repos: tuple[str, ...]


def rebuild(hub: Hub) -> Rebuilt:
    """Fill an empty catalogue in one transaction; NotEmpty."""
    with hub.db.read() as session:
        if session.exec(select(Repo.id)).first() is not None:
            raise NotEmpty("the catalogue has repos; it can be rebuilt only where it is empty")
    stock = take_stock(hub)
    latest, commits, unsigned = _read(hub, stock)
    whole = {
        commit["id"]: commit
        for commit in commits
        if all(stock.get(file[1], (-1,))[0] == file[3] for file in commit["files"])
    }
    lost = sorted(commit["id"] for commit in commits if commit["id"] not in whole)
    lost_repos, n_repos, n_commits = [], 0, 0
    with hub.db.write() as session:
        for subject, document in sorted(latest.items()):
            _remember(session, subject, document, stock)
        there = (document for document in latest.values() if document["kind"] == "repo")
        for repo in sorted(there, key=lambda repo: int(repo["repo"])):
            mine = [commit for commit in whole.values() if commit["repo"] == repo["repo"]]
            name = f"{repo['namespace']}/{repo['name']}"
            if _insert(session, repo, mine):
                for commit in mine:
                    _remember(session, f"commit/{commit['id']}", commit, stock)
                n_repos, n_commits = n_repos + 1, n_commits + len(mine)
            else:
                lost_repos.append(name)
        taken = {(repo.type, repo.key): repo.id for repo in session.exec(select(Repo))}
        for names in latest.values():
            if names["kind"] == "names":
                _reserve(session, names, taken)
        for key in session.exec(select(Repo.namespace_key).distinct()).all():
            quota = session.get(Quota, key) or Quota(key=key)
            quota.used_bytes = quotas.count(session, key)
            session.add(quota)
        if session.get_bind().dialect.name == "postgresql":
            last = "SELECT setval(pg_get_serial_sequence('repo', 'id'), max(id)) FROM repo"
            session.execute(text(last))
        record(session, None, "store.rebuild", f"{n_repos} repos")
    return Rebuilt(n_repos, n_commits, unsigned, tuple(lost), tuple(lost_repos))


def _remember(session: Session, subject: str, document: dict[str, Any], stock: Stock) -> None:
    """The manifest goes on from its version, so that the next one is newer."""
    sha256, version = document["manifest"], document["version"]
    if session.get(Blob, sha256) is None:
        session.add(Blob(sha256=sha256, size=stock[sha256][0]))
        session.flush()
    session.add(Manifest(subject=subject, sha256=sha256, state="", version=version))


def _read(hub: Hub, stock: Stock) -> tuple[dict[str, Any], list[Any], int]:
    """The latest manifest of each repo and namespace, those of all commits, how many are not ours."""
    latest: dict[str, dict[str, Any]] = {}
    commits, unsigned = [], 0
    for sha256 in sorted(stock):
        if b"".join(hub.store.open(Sha256(sha256), 0, len(MAGIC))) != MAGIC:
            continue
        document = unpack(hub, b"".join(hub.store.open(Sha256(sha256))))
        if document is None:
            unsigned += 1
            continue
        document["manifest"] = sha256
        if document["kind"] == "commit":
            commits.append(document)
            continue
        subject = _subject(document)
        if document["version"] > latest.get(subject, {"version": 0})["version"]:
            latest[subject] = document
    return latest, commits, unsigned


def _subject(document: dict[str, Any]) -> str:
    if document["kind"] == "names":
        return f"names/{key_of(document['namespace'])}"
    return f"repo/{document['repo']}"


def _insert(session: Session, repo: dict[str, Any], commits: list[dict[str, Any]]) -> bool:
    """False if the end of its main is lost: a repo is not shown as what it was before."""
    there = {commit["id"] for commit in commits}
    refs = [(kind, name, head) for kind, name, head in repo["refs"] if head in there]
    head = next((at for kind, name, at in refs if (kind, name) == (RefKind.BRANCH, "main")), None)
    if head is None:
        return False
    _namespace(session, repo["namespace"], is_organization=repo["is_organization"])
    made = {commit["id"]: datetime.fromisoformat(commit["created_at"]) for commit in commits}
    session.add(
        Repo(
            id=repo["repo"],
            type=repo["type"],
            namespace=repo["namespace"],
            name=repo["name"],
            namespace_key=key_of(repo["namespace"]),
            key=key_of(f"{repo['namespace']}/{repo['name']}"),
            private=repo["private"],
            gated=repo["gated"],
            head=head,
            created_at=datetime.fromisoformat(repo["created_at"]),
            last_modified=made[head],
        )
    )
    session.flush()
    for commit in commits:
        _insert_commit(session, commit)
    session.add_all(
        Ref(repo_id=repo["repo"], kind=kind, name=name, commit_id=at) for kind, name, at in refs
    )
    session.flush()
    return True


def _insert_commit(session: Session, commit: dict[str, Any]) -> None:
    fields = ("id", "author", "message", "description")
    session.add(
        Commit(
            **{name: commit[name] for name in fields},
            repo_id=commit["repo"],
            parent_id=commit["parent"],
            created_at=datetime.fromisoformat(commit["created_at"]),
        )
    )
    for _, sha256, git_oid, size, lfs, _ in commit["files"]:
        blob = session.get(Blob, sha256)
        if blob is None:
            blob = Blob(sha256=sha256, size=size)
        # An LFS file's is that of its pointer.
        blob.git_oid = blob.git_oid or (None if lfs else git_oid)
        session.add(blob)
    session.flush()
    columns = ("path", "sha256", "git_oid", "size", "lfs", "last_commit_id")
    rows = [
        {"commit_id": commit["id"]} | dict(zip(columns, file, strict=True))
        for file in commit["files"]
    ]
    if rows:
        session.execute(insert(CommitEntry), rows)


def _reserve(
    session: Session, names: dict[str, Any], taken: Mapping[tuple[str, str], int | None]
) -> None:
    """What is a repo's name now is not reserved: the two manifests are not of the same moment."""
    _namespace(session, names["namespace"], is_organization=names["is_organization"])
    there = set(taken.values())
    for type, key, owner in names["reserved"]:
        if (type, key) not in taken:
            user = session.exec(select(User).where(User.key == key_of(owner or ""))).first()
            user_id = user.id if user is not None else None
            session.add(NameTombstone(type=type, key=key, user_id=user_id))
    for type, key, repo_id in names["moved"]:
        if (type, key) not in taken and repo_id in there:
            session.add(Redirect(type=type, key=key, repo_id=repo_id))
    session.flush()


def _namespace(session: Session, name: str, *, is_organization: bool) -> None:
    if session.get(Namespace, key_of(name)) is not None:
        return
    if is_organization:
        session.add(Namespace(key=key_of(name)))
        session.flush()
        session.add(Organization(name=name, key=key_of(name)))
        session.flush()
    else:
        users.create_user(session, name)
