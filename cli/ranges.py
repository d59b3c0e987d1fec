"""Files that are read where they lie, in blocks that are asked for by their range.

Blocks are shared by all readers and fetched once; where one follows the other, the next ones are
on their way before their turn comes. Memory has one bound for all files together: KEPT blocks.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from cli.console import CommandError
from merge.formats.positioned import page_aligned

BLOCK_BYTES = 4 * 2**20
KEPT = 32
# The first request: the header of all but the largest checkpoints is in it.
HEAD_BYTES = 512 * 2**10
_AHEAD = 6
_THREADS = 12


class Absent(CommandError):
    """What a REF names is not there, or not for us to see."""


class Blocks:
    """The blocks of remote files that were read last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, int], Future[memoryview]] = OrderedDict()
        self._pool = ThreadPoolExecutor(_THREADS, "fetch")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def get(
        self, file: str, index: int, n_blocks: int, fetch: Callable[[int], memoryview]
    ) -> memoryview:
        """Block `index` of a file of `n_blocks`, which `fetch` gets if nobody has yet."""
        with self._lock:
            is_next = index == 0 or (file, index - 1) in self._kept
            block = self._ask(file, index, fetch)
            self._kept.move_to_end((file, index))
            if is_next:
                for ahead in range(index + 1, min(index + 1 + _AHEAD, n_blocks)):
                    self._ask(file, ahead, fetch)
        return block.result()

    def _ask(self, file: str, index: int, fetch: Callable[[int], memoryview]) -> Future[memoryview]:
        block = self._kept.get((file, index))
        if block is None or (block.done() and block.exception() is not None):
            block = self._kept[file, index] = self._pool.submit(fetch, index)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)  # who waits for it still gets it
        return block


class Ranged:
    """One version of a remote file; `fetch(buffer, offset)` fills `buffer` with that version.

    `head` is what is known of its beginning, `version` an entity tag, `find` what `beside` is for.
    """

    def __init__(
        self,
        name: str,
        version: str,
        head: bytes,
        size: int,
        fetch: Callable[[memoryview, int], None],
        find: Callable[[str], "Ranged | None"],
        blocks: Blocks,
    ) -> None:
        self.name, self.version, self.size = name, version, size
        self._head, self._fetch, self._find, self._blocks = head, fetch, find, blocks

    def read_at(self, buffer: memoryview, offset: int) -> int:
        wanted = max(0, min(len(buffer), self.size - offset))
        if offset + wanted <= len(self._head):
            buffer[:wanted] = self._head[offset : offset + wanted]
            return wanted
        done = 0
        while done < wanted:
            index, start = divmod(offset + done, BLOCK_BYTES)
            part = self._block(index)[start : start + wanted - done]
            buffer[done : done + len(part)] = part
            done += len(part)
        return wanted

    def beside(self, name: str) -> "Ranged | None":
        return self._find(name)

    def _block(self, index: int) -> memoryview:
        n_blocks = -(-self.size // BLOCK_BYTES)
        return self._blocks.get(f"{self.name} {self.version}", index, n_blocks, self._get)

    def _get(self, index: int) -> memoryview:
        begin = index * BLOCK_BYTES
        # Memory of its own, which goes back to the system when the block is dropped.
        buffer = page_aligned(min(BLOCK_BYTES, self.size - begin))
        self._fetch(buffer, begin)
        return buffer
