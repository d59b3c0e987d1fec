"""`graft admin fsck`: the promises of docs/operations.md held against what is there. Reads only."""

from collections.abc import Callable, Sequence

from sqlalchemy import exists, text
from sqlalchemy.orm import aliased
from sqlmodel import Session, SQLModel, and_, col, func, or_, select

from hub.adapters.models import Adapter, Card
from hub.audit import broken_link, record
from hub.context import Hub, StoreIdentity
from hub.db import now
from hub.jobs.models import TERMINAL, Job, JobState
from hub.limits import quotas
from hub.limits.models import Quota
from hub.repos.models import Blob, BlobState, Commit, CommitEntry, Event, Ref, RefKind, Repo
from hub.upkeep.findings import Finding, Findings, Severity
from hub.upkeep.references import referenced
from hub.upkeep.stock import Report, check_hashes, check_stock, take_stock

_REINDEX = "`graft admin reindex` makes the projection anew"
_RESTORE = "this cannot come from a crash: restore the latest backup, and report it"


def fsck(
    hub: Hub, *, full: bool = False, report: Report = lambda done, total: None
) -> list[Finding]:
    """What does not hold; `full` reads every byte of the store, else lengths are compared.

    It may run beside a hub that is in use: the store is listed after the catalogue's moment, so
    what is uploaded meanwhile cannot look like a loss.
    """
    with hub.db.read(for_long=True) as session:
        found = [*_database(session)]
        for check in CHECKS:
            found += check(session)
    with hub.db.read(for_long=True) as session:  # It waits while the store is listed and read.
        known = set(session.exec(select(Blob.sha256)))  # From here on it sees one moment.
        stock = take_stock(hub)
        found += check_stock(session, stock)
        if full:
            mine = {sha256: what for sha256, what in stock.items() if sha256 in known}
            found += check_hashes(hub, session, mine, report)
    return found


def accept(hub: Hub) -> None:
    """A restored hub was found whole: from now on blobs may be collected again."""
    with hub.db.write() as session:
        identity = session.exec(select(StoreIdentity)).one()
        if identity.unchecked is not None:
            identity.unchecked = None
            session.add(identity)
            record(session, None, "store.accept", hub.store.id)


def is_sound(findings: Sequence[Finding]) -> bool:
    """Whether there is nothing but notes."""
    return all(finding.severity == Severity.NOTE for finding in findings)


def _database(session: Session) -> Findings:
    if session.get_bind().dialect.name != "sqlite":
        yield from _foreign_keys(session)
        return
    for (line,) in session.execute(text("PRAGMA integrity_check")):
        if line != "ok":
            yield Finding("I1", "database", f"SQLite: {line}", "restore the latest backup")
    for table, row, parent, _ in session.execute(text("PRAGMA foreign_key_check")):
        what = f"row {row} of {table} names a row of {parent} that does not exist"
        yield Finding("I2", "foreign-key", what, _RESTORE)


def _foreign_keys(session: Session) -> Findings:
    """PostgreSQL looks at a key only when its row is written, and trusts the index it has."""
    for table in SQLModel.metadata.sorted_tables:
        for key in sorted(table.foreign_key_constraints, key=lambda key: list(key.column_keys)):
            parent = key.referred_table.alias()
            pairs = [(part.parent, parent.c[part.column.name]) for part in key.elements]
            orphans = (
                select(func.count())
                .select_from(table)
                .where(
                    *(column.is_not(None) for column, _ in pairs),
                    ~exists().where(*(column == there for column, there in pairs)),
                )
            )
            if n := session.exec(orphans).one():
                columns = ", ".join(key.column_keys)
                what = f"{n} rows of {table.name} name rows of {key.referred_table.name} that do"
                what += f" not exist ({columns})"
                yield Finding("I2", "foreign-key", what, _RESTORE)


def _sizes(session: Session) -> Findings:
    query = (
        select(CommitEntry, Blob)
        .join(Blob, col(Blob.sha256) == col(CommitEntry.sha256))
        .where(CommitEntry.size != Blob.size)
    )
    for entry, blob in session.exec(query):
        what = f"{entry.path} in commit {entry.commit_id} says {entry.size} bytes, not {blob.size}"
        yield Finding("I2", "entry-size", what, _RESTORE)


def _history(session: Session) -> Findings:
    ref = select(Ref, Commit).join(Commit, col(Commit.id) == col(Ref.commit_id))
    for row, commit in session.exec(ref.where(col(Ref.repo_id) != col(Commit.repo_id))):
        what = f"{row.kind} {row.name} of repo {row.repo_id} is commit {commit.id} of another repo"
        yield Finding("I8", "foreign-head", what, _RESTORE)
    parent = aliased(Commit)
    broken = (
        select(Commit)
        .join(parent, col(parent.id) == col(Commit.parent_id), isouter=True)
        .where(
            col(Commit.parent_id).is_not(None),
            or_(col(parent.id).is_(None), col(parent.repo_id) != col(Commit.repo_id)),
        )
    )
    for commit in session.exec(broken):
        what = f"commit {commit.id} follows {commit.parent_id}, which its repo does not have"
        yield Finding("I8", "broken-chain", what, _RESTORE)
    main = and_(col(Ref.repo_id) == col(Repo.id), Ref.kind == RefKind.BRANCH, Ref.name == "main")
    heads = select(Repo, Ref).join(Ref, main, isouter=True)
    for repo, head in session.exec(heads):
        if head is None or head.commit_id != repo.head:
            what = f"{repo.full_name} shows {repo.head}, but main is {head and head.commit_id}"
            yield Finding("I8", "wrong-head", what, _RESTORE)


def _jobs(session: Session) -> Findings:
    for job in session.exec(select(Job)):
        if (job.state in TERMINAL) != (job.finished_at is not None):
            what = f"job {job.id} is {job.state} and finished at {job.finished_at}"
            yield Finding("I4", "job-end", what, _RESTORE)
        if (job.state == JobState.SUCCEEDED) != (job.result is not None):
            what = f"job {job.id} is {job.state} and its result is {job.result}"
            yield Finding("I4", "job-result", what, _RESTORE)
        if job.state == JobState.RUNNING and job.lease_until and job.lease_until < now():
            what = f"the worker of job {job.id} disappeared"
            advice = "the next worker takes it up again"
            yield Finding("I4", "lapsed-lease", what, advice, Severity.NOTE)


def _usage(session: Session) -> Findings:
    """More than there is may be counted, what was deleted since; less would let too much in."""
    counted = {quota.key: quota.used_bytes for quota in session.exec(select(Quota))}
    for key in sorted(set(session.exec(select(Repo.namespace_key)))):
        used = quotas.count(session, key)
        if counted.get(key, 0) < used:
            what = f"{key} keeps {used:,} bytes and is counted with {counted.get(key, 0):,}"
            yield Finding("I5", "usage", what, "its quota lets too much in; please report it")


def _condemned(session: Session) -> Findings:
    condemned = select(Blob.sha256).where(col(Blob.state) != BlobState.PRESENT)
    digests = list(session.exec(condemned))
    for start in range(0, len(digests), 500):
        for sha256 in sorted(referenced(session, digests[start : start + 500])):
            state = session.get_one(Blob, sha256).state
            what = f"blob {sha256} is {state} although something refers to it"
            yield Finding("I7", "condemned-in-use", what, "it is kept; please report it")


def _audit(session: Session) -> Findings:
    row = broken_link(session)
    if row is not None:
        what = f"row {row} of the audit log was changed, or the one before it removed"
        advice = "compare it with a backup; rows after it prove nothing about rows before it"
        yield Finding("I9", "audit", what, advice)


def _projection(session: Session) -> Findings:
    waiting = list(session.exec(select(Event.repo_id).where(col(Event.done_at).is_(None))))
    if waiting:
        what = f"{len(set(waiting))} repos were not read since they changed"
        advice = "the hub does it at its next start"
        yield Finding("I10", "not-projected", what, advice, Severity.NOTE)
    waits = exists().where(col(Event.repo_id) == col(Repo.id), col(Event.done_at).is_(None))
    cards = select(Repo, Card).join(Card, col(Card.repo_id) == col(Repo.id), isouter=True)
    for repo, card in session.exec(cards.where(col(Repo.head).is_not(None), ~waits)):
        shown = card.commit_id if card is not None else None
        if shown != repo.head:
            what = f"search shows {repo.full_name} as of commit {shown}, not {repo.head}"
            yield Finding("I10", "stale-projection", what, _REINDEX)
    same = and_(
        col(CommitEntry.commit_id) == col(Repo.head),
        col(CommitEntry.path) == col(Adapter.path),
        col(CommitEntry.sha256) == col(Adapter.sha256),
    )
    adapters = (
        select(Adapter, Repo)
        .join(Repo, col(Repo.id) == col(Adapter.repo_id))
        .join(CommitEntry, same, isouter=True)
        .where(col(CommitEntry.path).is_(None), ~waits)
    )
    for adapter, repo in session.exec(adapters):
        what = f"search shows {repo.full_name}:{adapter.path}, which main does not have"
        yield Finding("I10", "stale-adapter", what, _REINDEX)


# Each reads the catalogue alone. Add to it what comes later.
CHECKS: list[Callable[[Session], Findings]] = [
    _sizes,
    _history,
    _jobs,
    _usage,
    _condemned,
    _audit,
    _projection,
]
