"""Manifests: what the catalogue says of each commit, of each repo and of the names that nobody else
may have any more, kept as blobs beside the files.

They are written a moment after what they describe, never in its transaction, and signed with the
hub's key, because anybody may upload bytes that look like one.
`hub.upkeep.rebuild` makes a catalogue from them alone.
"""

import hashlib
import json
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete
from sqlmodel import Field, Session, SQLModel, col, select

from hub.blobs.store import Stored
from hub.context import Hub
from hub.db import now
from hub.repos import commits, holds
from hub.repos.models import Commit, Redirect, Ref, Repo
from hub.users.models import NameTombstone, Organization, User

MAGIC = b"grafthub-manifest/1 "
PURPOSE = "manifest"
RECENTLY = timedelta(minutes=10)


class Manifest(SQLModel, table=True):
    """The manifest of `commit/<id>`, `repo/<id>` or `names/<namespace>`; the last two are written
    anew when they change.

    `state` is a hash of what it says without its version. The row of a deleted repo stays.
    """

    __tablename__ = "manifest"

    subject: str = Field(primary_key=True)
    sha256: str = Field(foreign_key="blob.sha256", index=True)
    state: str
    version: int = 1


def write_missing(hub: Hub, since: datetime | None = None) -> int:
    """Manifests of commits that have none and of repos that have changed; how many were written.

    With `since` only of what was made or changed after it.
    """
    n = 0
    for subject, document in (*_commits(hub, since), *_repos(hub, since), *_names(hub, since)):
        n += _write(hub, subject, document)
    if since is None:
        n += sum(_write(hub, subject, document) for subject, document in _deleted(hub))
        with hub.db.write() as session:
            _forget_commits(session)
    return n


def pack(hub: Hub, document: dict[str, Any]) -> bytes:
    """A manifest as bytes: magic, signature, JSON."""
    body = json.dumps(document, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
    return MAGIC + hub.signer.seal(PURPOSE, body).encode() + b"\n" + body


def unpack(hub: Hub, content: bytes) -> dict[str, Any] | None:
    """The document, or None if this hub did not sign it."""
    head, _, body = content.removeprefix(MAGIC).partition(b"\n")
    if not content.startswith(MAGIC) or head.decode("latin-1") != hub.signer.seal(PURPOSE, body):
        return None
    document: dict[str, Any] = json.loads(body)
    return document


def _write(hub: Hub, subject: str, document: dict[str, Any]) -> bool:
    state = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    with hub.db.read() as session:
        known = session.get(Manifest, subject)
    if known is not None and known.state == state:
        return False
    version = known.version + 1 if known is not None else 1
    stored: Stored = hub.store.put([pack(hub, document | {"version": version})])
    with hub.db.write() as session:
        holds.keep(session, stored)
        row = session.get(Manifest, subject)
        if row is not None and row.version >= version:
            return False
        if row is None:
            row = Manifest(subject=subject, sha256=stored.sha256, state=state)
        row.sha256, row.state, row.version = stored.sha256, state, version
        session.add(row)
    return True


def _commits(hub: Hub, since: datetime | None) -> Iterator[tuple[str, dict[str, Any]]]:
    subject = ("commit/" + col(Commit.id)).label("subject")
    query = (
        select(Commit.id)
        .join(Manifest, col(Manifest.subject) == subject, isouter=True)
        .where(col(Manifest.subject).is_(None))
    )
    if since is not None:
        query = query.where(col(Commit.created_at) > since)
    with hub.db.read() as session:
        missing = session.exec(query.order_by(col(Commit.created_at))).all()
    for commit_id in missing:
        with hub.db.read() as session:
            commit = session.get(Commit, commit_id)
            if commit is not None:
                yield f"commit/{commit_id}", _of_commit(session, commit)


def _of_commit(session: Session, commit: Commit) -> dict[str, Any]:
    return {
        "kind": "commit",
        "repo": commit.repo_id,
        "id": commit.id,
        "parent": commit.parent_id,
        "author": commit.author,
        "message": commit.message,
        "description": commit.description,
        "created_at": commit.created_at.isoformat(),
        "files": [
            [e.path, e.sha256, e.git_oid, e.size, e.lfs, e.last_commit_id]
            for e in commits.entries(session, commit)
        ],
    }


def _repos(hub: Hub, since: datetime | None) -> Iterator[tuple[str, dict[str, Any]]]:
    query = select(Repo.id).order_by(col(Repo.id))
    if since is not None:
        query = query.where(col(Repo.last_modified) > since)
    with hub.db.read() as session:
        ids = session.exec(query).all()
    for repo_id in ids:
        with hub.db.read() as session:
            repo = session.get(Repo, repo_id)
            if repo is not None:
                yield f"repo/{repo_id}", _of_repo(session, repo)


def _of_repo(session: Session, repo: Repo) -> dict[str, Any]:
    refs = select(Ref).where(Ref.repo_id == repo.id).order_by(col(Ref.kind), col(Ref.name))
    owner = select(Organization.id).where(Organization.key == repo.namespace_key)
    return {
        "kind": "repo",
        "repo": repo.id,
        "type": repo.type,
        "namespace": repo.namespace,
        "is_organization": session.exec(owner).first() is not None,
        "name": repo.name,
        "private": repo.private,
        "gated": repo.gated,
        "created_at": repo.created_at.isoformat(),
        "refs": [[ref.kind, ref.name, ref.commit_id] for ref in session.exec(refs)],
    }


def _names(hub: Hub, since: datetime | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of each namespace that has, or had, names of repos that were deleted or moved away."""
    stones = select(NameTombstone.key)
    if since is not None:
        stones = stones.where(col(NameTombstone.created_at) > since)
    with hub.db.read() as session:
        keys = {key.partition("/")[0] for key in session.exec(stones)}
        if since is None:
            written = session.exec(select(Manifest.subject).where(_is("names/"))).all()
            keys |= {subject.removeprefix("names/") for subject in written}
    for key in sorted(keys):
        with hub.db.read() as session:
            yield f"names/{key}", _of_names(session, key)


def _of_names(session: Session, key: str) -> dict[str, Any]:
    named = select(Organization).where(Organization.key == key)
    organization = session.exec(named).first()
    user = session.exec(select(User).where(User.key == key)).first()
    stones = (
        select(NameTombstone, User.name)
        .join(User, col(User.id) == col(NameTombstone.user_id), isouter=True)
        .where(col(NameTombstone.key).startswith(f"{key}/", autoescape=True))
        .order_by(col(NameTombstone.type), col(NameTombstone.key))
    )
    moved = (
        select(Redirect)
        .where(col(Redirect.key).startswith(f"{key}/", autoescape=True))
        .order_by(col(Redirect.type), col(Redirect.key))
    )
    owner = organization or user
    assert owner is not None, f"a repo's name without its namespace {key}"
    return {
        "kind": "names",
        "namespace": owner.name,
        "is_organization": organization is not None,
        "reserved": [[stone.type, stone.key, name] for stone, name in session.exec(stones)],
        "moved": [[old.type, old.key, old.repo_id] for old in session.exec(moved)],
    }


def _deleted(hub: Hub) -> Iterator[tuple[str, dict[str, Any]]]:
    """That a repo is gone has to be known too, or its older manifest would bring it back."""
    with hub.db.read() as session:
        ids = {f"repo/{repo_id}" for repo_id in session.exec(select(Repo.id))}
        written = session.exec(select(Manifest.subject).where(_is("repo/"))).all()
    for subject in written:
        if subject not in ids:
            yield subject, {"kind": "deleted", "repo": int(subject.removeprefix("repo/"))}


def _forget_commits(session: Session) -> None:
    there = select("commit/" + col(Commit.id))
    session.execute(delete(Manifest).where(_is("commit/"), col(Manifest.subject).not_in(there)))


def _is(prefix: str) -> Any:
    return col(Manifest.subject).startswith(prefix)


def write_recent(hub: Hub) -> int:
    """What running hubs do every minute; the hourly upkeep finds what this may miss."""
    return write_missing(hub, now() - RECENTLY)
