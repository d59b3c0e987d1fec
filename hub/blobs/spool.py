"""The folder of bytes on their way in: temporary files, the room for them, and what is left of them."""

import errno
import logging
import os
import shutil
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

from anyio import to_thread

from hub.blobs import durable
from hub.blobs.store import MAX_GIT_BYTES, Sha256, Stored, git_blob_hash
from hub.errors import NoSpace, StoreFailed

log = logging.getLogger(__name__)

Made_co = TypeVar("Made_co", covariant=True)

CHUNK = 1 << 20
MOST_FAULTS = 2
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Spool:
    """Temporary files in `folder`; `min_free_bytes` stay free on its file system."""

    def __init__(self, folder: Path, min_free_bytes: int) -> None:
        self.folder = folder
        self._min_free = min_free_bytes
        self._faults = 0
        folder.mkdir(parents=True, exist_ok=True)

    def new_path(self) -> Path:
        return self.folder / uuid.uuid4().hex

    def check_space(self, coming: int) -> None:
        """NoSpace if so many bytes would go into the reserve, StoreFailed on a disk that fails."""
        if self._is_failing:
            raise StoreFailed(
                "the hub's disk does not keep what is written to it; nothing is stored until"
                " somebody has looked at it and started the hub again"
            )
        if shutil.disk_usage(self.folder).free - coming < self._min_free:
            raise NoSpace("the hub's disk is full; nothing was stored")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around whatever writes: a full disk is NoSpace."""
        try:
            yield
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise NoSpace("the hub's disk is full; nothing was stored") from error

    @contextmanager
    def syncing(self) -> Iterator[None]:
        """Around every fsync: what a failed one has lost stays lost, though the next may succeed."""
        try:
            yield
        except OSError as error:
            if error.errno not in _FULL:
                self._faults += 1
                log.critical("the disk of %s fails: %s", self.folder, error)
            raise

    def is_writable(self) -> bool:
        free = shutil.disk_usage(self.folder).free
        has_room = free > self._min_free and os.access(self.folder, os.W_OK)
        return has_room and not self._is_failing

    @property
    def _is_failing(self) -> bool:
        return self._faults >= MOST_FAULTS

    def sweep(self, older_than_s: float) -> int:
        """Remove files that nobody owns any more; how many there were."""
        return sweep_folder(self.folder, older_than_s)


class SpoolFile:
    """One new temporary file, written from its start to its end."""

    def __init__(self, spool: Spool, path: Path, size: int | None) -> None:
        self._spool, self.path = spool, path
        self._unchecked = 0
        self._is_sized = size is not None
        self._descriptor = durable.create_exclusive(path)
        self._is_open = True
        if size is not None:
            # Fail now rather than after gigabytes, where the file system can tell.
            try:
                durable.reserve(self._descriptor, size)
            except BaseException:
                self.close()
                raise

    def write(self, chunk: bytes) -> None:
        if not self._is_sized and self._unchecked >= 64 * CHUNK:
            self._spool.check_space(0)
            self._unchecked = 0
        view = memoryview(chunk)
        while view:
            view = view[os.write(self._descriptor, view) :]
        self._unchecked += len(chunk)

    def sync(self) -> None:
        with self._spool.syncing():
            durable.sync_file(self._descriptor)

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            os.close(self._descriptor)


class Upload(Protocol[Made_co]):
    """What a store makes of bytes in their order."""

    def write(self, chunk: bytes) -> None: ...

    def finish(self) -> Made_co: ...


class Uploads(ABC):
    """The two ways in of a store, over one: what `_upload` yields is closed when the block ends."""

    @abstractmethod
    def _upload(
        self, expected: Sha256 | None, size: int | None
    ) -> AbstractContextManager[Upload[Stored]]: ...

    def put(
        self, chunks: Iterable[bytes], *, expected: Sha256 | None = None, size: int | None = None
    ) -> Stored:
        with self._upload(expected, size) as upload:
            for chunk in chunks:
                upload.write(chunk)
            return upload.finish()

    async def put_stream(
        self,
        chunks: AsyncIterable[bytes],
        *,
        expected: Sha256 | None = None,
        size: int | None = None,
    ) -> Stored:
        with self._upload(expected, size) as upload:
            return await receive(chunks, upload)


async def receive(chunks: AsyncIterable[bytes], upload: Upload[Made_co]) -> Made_co:
    """A request body into an upload.

    It comes in pieces of some 64 KiB; a thread hop for each would cost more than writing it.
    """
    pieces: list[bytes] = []
    waiting = 0
    async for piece in chunks:
        pieces.append(piece)
        waiting += len(piece)
        if waiting >= CHUNK:
            await to_thread.run_sync(upload.write, b"".join(pieces))
            pieces, waiting = [], 0
    await to_thread.run_sync(upload.write, b"".join(pieces))
    return await to_thread.run_sync(upload.finish)


def read_file(path: Path, start: int, end: int) -> Iterator[bytes]:
    """The bytes [start, end); OSError if the file ends before."""
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while start < end:
            chunk = file.read(min(CHUNK, end - start))
            if not chunk:
                raise OSError(errno.EIO, f"{path.name} is shorter than it was")
            start += len(chunk)
            yield chunk


def git_oid_of(path: Path, size: int) -> str | None:
    """For bytes whose number was not known before: it stands in front of them in a git object."""
    if size > MAX_GIT_BYTES:
        return None
    hashed = git_blob_hash(size)
    for chunk in read_file(path, 0, size):
        hashed.update(chunk)
    return hashed.hexdigest()


def sweep_folder(folder: Path, older_than_s: float) -> int:
    """Remove the files of a folder that were changed last before that; how many there were."""
    limit = time.time() - older_than_s
    removed = 0
    for path in folder.iterdir():
        try:
            if path.stat().st_mtime > limit:
                continue
            path.chmod(0o600)  # Windows does not remove read-only files.
            path.unlink()
        except FileNotFoundError:  # somebody else sweeps too
            continue
        removed += 1
    return removed


@contextmanager
def removed_on_failure(path: Path) -> Iterator[None]:
    done = False
    try:
        yield
        done = True
    finally:
        if not done:
            path.unlink(missing_ok=True)


@contextmanager
def removed_at_end(path: Path) -> Iterator[None]:
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
