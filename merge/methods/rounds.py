"""Work that many threads need done before they can go on: each does a part of it while it waits."""

import threading
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

PartT = TypeVar("PartT")


class Round(Generic[PartT]):
    """`work` is called once for each part, by whichever threads ask for the end of the round."""

    def __init__(self, parts: Iterable[PartT], work: Callable[[PartT], None]) -> None:
        self._parts, self._work = iter(parts), work
        self._changed = threading.Condition()
        self._n_working = 0
        self._error: BaseException | None = None

    def finish(self) -> None:
        """Return once all parts are done; the first exception of any is raised in every thread."""
        while True:
            with self._changed:
                part = None if self._error else next(self._parts, None)
                if part is None:
                    self._changed.wait_for(lambda: self._n_working == 0)
                    if self._error:
                        raise self._error
                    return
                self._n_working += 1
            try:
                self._work(part)
            except BaseException as error:
                self._error = error
                raise
            finally:
                with self._changed:
                    self._n_working -= 1
                    self._changed.notify_all()
