"""Where a large output goes, block by block: a file here, or whatever else takes blocks.

This package knows no network; a program that does hands in a Target of its own.
"""

import errno
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from merge.formats.positioned import DIRECT_ALIGNMENT, bypass_cache, write_at
from merge.formats.writer import NewFile

# Of a file here: while one thread waits for the disk, as many as there are processors compute.
# Smaller blocks take longer, larger ones and more of them take memory (benchmarks/bake.py).
BLOCK_BYTES = 8 * 2**20
WAITING_THREADS = 1


class Output(Protocol):
    """One output that is being written."""

    def write(self, buffer: memoryview, n: int, offset: int) -> None:
        """Put the first `n` bytes of `buffer` at `offset`; CannotWrite where that fails.

        May be called from several threads. The rest of `buffer` has no meaning, but can be there to
        fill up a page.
        """


class Target(Protocol):
    """A place that a whole file can be written to."""

    @property
    def name(self) -> str:
        """What messages call it; a source of the same name is the same place."""

    @property
    def waiting_threads(self) -> int:
        """Threads beyond the processor's that keep this place busy: so many wait for it."""

    def block_bytes(self, size: int) -> int:
        """How much is best written at a time of a file of `size` bytes."""

    def create(self, size: int, block: int) -> AbstractContextManager[Output]:
        """An output of `size` bytes that appears as a whole when the context ends.

        It replaces what is there; if the context fails, nothing has changed. Every write begins at
        a multiple of `block`, and ends at the next or at the end of the file.
        """


class Disk:
    """A file here. A large one goes past the page cache where its file system can do that: the
    kernel copies nothing, and what is read at the same time stays in the cache.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        self.waiting_threads = WAITING_THREADS

    def block_bytes(self, size: int) -> int:
        return BLOCK_BYTES

    def create(self, size: int, block: int) -> AbstractContextManager[Output]:
        return _DiskOutput(self.path, size)


# Smaller files stay in the cache: whoever made them is likely to read them next.
_DIRECT_FROM_BYTES = 256 * 2**20


class _DiskOutput(NewFile):
    _is_direct: bool

    def write(self, buffer: memoryview, n: int, offset: int) -> None:
        is_direct = self._is_direct
        try:
            write_at(self._fd, buffer[: padded(n) if is_direct else n], offset)
        except OSError as error:
            if not (is_direct and error.errno == errno.EINVAL):
                raise self.failure(error) from error
            self._is_direct = False
            self._write_through_cache(buffer[:n], offset)

    def _start(self) -> None:
        self._is_direct = self.size >= _DIRECT_FROM_BYTES and bypass_cache(self._fd, True)

    def _finish(self) -> None:
        """Cut off what the last block was padded with."""
        os.ftruncate(self._fd, self.size)

    def _write_through_cache(self, data: memoryview, offset: int) -> None:
        try:
            bypass_cache(self._fd, False)
            write_at(self._fd, data, offset)
        except OSError as error:
            raise self.failure(error) from error


def padded(size: int) -> int:
    """The size of a buffer for so many bytes that is written past the page cache."""
    return -(-size // DIRECT_ALIGNMENT) * DIRECT_ALIGNMENT
