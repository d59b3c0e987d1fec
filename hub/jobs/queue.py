"""The job protocol: who may change a job's row, and when.

A worker claims a job and gets a fence number; every later change of that attempt is one UPDATE
that names job, fence and the state `running`. Zero rows changed means that the lease was lost:
another attempt owns the job, or it is over, and the caller must drop what it has.
All times are the database's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, CursorResult, func, update
from sqlmodel import Session, and_, col, or_, select

from hub.jobs.models import TERMINAL, Job, JobState
from hub.users.models import User

MAX_ATTEMPTS = 3


class LeaseLost(Exception):
    """This attempt no longer owns its job; nothing it made may be published."""


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to change one job, until another claim takes it."""

    job_id: str
    fence: int


@dataclass(frozen=True, slots=True)
class Progress:
    """Steps done of a total, and the seconds the rest should take."""

    done: int
    total: int
    eta_s: float | None


def now(session: Session) -> datetime:
    """The database's clock, so that workers on several machines agree about leases."""
    if session.get_bind().dialect.name == "sqlite":
        epoch = (func.julianday("now") - 2440587.5) * 86400.0
        return datetime.fromtimestamp(session.scalar(select(epoch)), UTC)
    moment: datetime = session.scalar(select(func.clock_timestamp()))
    return moment.astimezone(UTC)


def has_work(session: Session) -> bool:
    """Whether `claim` would find something to do; needs no write transaction."""
    moment = now(session)
    query = select(Job.id).where(
        or_(
            _is_due(moment),
            and_(col(Job.state) == JobState.RUNNING, col(Job.lease_until) < moment),
        )
    )
    return session.exec(query.limit(1)).first() is not None


def claim(session: Session, lease_s: float) -> Claim | None:
    """Take the oldest queued job, or None; sweeps lapsed leases first so that none is forgotten."""
    moment = now(session)
    sweep(session, moment)
    job = session.exec(
        select(Job)
        .where(_is_due(moment))
        .order_by(col(Job.created_at), col(Job.id))
        .limit(1)
        .with_for_update(skip_locked=True)
    ).first()
    if job is None:
        return None
    job.state = JobState.RUNNING
    job.fence += 1
    job.attempts += 1
    job.lease_until = moment + timedelta(seconds=lease_s)
    job.started_at = job.started_at or moment
    job.progress_done, job.progress_total, job.eta_s = 0, None, None
    job.sequence += 1
    session.add(job)
    return Claim(job.id, job.fence)


def sweep(session: Session, moment: datetime) -> None:
    """Put jobs whose lease ran out before `moment` back in the queue, or end them."""
    lapsed = session.exec(
        select(Job)
        .where(Job.state == JobState.RUNNING, col(Job.lease_until) < moment)
        .with_for_update(skip_locked=True)
    ).all()
    for job in lapsed:
        _crash(job, moment, "the worker that ran this job disappeared")
        session.add(job)


def release_all(session: Session) -> None:
    """Put every running job back, or end it; only for the one process that owns a catalogue."""
    moment = now(session)
    for job in session.exec(select(Job).where(Job.state == JobState.RUNNING)).all():
        _crash(job, moment, "the hub stopped while this job ran")
        session.add(job)


def running(session: Session) -> list[Claim]:
    """The claims that hold now."""
    rows = session.exec(select(Job.id, Job.fence).where(Job.state == JobState.RUNNING)).all()
    return [Claim(job_id, fence) for job_id, fence in rows]


def beat(session: Session, claim: Claim, progress: Progress, lease_s: float) -> None:
    """Record progress and extend the lease from now; LeaseLost."""
    lease_until = now(session) + timedelta(seconds=lease_s)
    _change(
        session,
        claim,
        progress_done=progress.done,
        progress_total=progress.total,
        eta_s=progress.eta_s,
        lease_until=lease_until,
    )


def extend(session: Session, claim: Claim, lease_s: float) -> None:
    """Extend the lease without progress to report, so nobody is told; LeaseLost."""
    _update(session, claim, lease_until=now(session) + timedelta(seconds=lease_s))


def is_cancel_requested(session: Session, claim: Claim) -> bool:
    """Whether someone asked to stop, or whoever wanted the job was disabled; LeaseLost when the
    attempt is no longer ours.
    """
    query = (
        select(Job.cancel_requested, User.is_disabled)
        .join(User, col(User.id) == col(Job.requester_id))
        .where(*_ownership(claim))
    )
    found = session.exec(query).first()
    if found is None:
        raise LeaseLost
    return any(found)


def succeed(session: Session, claim: Claim, result: dict[str, Any]) -> None:
    """End the job with its result; LeaseLost also when a cancel was asked for meanwhile."""
    _change(
        session,
        claim,
        col(Job.cancel_requested).is_(False),
        state=JobState.SUCCEEDED,
        result=result,
        lease_until=None,
        finished_at=now(session),
        eta_s=None,
    )


def fail(session: Session, claim: Claim, error: dict[str, Any]) -> None:
    """End the job with an error that running it again would not change; LeaseLost."""
    _change(
        session,
        claim,
        state=JobState.FAILED,
        error=error,
        lease_until=None,
        finished_at=now(session),
        eta_s=None,
    )


def crashed(session: Session, claim: Claim, what: str) -> None:
    """The child died or hung: queue the job again, or end it after `MAX_ATTEMPTS`; LeaseLost."""
    job = _owned(session, claim)
    _crash(job, now(session), what)
    session.add(job)


def put_off(
    session: Session, claim: Claim, error: dict[str, Any], pauses_s: Sequence[float]
) -> None:
    """What the job needs was away: queue it again for later, or end it with `error` when it was
    put off as often as there are pauses; LeaseLost.
    """
    job = _owned(session, claim)
    moment = now(session)
    job.faults += 1
    if job.faults <= len(pauses_s):
        job.not_before = moment + timedelta(seconds=pauses_s[job.faults - 1])
        _release(job, moment, None)
    else:
        message = f"{error['message']}; given up after {job.attempts} attempts"
        _release(job, moment, {**error, "message": message})
    session.add(job)


def cancelled(session: Session, claim: Claim) -> None:
    """The child of a cancelled job is gone; LeaseLost."""
    job = _owned(session, claim)
    if not job.cancel_requested:
        user = session.get_one(User, job.requester_id)
        message = f"{user.name} was disabled"
        job.error = {"code": "Forbidden", "message": message, "param": None}
    job.cancel_requested = True
    _release(job, now(session), None)
    session.add(job)


def hand_back(session: Session, claim: Claim) -> None:
    """This worker stops, through no fault of the job: queued again, the attempt not counted."""
    _change(
        session,
        claim,
        state=JobState.QUEUED,
        attempts=col(Job.attempts) - 1,
        lease_until=None,
        progress_done=0,
        progress_total=None,
        eta_s=None,
    )


def request_cancel(session: Session, job: Job) -> None:
    """A queued job ends at once, a running one as soon as its worker sees the flag."""
    if job.state in TERMINAL:
        return
    if job.state == JobState.QUEUED:
        job.state = JobState.CANCELLED
        job.finished_at = now(session)
    job.cancel_requested = True
    job.sequence += 1
    session.add(job)


def _change(
    session: Session, claim: Claim, *conditions: ColumnElement[bool], **values: object
) -> None:
    _update(session, claim, *conditions, sequence=col(Job.sequence) + 1, **values)


def _update(
    session: Session, claim: Claim, *conditions: ColumnElement[bool], **values: object
) -> None:
    changed = session.execute(
        update(Job)
        .where(*_ownership(claim), *conditions)
        .values(**values)
        .execution_options(synchronize_session=False)
    )
    assert isinstance(changed, CursorResult)
    if changed.rowcount != 1:
        raise LeaseLost


def _owned(session: Session, claim: Claim) -> Job:
    job = session.exec(select(Job).where(*_ownership(claim)).with_for_update()).first()
    if job is None:
        raise LeaseLost
    return job


def _ownership(claim: Claim) -> tuple[ColumnElement[bool], ...]:
    return (
        col(Job.id) == claim.job_id,
        col(Job.fence) == claim.fence,
        col(Job.state) == JobState.RUNNING,
    )


def _is_due(moment: datetime) -> ColumnElement[bool]:
    waits = col(Job.not_before)
    return and_(col(Job.state) == JobState.QUEUED, or_(waits.is_(None), waits <= moment))


def _crash(job: Job, moment: datetime, what: str) -> None:
    message = f"{what}; given up after {job.attempts} attempts"
    error = {"code": "JobCrashed", "message": message, "param": None}
    _release(job, moment, error if job.attempts - job.faults >= MAX_ATTEMPTS else None)


def _release(job: Job, moment: datetime, error: dict[str, Any] | None) -> None:
    """A job that no worker has any more: failed with `error`, or without one queued again."""
    job.lease_until = None
    job.eta_s = None
    job.sequence += 1
    if job.cancel_requested:
        job.state = JobState.CANCELLED
        job.finished_at = moment
    elif error is not None:
        job.state, job.error = JobState.FAILED, error
        job.finished_at = moment
    else:
        job.state = JobState.QUEUED
        job.progress_done, job.progress_total = 0, None
