"""Brings queued jobs to child processes: threads of the server, or of `graft worker`."""

import logging
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from hub.blobs.store import Sha256
from hub.context import Hub
from hub.db import UNREACHABLE, why
from hub.errors import EntryNotFound, HubError
from hub.failpoints import reach
from hub.jobs import process, queue, results
from hub.jobs.attempt import (
    Away,
    Cancelled,
    Crashed,
    Ending,
    Interrupted,
    Made,
    Patience,
    Refused,
    ending_of,
    supervise,
)
from hub.jobs.child import Spec
from hub.jobs.models import Job
from hub.jobs.queue import Claim, LeaseLost
from hub.jobs.results import BadOutput
from hub.jobs.scratch import Input
from merge.errors import MergeError

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0  # a job offered by another process waits this long; one of ours does not


class Dispatcher(Protocol):
    """Whatever makes queued jobs run; the jobs' rows and fences decide, not the transport."""

    def start(self) -> None:
        """Begin to take jobs."""

    def offer(self) -> None:
        """A job was queued; losing this call only delays the job."""

    def stop(self) -> None:
        """Take no more jobs, hand running ones back, return when nothing runs."""


class LocalDispatcher:
    """Runs as many jobs at a time as it has threads, on this machine.

    Setting `stopping` is how a signal handler begins what `stop` waits for.
    """

    def __init__(
        self,
        hub: Hub,
        workers: int,
        *,
        stopping: threading.Event | None = None,
        command: Sequence[str] = process.COMMAND,
        patience: Patience = Patience(),  # noqa: B008 - frozen
    ) -> None:
        self._hub = hub
        self._command = command
        self._patience = patience
        self._stopping = stopping or threading.Event()
        self._offered = threading.Condition()
        self._threads = [
            threading.Thread(target=self._work, name=f"job-worker-{n}", daemon=True)
            for n in range(workers)
        ]

    def start(self) -> None:
        self._recover()
        for thread in self._threads:
            thread.start()

    def offer(self) -> None:
        with self._offered:
            self._offered.notify()

    def stop(self) -> None:
        self._stopping.set()
        with self._offered:
            self._offered.notify_all()
        for thread in self._threads:
            thread.join()

    def _recover(self) -> None:
        # Listed first: a folder that another server makes from now on is none of these.
        folders = list(self._hub.scratch.glob("*" if self._hub.db.is_sqlite else "job-*"))
        with self._hub.db.write() as session:
            if self._hub.db.is_sqlite:
                # One process owns this catalogue, so whoever ran these jobs is gone.
                queue.release_all(session)
            else:
                queue.sweep(session, queue.now(session))
            running = queue.running(session)
        for folder in folders:
            if folder.name not in {_folder_name(claim) for claim in running}:
                shutil.rmtree(folder)

    def _work(self) -> None:
        while not self._stopping.is_set():
            try:
                claim = self._claim()
                if claim is not None:
                    self._run(claim)
                    continue
            except UNREACHABLE as error:
                # The database may come back, and this thread has to be there when it does.
                log.warning("a job worker cannot reach the database: %s", why(error))
            with self._offered:
                if not self._stopping.is_set():
                    self._offered.wait(_LOOK_EVERY_S)

    def _claim(self) -> Claim | None:
        with self._hub.db.read() as session:
            if not queue.has_work(session):
                return None
        with self._hub.db.write() as session:
            return queue.claim(session, self._patience.lease_s)

    def _run(self, claim: Claim) -> None:
        """One attempt from claim to settled row; nothing it raises may end the thread."""
        scratch = self._hub.scratch / _folder_name(claim)
        try:
            reach("J2")
            ending = self._attempt(claim, scratch)
            settle(self._hub, claim, ending, scratch, self._patience)
        except LeaseLost:
            log.warning("job %s: lost its lease, the attempt is dropped", claim.job_id)
        except UNREACHABLE:
            log.exception("job %s: the database does not answer", claim.job_id)
            self._put_off(claim)
        except Exception as error:
            # The boundary of a worker: a bug in one job must not stop the others.
            log.exception("job %s: the worker failed", claim.job_id)
            self._give_up(claim, f"the worker failed ({type(error).__name__})")
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _put_off(self, claim: Claim) -> None:
        """Should the database stay away, the lease runs out instead."""
        error = {"code": "Busy", "message": "the database does not answer", "param": None}
        try:
            with self._hub.db.write() as session:
                queue.put_off(session, claim, error, self._patience.pauses_s)
        except LeaseLost:
            log.warning("job %s: lost its lease, or is over", claim.job_id)

    def _give_up(self, claim: Claim, what: str) -> None:
        try:
            with self._hub.db.write() as session:
                queue.crashed(session, claim, what)
        except LeaseLost:
            log.warning("job %s: lost its lease while failing", claim.job_id)

    def _attempt(self, claim: Claim, scratch: Path) -> Ending:
        with self._hub.db.read() as session:
            job = session.get_one(Job, claim.job_id)
            if queue.is_cancel_requested(session, claim):
                return Cancelled()
        needed = job.resources["output_bytes"] + self._hub.settings.min_free_bytes
        if shutil.disk_usage(self._hub.scratch).free < needed:
            message = f"the result needs {needed:,} bytes of free disk, which the hub does not have"
            return Refused({"code": "NoSpace", "message": message, "param": None})
        scratch.mkdir()
        with ExitStack() as blobs:
            try:
                spec = self._spec(job, scratch, blobs)
            except HubError as error:
                return ending_of(error)
            child = process.Child(
                self._command, spec.model_dump_json(), scratch, job.resources["threads"]
            )
            reach("J3")
            return supervise(self._hub.db, claim, child, self._patience, self._stopping.is_set)

    def _spec(self, job: Job, scratch: Path, blobs: ExitStack) -> Spec:
        inputs = [
            Input(
                ref=item["ref"],
                main=item["main"],
                files={
                    name: self._local(item["ref"], name, sha256, blobs)
                    for name, sha256 in item["files"].items()
                },
            )
            for item in job.request["inputs"]
        ]
        return Spec(
            parent=os.getpid(),
            scratch=scratch,
            recipe=job.request["recipe"],
            inputs=inputs,
            output=results.output_name(job),
            memory_bytes=job.resources["memory_bytes"],
            file_bytes=job.resources["file_bytes"],
            threads=job.resources["threads"],
        )

    def _local(self, ref: str, name: str, sha256: str, blobs: ExitStack) -> Path:
        try:
            return blobs.enter_context(self._hub.store.local(Sha256(sha256)))
        except FileNotFoundError:
            message = f"{ref}: the blob store has lost the bytes of {name} ({sha256})"
            raise EntryNotFound(message) from None


def _folder_name(claim: Claim) -> str:
    return f"job-{claim.job_id}-{claim.fence}"


def settle(hub: Hub, claim: Claim, ending: Ending, scratch: Path, patience: Patience) -> None:
    """Write down how an attempt ended, publishing what it made. LeaseLost."""
    match ending:
        case Made(manifest):
            reach("J5")
            _publish(hub, claim, manifest, scratch / "output", patience)
        case Away(error):
            with hub.db.write() as session:
                queue.put_off(session, claim, error, patience.pauses_s)
        case Refused(error):
            with hub.db.write() as session:
                queue.fail(session, claim, error)
        case Crashed(what):
            with hub.db.write() as session:
                queue.crashed(session, claim, what)
        case Cancelled():
            with hub.db.write() as session:
                queue.cancelled(session, claim)
        case Interrupted():
            with hub.db.write() as session:
                queue.hand_back(session, claim)


def _publish(
    hub: Hub, claim: Claim, manifest: Mapping[str, Any], output: Path, patience: Patience
) -> None:
    def beat() -> None:
        with hub.db.write() as session:
            queue.extend(session, claim, patience.lease_s)

    try:
        results.publish(hub, claim, manifest, output, beat, patience.publish_pauses_s)
    except UNREACHABLE:
        raise
    except (HubError, MergeError) as error:
        settle(hub, claim, ending_of(error), output, patience)
    except BadOutput as error:
        with hub.db.write() as session:
            queue.crashed(session, claim, f"the output was not whole: {error}")
    except LeaseLost:
        # Also raised when a cancel came between the last look and the commit.
        with hub.db.write() as session:
            if queue.is_cancel_requested(session, claim):
                queue.cancelled(session, claim)
