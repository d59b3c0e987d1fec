"""Collecting bytes that nothing refers to, in two phases a day apart, and never in a hurry.

present ── condemned ── deleting ── (row gone)

A run condemns what nothing refers to and what is older than the grace, and deletes what an earlier
run has condemned, if still nothing refers to it.
Whoever refers to a condemned blob meanwhile takes it back in its own transaction
(`hub.repos.holds`). Bytes are removed only while the row is locked; the row stays a day longer,
so that a writer that sent the same bytes before their removal is told to send them again.
Bytes without a row get a row first and go the same way.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import Session, col, func, select

from hub.audit import record
from hub.blobs.store import Sha256
from hub.context import Hub, StoreIdentity
from hub.db import now
from hub.errors import Conflict
from hub.failpoints import reach
from hub.repos.models import Blob, BlobState, Repo
from hub.upkeep.last_backup import last_backup
from hub.upkeep.references import referenced
from hub.upkeep.stock import Stock, take_stock

MAX_SHARE = 0.1
MAX_BLOBS = 10_000
_AT_ONCE = 500


class GcRefused(Conflict):
    """A brake: nothing was condemned and nothing was deleted."""


@dataclass(frozen=True, slots=True)
class Blobs:
    """Digests with their sizes."""

    sizes: dict[str, int]

    def __len__(self) -> int:
        return len(self.sizes)

    def to_json(self) -> dict[str, Any]:
        return {"blobs": len(self), "bytes": sum(self.sizes.values()), "sha256": sorted(self.sizes)}


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run would do now: `orphans` are condemned too, they have no row yet.

    `unfinished` were being deleted when a run ended; their references are checked long since.
    """

    total: int
    condemn: Blobs
    orphans: Blobs
    delete: Blobs
    unfinished: Blobs

    @property
    def n(self) -> int:
        """How many blobs the run would condemn or delete."""
        return len(self.condemn) + len(self.orphans) + len(self.delete)

    def to_json(self) -> dict[str, Any]:
        phases = ("condemn", "orphans", "delete", "unfinished")
        return {"total": self.total, "n": self.n} | {p: getattr(self, p).to_json() for p in phases}


def plan(hub: Hub, moment: datetime | None = None) -> Plan:
    """Read the whole store and the whole catalogue; changes nothing.

    A store that cannot be listed to its end is an error: what is missing from a listing would
    look like nothing at all.
    """
    moment = moment or now()
    stock = take_stock(hub)
    with hub.db.read() as session:
        rows = {blob.sha256: blob for blob in session.exec(select(Blob))}
        old = [
            sha256
            for sha256, blob in rows.items()
            if blob.state == BlobState.PRESENT and _is_old(hub, blob, stock, moment)
        ]
        due = [sha256 for sha256, blob in rows.items() if _is_due(hub, blob, moment)]
        return Plan(
            total=len(rows.keys() | stock.keys()),
            condemn=_sized(rows, _unreferenced(session, old)),
            orphans=Blobs(
                {
                    sha256: size
                    for sha256, (size, at) in stock.items()
                    if sha256 not in rows and at < moment - _grace(hub)
                }
            ),
            delete=_sized(rows, _unreferenced(session, due)),
            unfinished=_sized(
                rows,
                [
                    sha256
                    for sha256, blob in rows.items()
                    if blob.state == BlobState.DELETING and sha256 in stock
                ],
            ),
        )


def brake(
    hub: Hub, planned: Plan, *, confirm: int | None = None, without_backup: bool = False
) -> str | None:
    """Why this plan must not be carried out, in one sentence; None if it may."""
    with hub.db.read() as session:
        identity = session.exec(select(StoreIdentity)).one()
        n_repos = session.exec(select(func.count()).select_from(Repo)).one()
    if identity.store_id != hub.store.id:
        return f"the catalogue describes blob store {identity.store_id}, not {hub.store.id}"
    if identity.unchecked is not None:
        return f"{identity.unchecked}; `graft admin fsck --full --accept` has to pass first"
    if n_repos == 0:
        return "the catalogue has no repos at all: it may not be the one of these blobs"
    limit = min(MAX_BLOBS, planned.total * MAX_SHARE)
    most = max(len(planned.condemn) + len(planned.orphans), len(planned.delete))
    if most > limit and (confirm is None or confirm < planned.n):
        return (
            f"{planned.n} of {planned.total} blobs would go, more than {MAX_SHARE:.0%} or"
            f" {MAX_BLOBS:,}; say --confirm {planned.n} if that is right"
        )
    return None if without_backup else _without_backup(hub)


def collect(
    hub: Hub,
    planned: Plan,
    *,
    confirm: int | None = None,
    without_backup: bool = False,
    moment: datetime | None = None,
) -> Plan:
    """Carry a plan out as far as it is still true, and answer what was done; GcRefused."""
    moment = moment or now()
    reason = brake(hub, planned, confirm=confirm, without_backup=without_backup)
    if reason is not None:
        raise GcRefused(f"nothing was collected: {reason}")
    unfinished = [sha for sha in planned.unfinished.sizes if _remove(hub, sha, moment)]
    condemned: list[str] = []
    for some in _batches(planned.condemn.sizes):
        condemned += _condemn(hub, some, moment)
    orphans: list[str] = []
    for some in _batches(planned.orphans.sizes):
        orphans += _adopt(hub, {sha: planned.orphans.sizes[sha] for sha in some}, moment)
    deleted = [sha for sha in planned.delete.sizes if _delete(hub, sha, moment)]
    return Plan(
        planned.total,
        _only(planned.condemn, condemned),
        _only(planned.orphans, orphans),
        _only(planned.delete, deleted),
        _only(planned.unfinished, unfinished),
    )


def _condemn(hub: Hub, digests: Sequence[str], moment: datetime) -> list[str]:
    with hub.db.write() as session:
        # Locked first: the references are then read after whoever referred to one has committed.
        blobs = _locked(session, digests, BlobState.PRESENT)
        kept = referenced(session, [blob.sha256 for blob in blobs])
        gone = [blob for blob in blobs if blob.sha256 not in kept]
        for blob in gone:
            blob.state, blob.condemned_at = BlobState.CONDEMNED, moment
            session.add(blob)
            record(session, None, "blob.condemn", blob.sha256)
        reach("G1")
    reach("G2")
    return [blob.sha256 for blob in gone]


def _adopt(hub: Hub, sizes: dict[str, int], moment: datetime) -> list[str]:
    """Condemned rows for bytes without one, unless somebody has just sent the same bytes."""
    rows = [
        Blob(sha256=sha256, size=size, state=BlobState.CONDEMNED, condemned_at=moment).model_dump()
        for sha256, size in sorted(sizes.items())
    ]
    with hub.db.write() as session:
        on = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
        new = on.insert(Blob).values(rows).on_conflict_do_nothing().returning(col(Blob.sha256))
        added = sorted(session.scalars(new))
        for sha256 in added:
            record(session, None, "blob.condemn", sha256)
    return added


def _delete(hub: Hub, sha256: str, moment: datetime) -> bool:
    with hub.db.write() as session:
        blobs = _locked(session, [sha256], BlobState.CONDEMNED)
        if not blobs or not _is_due(hub, blobs[0], moment):
            return False
        (blob,) = blobs
        if referenced(session, [sha256]):
            blob.state, blob.condemned_at = BlobState.PRESENT, None
            session.add(blob)
            return False
        blob.state, blob.condemned_at = BlobState.DELETING, moment
        session.add(blob)
    reach("G3")
    return _remove(hub, sha256, moment)


def _remove(hub: Hub, sha256: str, moment: datetime) -> bool:
    """Remove the bytes while the row is locked: who wants them back waits, and then sees."""
    with hub.db.write() as session:
        blobs = _locked(session, [sha256], BlobState.DELETING)
        if not blobs:
            return False
        hub.store.trash(Sha256(sha256))
        reach("G4")
        blobs[0].condemned_at = moment
        session.add(blobs[0])
        record(session, None, "blob.delete", f"{sha256} {blobs[0].size}")
    reach("G5")
    return True


def _locked(session: Session, digests: Sequence[str], state: BlobState) -> list[Blob]:
    query = (
        select(Blob)
        .where(col(Blob.sha256).in_(digests), col(Blob.state) == state)
        .order_by(col(Blob.sha256))
        .with_for_update()
    )
    return list(session.exec(query))


def _is_old(hub: Hub, blob: Blob, stock: Stock, moment: datetime) -> bool:
    limit = moment - _grace(hub)
    _, at = stock.get(blob.sha256, (0, blob.created_at))
    return blob.created_at < limit and at < limit


def _is_due(hub: Hub, blob: Blob, moment: datetime) -> bool:
    limit = moment - timedelta(hours=hub.settings.gc_condemned_hours)
    since = blob.condemned_at
    return blob.state == BlobState.CONDEMNED and since is not None and since < limit


def _grace(hub: Hub) -> timedelta:
    return timedelta(days=hub.settings.gc_grace_days)


def _without_backup(hub: Hub) -> str | None:
    days = hub.settings.gc_backup_days
    made = last_backup(hub.settings)
    if days == 0 or (made is not None and made > now() - timedelta(days=days)):
        return None
    latest = "there is no backup" if made is None else f"the last backup is of {made:%Y-%m-%d}"
    return f"{latest}; make one with `graft admin backup`, or say --without-backup"


def _unreferenced(session: Session, digests: Sequence[str]) -> Iterator[str]:
    for some in _batches(digests):
        kept = referenced(session, some)
        yield from (sha256 for sha256 in some if sha256 not in kept)


def _sized(rows: dict[str, Blob], digests: Iterator[str] | Sequence[str]) -> Blobs:
    return Blobs({sha256: rows[sha256].size for sha256 in digests})


def _only(blobs: Blobs, done: Sequence[str]) -> Blobs:
    return Blobs({sha256: blobs.sizes[sha256] for sha256 in done})


def _batches(digests: Sequence[str] | dict[str, int]) -> Iterator[list[str]]:
    ordered = sorted(digests)
    for start in range(0, len(ordered), _AT_ONCE):
        yield ordered[start : start + _AT_ONCE]
