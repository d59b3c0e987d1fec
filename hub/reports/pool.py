"""A few child processes that measure reports, kept warm, and the short queue before them.

Loading the tensor library takes seconds and a report milliseconds, so a process lives on until
nobody asked for a while. A caller that goes away takes its process with it.
"""

import logging
import os
import queue
import shutil
import sys
import threading
import uuid
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from hub.blobs.store import Sha256
from hub.context import Hub
from hub.errors import Busy, HubError, TooLarge
from hub.jobs.inputs import Resolved
from hub.jobs.process import Child
from hub.jobs.scratch import Input
from hub.reports.child import Order, Setup
from merge.recipe import Recipe

log = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "hub.reports.child")
_LOOK_EVERY_S = 0.2
_MEMORY_BYTES = 2 * 2**30


class ReportFailed(Exception):
    """The process died: a bug, or somebody killed it. Says what it wrote last."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """`workers` reports at a time, `waiting` more before callers are sent away; times in seconds.

    `reports` is how many one process makes before a fresh one takes its place.
    """

    workers: int = 2
    waiting: int = 8
    limit_s: float = 60
    idle_s: float = 90
    reports: int = 200


@dataclass(frozen=True, slots=True)
class Task:
    """A recipe to measure. `future` gets the message of the child; `gone` is set to give up."""

    recipe: Recipe
    resolved: Sequence[Resolved]
    future: Future[dict[str, Any]] = field(default_factory=Future)
    gone: threading.Event = field(default_factory=threading.Event)


class Pool:
    """Threads with a child process each, started when the first task comes.

    A child is told to die with the thread that made it, so that thread has to outlive it.
    """

    def __init__(
        self,
        hub: Hub,
        bounds: Bounds = Bounds(),
        command: Sequence[str] = COMMAND,
    ) -> None:
        self._hub = hub
        self._bounds = bounds
        self._command = command
        self._tasks: queue.Queue[Task | None] = queue.Queue()
        self._lock = threading.Lock()
        self._unfinished = 0
        self._threads: list[threading.Thread] = []
        self._stopping = threading.Event()

    def submit(self, recipe: Recipe, resolved: Sequence[Resolved]) -> Task:
        """Queue one report; Busy when too many wait already."""
        task = Task(recipe, resolved)
        with self._lock:
            if self._unfinished >= self._bounds.workers + self._bounds.waiting:
                raise Busy("too many reports are being made; try again in a moment")
            self._unfinished += 1
            if len(self._threads) < min(self._unfinished, self._bounds.workers):
                thread = threading.Thread(target=self._work, name="reports", daemon=True)
                self._threads.append(thread)
                thread.start()
        task.future.add_done_callback(self._finished)
        self._tasks.put(task)
        return task

    def stop(self) -> None:
        """End every process; what was asked for fails."""
        self._stopping.set()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()

    def _check_open(self) -> None:
        if self._stopping.is_set():
            raise Busy("the hub is stopping")

    def _finished(self, future: Future[dict[str, Any]]) -> None:
        with self._lock:
            self._unfinished -= 1

    def _work(self) -> None:
        worker: _Worker | None = None
        while True:
            try:
                task = self._tasks.get(timeout=self._bounds.idle_s if worker is not None else None)
            except queue.Empty:
                if worker is not None:
                    worker.close()
                worker = None
                continue
            if task is None:
                break
            worker = self._serve(task, worker)
        if worker is not None:
            worker.close()

    def _serve(self, task: Task, worker: "_Worker | None") -> "_Worker | None":
        """Measure `task`; gives the process for the next one, or None when it is gone."""
        if not task.future.set_running_or_notify_cancel():
            return worker
        is_fit = False
        try:
            self._check_open()
            worker = worker or _Worker(self._hub, self._command)
            message = worker.measure(task, self._bounds.limit_s, self._stopping)
            is_fit = worker.made < self._bounds.reports
        except HubError as error:
            task.future.set_exception(error)
        except Exception as error:
            # The boundary of a worker: whatever it is belongs to the request that waits for it.
            log.exception("a report failed")
            task.future.set_exception(error)
        else:
            task.future.set_result(message)
        if not is_fit and worker is not None:
            worker.close()
        return worker if is_fit else None


class _Worker:
    """One child process and its folder."""

    def __init__(self, hub: Hub, command: Sequence[str]) -> None:
        self._hub = hub
        self._folder = hub.scratch / f"report-{uuid.uuid4().hex}"
        self._folder.mkdir()
        memory = min(_MEMORY_BYTES, hub.settings.job_memory_bytes)
        setup = Setup(parent=os.getpid(), memory_bytes=memory)
        self._child = Child(command, setup.model_dump_json(), self._folder, threads=1)
        self.made = 0

    def measure(self, task: Task, limit_s: float, stopping: threading.Event) -> dict[str, Any]:
        """The child's answer; whatever it raises, the process is of no more use."""
        self.made += 1
        folder = self._folder / str(self.made)
        try:
            with ExitStack() as blobs:
                order = Order(
                    recipe=task.recipe.model_dump_json(by_alias=True, exclude_none=True),
                    inputs=[_files(self._hub, item, blobs) for item in task.resolved],
                    folder=folder,
                )
                self._child.send(order.model_dump_json())
                return self._hear(task, limit_s, stopping)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _hear(self, task: Task, limit_s: float, stopping: threading.Event) -> dict[str, Any]:
        deadline = monotonic() + limit_s
        while not task.gone.is_set() and not stopping.is_set():
            if monotonic() > deadline:
                raise TooLarge(f"this report takes more than the {limit_s:g} seconds it may take")
            try:
                message = self._child.hear(_LOOK_EVERY_S)
            except EOFError:
                raise ReportFailed(self._child.last_words()) from None
            if message is not None:
                return message
        raise Busy("the report was given up")

    def close(self) -> None:
        self._child.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _files(hub: Hub, item: Resolved, blobs: ExitStack) -> Input:
    files: dict[str, Path] = {
        name: blobs.enter_context(hub.store.local(Sha256(sha256)))
        for name, sha256 in item.files.items()
    }
    return Input(ref=item.ref, main=item.main, files=files)
