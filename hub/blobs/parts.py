"""Files that arrive in parts, in a local folder: one file each, every part at its place in it.

Which parts are here is in whoever's ledger asked for them; a part is durable before it gets there.
"""

import os
import uuid
from collections.abc import AsyncIterable, Sequence
from pathlib import Path
from typing import Protocol

from hub.blobs import durable
from hub.blobs.spool import Spool, receive, sweep_folder
from hub.blobs.store import Sha256, Stored
from hub.errors import BadUpload

# Nobody's: whoever begins an upload forgets it long before.
FORGOTTEN_S = 7 * 24 * 3600


class Adopt(Protocol):
    def __call__(self, path: Path, *, expected: Sha256 | None = None) -> Stored: ...


class FileParts:
    """`adopt` makes a blob of a finished file."""

    def __init__(self, folder: Path, spool: Spool, adopt: Adopt) -> None:
        self._folder, self._spool, self._adopt = folder, spool, adopt
        durable.make_folders(folder, folder.parent)

    def begin(self) -> str:
        return uuid.uuid4().hex

    def address(self, handle: str, number: int, size: int, seconds: int) -> str | None:
        return None

    async def put(
        self, handle: str, number: int, offset: int, size: int, chunks: AsyncIterable[bytes]
    ) -> str:
        self._spool.check_space(size)
        with self._spool.writing():
            part = _Part(self._spool, self._path(handle), offset, size)
            try:
                await receive(chunks, part)
            finally:
                part.close()
        return f'"{number}"'  # the digest of the whole is what counts

    def finish(self, handle: str, tags: Sequence[str], expected: Sha256, size: int) -> Stored:
        path = self._path(handle)
        found = path.stat().st_size
        if found != size:
            self.drop(handle)
            raise BadUpload(f"the parts are {found} bytes and not {size}")
        try:
            return self._adopt(path, expected=expected)
        finally:
            self.drop(handle)

    def drop(self, handle: str) -> None:
        self._path(handle).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what no ledger can know any more."""
        sweep_folder(self._folder, FORGOTTEN_S)

    def _path(self, handle: str) -> Path:
        assert uuid.UUID(handle).hex == handle, "a handle that is not ours"
        return self._folder / handle


class _Part:
    """The bytes from `offset` on of a file that is made by whichever part comes first."""

    def __init__(self, spool: Spool, path: Path, offset: int, size: int) -> None:
        self._spool = spool
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        self._descriptor = os.open(path, flags | getattr(os, "O_CLOEXEC", 0), 0o600)
        self._folder = path.parent
        self._left = self._size = size
        os.lseek(self._descriptor, offset, os.SEEK_SET)

    def write(self, chunk: bytes) -> None:
        self._left -= len(chunk)
        if self._left < 0:
            raise BadUpload(f"more than the {self._size} bytes of this part arrived")
        view = memoryview(chunk)
        while view:
            view = view[os.write(self._descriptor, view) :]

    def finish(self) -> None:
        if self._left:
            arrived = self._size - self._left
            raise BadUpload(f"{arrived} of the {self._size} bytes of this part arrived")
        with self._spool.syncing():
            durable.sync_file(self._descriptor)
            durable.sync_folder(self._folder)

    def close(self) -> None:
        os.close(self._descriptor)
