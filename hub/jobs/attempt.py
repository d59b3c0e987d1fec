"""One attempt of one job: its child process from the first line to how it ended.

The parent extends the lease only when the child made progress, so a child that hangs loses it.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hub.db import UNREACHABLE, Database, why
from hub.errors import Busy, HubError, StoreFailed
from hub.failpoints import reach
from hub.jobs import queue
from hub.jobs.process import Child, oom_kills
from hub.jobs.queue import Claim, Progress
from merge.errors import MergeError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a worker waits for what, in seconds.

    `silence_s` is shorter than `lease_s`: a hanging child is ended by its own parent before
    another worker may claim the job.
    `pauses_s` come before each new attempt when the store or the database is away: ten minutes in
    all. `publish_pauses_s` come before, while the output is at hand.
    """

    lease_s: float = 330
    silence_s: float = 300
    deadline_s: float = 6 * 3600
    look_s: float = 0.5
    pauses_s: Sequence[float] = (5, 10, 20, 40, 80, 160, 300)
    publish_pauses_s: Sequence[float] = (1, 2, 4, 8, 15, 30)


@dataclass(frozen=True, slots=True)
class Made:
    """The child says it wrote its output; `manifest` describes it."""

    manifest: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Refused:
    """Running it again would give the same error: {code, message, param}."""

    error: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Away:
    """The store or the database does not answer, or not now: {code, message, param}."""

    error: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Crashed:
    """The child died or hung; another attempt may do better."""

    what: str


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Someone asked to stop."""


@dataclass(frozen=True, slots=True)
class Interrupted:
    """This worker is told to stop."""


Ending = Made | Refused | Away | Crashed | Cancelled | Interrupted


# Of the hub's own errors those that another moment may not have; UNREACHABLE are the driver's.
PASSING = (Busy, StoreFailed)


def ending_of(error: HubError | MergeError) -> Refused | Away:
    """How an attempt ends that the hub refused, here and not in its child."""
    told = {"code": error.code, "message": str(error), "param": None}
    return Away(told) if isinstance(error, PASSING) else Refused(told)


def supervise(
    db: Database,
    claim: Claim,
    child: Child,
    patience: Patience,
    is_stopping: Callable[[], bool],
) -> Ending:
    """Hear `child` until it ends or has to be ended; it is gone afterwards. LeaseLost."""
    killed_before = oom_kills()
    watch = _Watch(db, claim, patience)
    last: Made | Refused | None = None
    try:
        while True:
            try:
                message = child.hear(patience.look_s)
            except EOFError:
                break
            if message is not None:
                last = watch.take(message) or last
            ending = Interrupted() if is_stopping() else watch.look()
            if ending is not None:
                return ending
        status = child.wait()
    finally:
        child.close()
    if status == 0 and isinstance(last, Made):
        return Cancelled() if watch.exchange() else last
    if isinstance(last, Refused):
        return last
    return _unexplained(child, status, oom_kills() > killed_before)


class _Watch:
    """What is known about a running child, and when the database was last told or asked."""

    def __init__(self, db: Database, claim: Claim, patience: Patience) -> None:
        self._db, self._claim, self._patience = db, claim, patience
        self._started = self._heard = self._looked = self._leased = time.monotonic()
        self._first: float | None = None
        self._progress: Progress | None = None

    def take(self, message: dict[str, Any]) -> Made | Refused | None:
        self._heard = time.monotonic()
        match message:
            case {"result": manifest}:
                return Made(manifest)
            case {"error": error}:
                return Refused(error)
            case {"progress": {"done": done, "total": total}}:
                self._progress = Progress(done, total, self._eta(done, total))
        return None

    def _eta(self, done: int, total: int) -> float | None:
        if self._first is None:
            self._first = self._heard
        if done == 0:
            return None
        return round((self._heard - self._first) / done * (total - done), 1)

    def look(self) -> Ending | None:
        """Tell progress, ask for a cancel, check the clocks; None to go on."""
        moment = time.monotonic()
        if moment - self._started > self._patience.deadline_s:
            hours = self._patience.deadline_s / 3600
            message = f"the job ran longer than the {hours:g} hours it may take"
            return Refused({"code": "JobTimeout", "message": message, "param": None})
        if moment - self._heard > self._patience.silence_s:
            return Crashed(f"no progress for {self._patience.silence_s:g} seconds")
        if moment - self._looked < self._patience.look_s:
            return None
        self._looked = moment
        return Cancelled() if self.exchange() else None

    def exchange(self) -> bool:
        """Tell the database of new progress; whether it was told to cancel.

        It may fail for as long as the lease certainly holds: the result is only ever published
        under a live lease.
        """
        try:
            return self._exchange()
        except UNREACHABLE as error:
            if time.monotonic() - self._leased > self._patience.silence_s:
                raise
            log.warning("job %s: the database does not answer: %s", self._claim.job_id, why(error))
            return False

    def _exchange(self) -> bool:
        if self._progress is None:
            with self._db.read() as session:
                return queue.is_cancel_requested(session, self._claim)
        with self._db.write() as session:
            queue.beat(session, self._claim, self._progress, self._patience.lease_s)
            wanted = queue.is_cancel_requested(session, self._claim)
        reach("J4")
        self._progress, self._leased = None, time.monotonic()
        return wanted


def _unexplained(child: Child, status: int, out_of_memory: bool) -> Refused | Crashed:
    words = child.last_words()
    log.error("job child %d ended with status %d:\n%s", child.pid, status, words)
    if status == -9 and out_of_memory:
        message = "the machine ran out of memory and ended the job"
        return Refused({"code": "OutOfMemory", "message": message, "param": None})
    if status < 0:
        return Crashed(f"the job's process was ended by signal {-status}")
    if status == 0:
        return Crashed("the job's process ended without a result")
    # A Python exception nobody planned for: a bug, and the same next time.
    what = words.splitlines()[-1] if words else "no message"
    message = f"the engine failed unexpectedly ({what}); the hub's log has the details"
    return Refused({"code": "InternalError", "message": message, "param": None})
