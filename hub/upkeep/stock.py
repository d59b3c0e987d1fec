"""The bytes: whether the store has what the catalogue says it has, and what else it has."""

import hashlib
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta

from sqlmodel import Session, col, select

from hub.blobs.store import BlobStore, Sha256
from hub.context import Hub
from hub.db import now
from hub.repos.models import Blob, BlobState, Commit, CommitEntry, Repo
from hub.upkeep.findings import Finding, Findings, Severity
from hub.upkeep.references import is_referenced

# sha256 -> (size, when it became visible)
Stock = Mapping[str, tuple[int, datetime]]
# Bytes done, bytes in all.
Report = Callable[[int, int], None]

_BRING_BACK = "upload the same file again, or copy it from a backup (`graft admin restore --blobs`)"
# An upload is a blob first and a row after it: younger ones may still be on their way.
_YOUNG = timedelta(hours=48)
_NAMED = 3


def take_stock(hub: Hub) -> Stock:
    """Everything the store has, or the error of the listing: a part would look like a loss."""
    return {sha256: (size, at) for sha256, size, at in hub.store.inventory()}


def check_stock(session: Session, stock: Stock) -> Findings:
    """Every row has its bytes, in their length; bytes without a row are noted."""
    known = set()
    for blob in session.exec(select(Blob).order_by(col(Blob.sha256))):
        known.add(blob.sha256)
        if blob.state == BlobState.DELETING:
            continue
        found = stock.get(blob.sha256)
        if found is None:
            yield _lost(session, blob)
        elif found[0] != blob.size:
            what = f"{found[0]} of the {blob.size} bytes of {_named(session, blob.sha256)} are left"
            yield Finding("I2", "short-blob", what, _BRING_BACK)
    orphans = [sha256 for sha256 in stock if sha256 not in known]
    old = [sha256 for sha256 in orphans if stock[sha256][1] < now() - _YOUNG]
    if old:
        size = sum(stock[sha256][0] for sha256 in old)
        what = f"{len(old)} blobs of {size:,} bytes in all belong to nothing in the catalogue"
        advice = "`graft admin gc` collects them"
        yield Finding("I3", "orphan-blobs", what, advice, Severity.NOTE)


def check_hashes(hub: Hub, session: Session, stock: Stock, report: Report) -> Findings:
    """Every byte of the store is read and hashed."""
    done, total = 0, sum(size for size, _ in stock.values())
    for sha256 in sorted(stock):
        report(done, total)
        if hash_of(hub.store, Sha256(sha256)) not in (sha256, None):
            what = f"the bytes of {_named(session, sha256)} are damaged"
            yield Finding("I2", "damaged-blob", what, _BRING_BACK)
        done += stock[sha256][0]
    report(total, total)


def hash_of(store: BlobStore, sha256: Sha256) -> str | None:
    """Of the bytes that the store gives under this name; None without any."""
    hashed = hashlib.sha256()
    try:
        for chunk in store.open(sha256):
            hashed.update(chunk)
    except FileNotFoundError:
        return None
    return hashed.hexdigest()


def _lost(session: Session, blob: Blob) -> Finding:
    what = f"the bytes of {_named(session, blob.sha256)} are missing"
    if is_referenced(session, blob.sha256):
        return Finding("I2", "lost-blob", what, _BRING_BACK)
    advice = "nothing refers to it; `graft admin gc` removes its row"
    return Finding("I2", "lost-orphan", what, advice, Severity.NOTE)


def _named(session: Session, sha256: str) -> str:
    """A digest and the files that are these bytes."""
    query = (
        select(Repo.namespace, Repo.name, CommitEntry.path)
        .join(Commit, col(Commit.id) == col(CommitEntry.commit_id))
        .join(Repo, col(Repo.id) == col(Commit.repo_id))
        .where(CommitEntry.sha256 == sha256)
        .distinct()
        .limit(_NAMED + 1)
    )
    files = [f"{namespace}/{name}:{path}" for namespace, name, path in session.exec(query)]
    if not files:
        return f"{sha256} (no file)"
    more = ", …" if len(files) > _NAMED else ""
    return f"{sha256} ({', '.join(files[:_NAMED])}{more})"
