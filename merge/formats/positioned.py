"""Reading and writing at an offset without moving a shared file position.

Linux has system calls for it; elsewhere a lock around seek and read or write does the same.
Both ways are tested.
"""

import errno
import mmap
import os
import threading
from collections.abc import Callable

_lock = threading.Lock()
# What every disk and file system that takes direct writes is content with.
DIRECT_ALIGNMENT = 4096


def read_at(fd: int, buffer: memoryview, offset: int) -> int:
    """Fill `buffer` from `offset`; the number of bytes read is smaller only at the end of file."""
    done = 0
    while done < len(buffer):
        n = _read_some(fd, buffer[done:], offset + done)
        if n == 0:
            break
        done += n
    return done


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`."""
    done = 0
    while done < len(data):
        done += _write_some(fd, data[done:], offset + done)


def reserve(fd: int, size: int) -> None:
    """Make an empty file `size` bytes long, with room on the disk for all of them where it can.

    A full disk is then known before the first byte, and writing into reserved room takes about
    60 % of the processor time (measured on ext4).
    """
    _reserve(fd, size)


def page_aligned(size: int) -> memoryview:
    """Memory that files opened past the page cache accept, zeroed; `size` may be 0."""
    return memoryview(mmap.mmap(-1, max(size, 1)))[:size]


def bypass_cache(fd: int, wanted: bool) -> bool:
    """Let writes to `fd` go past the page cache, or through it again; False where they cannot.

    Then buffers, offsets and sizes must be multiples of DIRECT_ALIGNMENT, and the first write may
    still say EINVAL. Writing 5 GB this way takes 0.2 s of processor time in place of 0.7 to 7 s,
    depending on how the kernel comes by its pages (measured on ext4, benchmarks/bake.py).
    """
    return _bypass_cache(fd, wanted)


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Make a rename inside this folder survive a power cut, where the system can promise it."""
    if os.name == "nt":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _read_portably(fd: int, buffer: memoryview, offset: int) -> int:
    with _lock:
        os.lseek(fd, offset, os.SEEK_SET)
        chunk = os.read(fd, len(buffer))
    buffer[: len(chunk)] = chunk
    return len(chunk)


def _write_portably(fd: int, data: memoryview, offset: int) -> int:
    with _lock:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, data)


def _read_with_preadv(fd: int, buffer: memoryview, offset: int) -> int:
    return os.preadv(fd, [buffer], offset)


def _write_with_pwrite(fd: int, data: memoryview, offset: int) -> int:
    return os.pwrite(fd, data, offset)


def _bypass_nowhere(fd: int, wanted: bool) -> bool:
    """Nothing to do: every write goes through the cache."""
    return not wanted


def _bypass_with_direct_io(fd: int, wanted: bool) -> bool:
    import fcntl

    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if wanted else flags & ~os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:  # open(2): the file system does not support it
            raise
        return False
    return True


def _reserve_portably(fd: int, size: int) -> None:
    os.truncate(fd, size)


def _reserve_on_disk(fd: int, size: int) -> None:
    os.posix_fallocate(fd, 0, size)


_read_some: Callable[[int, memoryview, int], int] = (
    _read_with_preadv if hasattr(os, "preadv") else _read_portably
)
_write_some: Callable[[int, memoryview, int], int] = (
    _write_with_pwrite if hasattr(os, "pwrite") else _write_portably
)
_reserve: Callable[[int, int], None] = (
    _reserve_on_disk if hasattr(os, "posix_fallocate") else _reserve_portably
)
_bypass_cache: Callable[[int, bool], bool] = (
    _bypass_with_direct_io if hasattr(os, "O_DIRECT") else _bypass_nowhere
)
