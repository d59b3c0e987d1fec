"""Write a large file block by block: filled by several threads, hashed in order, whole or not at all.

Whatever the file is made of, `fill` gives any range of its bytes. Blocks are filled in memory that
the disk can read itself, so that a large file goes past the page cache: the kernel copies nothing,
and the base, which is read at the same time, stays in the cache. A few more blocks than threads are
alive at once, and the digest is taken of each while it is still in memory.
"""

import errno
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from merge.errors import CannotWrite
from merge.formats.positioned import (
    DIRECT_ALIGNMENT,
    bypass_cache,
    page_aligned,
    read_at,
    write_at,
)
from merge.formats.writer import NewFile
from merge.threads import run_in_order

BLOCK_BYTES = 4 * 2**20
# Threads beyond the processor's: about as many wait for the disk at any time.
_DISK_WAITERS = 1
# Blocks that wait for their digest, beside one for every thread.
_WAITING = 2
# Smaller files stay in the cache: whoever made them is likely to read them next.
_DIRECT_FROM_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Options:
    """How, not what: none of these changes a byte of a reproducible bake."""

    workers: int
    digest: bool
    progress: Callable[[int], None]  # bytes just finished
    cancelled: Callable[[], bool]
    block: int | None = None  # bytes; BLOCK_BYTES where nobody asks


def write_blocks(
    target: Path,
    size: int,
    fill: Callable[[memoryview, int], None],
    options: Options,
    finished: Callable[[int], None] = lambda end: None,
) -> str:
    """Write `size` bytes to `target`; their SHA-256 in hex, or "" where none is wanted.

    `fill(buffer, offset)` is called from several threads and must fill all of `buffer` with the
    bytes from `offset` on. `finished(end)` is called in the calling thread when all bytes before
    `end` have been filled.
    """
    digest = hashlib.sha256()
    workers = options.workers + _DISK_WAITERS
    block, ahead = options.block or BLOCK_BYTES, workers + _WAITING
    buffers = [page_aligned(_padded(min(block, size))) for _ in range(ahead)]
    with NewFile(target, size) as file:
        output = _Output(file, size)

        def work(offset: int) -> None:
            buffer = buffers[offset // block % ahead]
            n = min(block, size - offset)
            fill(buffer[:n], offset)
            output.write(buffer, n, offset)

        def next_in_order(index: int) -> None:
            offset = index * block
            n = min(block, size - offset)
            if options.digest:
                digest.update(buffers[index % ahead][:n])
            options.progress(n)
            finished(offset + n)

        run_in_order(
            range(0, size, block),
            work,
            workers=workers,
            finished=next_in_order,
            cancelled=options.cancelled,
            ahead=ahead,
        )
        output.finish()
    return digest.hexdigest() if options.digest else ""


def copy_file(source: Path, target: Path, options: Options) -> str:
    """Copy a file that nothing changes, durably; its SHA-256 in hex, or "" where none is wanted."""
    try:
        with source.open("rb") as file:
            size = os.fstat(file.fileno()).st_size

            def fill(buffer: memoryview, offset: int) -> None:
                if read_at(file.fileno(), buffer, offset) != len(buffer):
                    raise CannotWrite(target.name, f"{source.name} became shorter while copied")

            return write_blocks(target, size, fill, options)
    except OSError as error:
        raise CannotWrite(target.name, error.strerror or str(error)) from error


class _Output:
    """Writes blocks past the cache where the file is large and its file system can, else through it."""

    def __init__(self, file: NewFile, size: int) -> None:
        self._file, self._size = file, size
        self._is_direct = size >= _DIRECT_FROM_BYTES and bypass_cache(file.fileno(), True)

    def write(self, buffer: memoryview, n: int, offset: int) -> None:
        """Put the first `n` bytes of `buffer` at `offset`; what is behind them may be written too."""
        is_direct = self._is_direct
        try:
            write_at(self._file.fileno(), buffer[: _padded(n) if is_direct else n], offset)
        except OSError as error:
            if not (is_direct and error.errno == errno.EINVAL):
                raise self._file.failure(error) from error
            self._is_direct = False
            self._write_through_cache(buffer[:n], offset)

    def finish(self) -> None:
        """Cut off what the last block was padded with."""
        try:
            os.ftruncate(self._file.fileno(), self._size)
        except OSError as error:
            raise self._file.failure(error) from error

    def _write_through_cache(self, data: memoryview, offset: int) -> None:
        try:
            bypass_cache(self._file.fileno(), False)
            write_at(self._file.fileno(), data, offset)
        except OSError as error:
            raise self._file.failure(error) from error


def _padded(size: int) -> int:
    return -(-size // DIRECT_ALIGNMENT) * DIRECT_ALIGNMENT
