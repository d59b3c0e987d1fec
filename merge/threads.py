"""A few worker threads over a list of steps: one first error, cancelling, news in order."""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

ItemT = TypeVar("ItemT")
KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")
ResultT = TypeVar("ResultT")


class Cancelled(Exception):
    """The caller asked to stop; nothing was left behind."""


def default_workers() -> int:
    """Cores this process may use, at most 8: beyond that the disk is the limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, 8)


def run_in_order(
    items: Sequence[ItemT],
    work: Callable[[ItemT], ResultT],
    *,
    workers: int,
    finished: Callable[[int], None],
    cancelled: Callable[[], bool],
    ahead: int | None = None,
) -> list[ResultT]:
    """Start items in their order on `workers` threads, each computing on one core.

    `finished(i)` is called in the calling thread, in order, once items 0..i are all done.
    With `ahead`, item i + ahead starts after `finished(i)`, so that as many buffers are enough.
    The first exception of any item stops the rest and is raised; so is Cancelled, between items.
    """
    changed = threading.Condition()
    waiting = iter(range(len(items)))
    done: dict[int, ResultT] = {}
    failures: list[BaseException] = []
    n_finished = 0

    def has_room(index: int | None) -> bool:
        return bool(failures) or index is None or ahead is None or index < n_finished + ahead

    def worker() -> None:
        while True:
            with changed:
                index = None if failures else next(waiting, None)
                changed.wait_for(lambda index=index: has_room(index))  # type: ignore[misc]
                if failures:
                    return
            if index is None:
                return
            try:
                if cancelled():
                    raise Cancelled
                result = work(items[index])
            except BaseException as error:  # noqa: BLE001  the calling thread raises it
                with changed:
                    failures.append(error)
                    changed.notify_all()
                return
            with changed:
                done[index] = result
                changed.notify_all()

    def is_settled(index: int) -> bool:
        return index in done or bool(failures)

    torch_threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, "merge", torch.set_num_threads, (1,)) as pool:
            for _ in range(workers):
                pool.submit(worker)
            try:
                for index in range(len(items)):
                    with changed:
                        changed.wait_for(lambda index=index: is_settled(index))  # type: ignore[misc]
                        if failures:
                            raise failures[0]
                    finished(index)
                    with changed:
                        n_finished += 1
                        changed.notify_all()
            except BaseException as error:
                with changed:
                    failures.append(error)
                    changed.notify_all()
                raise
        return [done[index] for index in range(len(items))]
    finally:
        torch.set_num_threads(torch_threads)


class Shared(Generic[KeyT, ValueT]):
    """What several threads need, computed by the first of them and then shared.

    With `most`, what was asked for longest ago is forgotten when there is more.
    """

    def __init__(self, most: int | None = None) -> None:
        self._lock = threading.Lock()
        self._most = most
        self._held: dict[KeyT, Future[ValueT]] = {}

    def get(self, key: KeyT, compute: Callable[[], ValueT]) -> ValueT:
        with self._lock:
            future = self._held.pop(key, None)
            is_first = future is None
            self._held[key] = future = future or Future()
            if self._most is not None and len(self._held) > self._most:
                del self._held[next(iter(self._held))]
        if is_first:
            try:
                future.set_result(compute())
            except BaseException as error:
                future.set_exception(error)
                raise
        return future.result()

    def forget(self, key: KeyT) -> None:
        with self._lock:
            self._held.pop(key, None)
