"""Write a large file block by block: filled by several threads, hashed in order, whole or not at all.

Whatever the file is made of, `fill` gives any range of its bytes. Blocks are filled in memory that
the disk can read itself, so that a large file goes past the page cache: the kernel copies nothing,
and the base, which is read at the same time, stays in the cache. A few more blocks than threads are
alive at once, and the digest is taken of each while it is still in memory.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from merge.formats.positioned import page_aligned
from merge.formats.sources import File, fill, opened
from merge.formats.targets import Disk, Target, padded
from merge.threads import run_in_order

# Blocks that wait for their digest, beside one for every thread.
_WAITING = 2


@dataclass(frozen=True, slots=True)
class Options:
    """How, not what: none of these changes a byte of a reproducible bake."""

    workers: int
    digest: bool
    progress: Callable[[int], None]  # bytes just finished
    cancelled: Callable[[], bool]
    block: int | None = None  # bytes; what the target likes where nobody asks


def write_blocks(
    target: Path | Target,
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
    place = Disk(target) if isinstance(target, Path) else target
    workers = options.workers + place.waiting_threads
    block, ahead = options.block or place.block_bytes(size), workers + _WAITING
    buffers = [page_aligned(padded(min(block, size))) for _ in range(ahead)]
    with place.create(size, block) as output:

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
    return digest.hexdigest() if options.digest else ""


def copy_file(source: File, target: Path | Target, options: Options) -> str:
    """Copy a file that nothing changes, durably; its SHA-256 in hex, or "" where none is wanted."""
    with opened(source) as file:

        def fill_block(buffer: memoryview, offset: int) -> None:
            fill(file, buffer, offset)

        return write_blocks(target, file.size, fill_block, options)
