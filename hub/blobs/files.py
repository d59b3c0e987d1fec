"""Blobs in a local folder: `STORE_ID`, `tmp/`, `blobs/ab/cd/<sha256>` with mode 0444.

The order of one upload: temporary file on the same file system, hash while streaming, compare,
fsync the file, rename, fsync the folder. Only then may a catalogue row name the blob.
A crash leaves at most a temporary file, which `sweep` removes, or a blob nobody refers to.
"""

import errno
import os
import shutil
import time
import uuid
from collections.abc import AsyncIterable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from anyio import to_thread

from hub.blobs import durable
from hub.blobs.store import MAX_GIT_BYTES, Hashes, Sha256, Stored, git_blob_hash
from hub.errors import BadUpload, DigestMismatch, NoSpace

CHUNK = 1 << 20
TRASH_S = 24 * 3600
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class FileBlobStore:
    """The default store; `min_free_bytes` stay free on its file system."""

    def __init__(self, root: Path, *, min_free_bytes: int = 0) -> None:
        self._root = root
        self._tmp = root / "tmp"
        self._blobs = root / "blobs"
        self._trash = root / "trash"
        self._min_free = min_free_bytes
        root.mkdir(parents=True, exist_ok=True)
        for folder in (self._tmp, self._blobs, self._trash):
            durable.make_folders(folder, root)
        self.id = self._identity()

    @staticmethod
    def is_at(root: Path) -> bool:
        """Whether a store was made in this folder before."""
        return (root / "STORE_ID").is_file()

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
            # A request body comes in pieces of some 64 KiB; a thread hop for each would cost more
            # than writing it.
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

    def adopt(self, path: Path) -> Stored:
        size = path.stat().st_size
        if path.stat().st_dev != self._tmp.stat().st_dev:
            stored = self.put(_read(path, 0, size), size=size)
            path.unlink()
            return stored
        taken = self._tmp / uuid.uuid4().hex
        os.rename(path, taken)
        with _full_disk_is_no_space(), _removed_on_failure(taken):
            hashes = Hashes(size)
            for chunk in _read(taken, 0, size):
                hashes.update(chunk)
            descriptor = os.open(taken, os.O_RDWR | getattr(os, "O_BINARY", 0))
            try:
                durable.sync_file(descriptor)
            finally:
                os.close(descriptor)
            self._publish(taken, hashes.sha256)
        return Stored(hashes.sha256, hashes.git_oid, size)

    def open(self, sha256: Sha256, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        path = self._path(sha256)
        size = path.stat().st_size
        return _read(path, start, size if end is None else min(end, size))

    def path(self, sha256: Sha256) -> Path | None:
        path = self._path(sha256)
        return path if path.is_file() else None

    @contextmanager
    def local(self, sha256: Sha256) -> Iterator[Path]:
        path = self._path(sha256)
        path.stat()
        yield path

    def size(self, sha256: Sha256) -> int | None:
        try:
            return self._path(sha256).stat().st_size
        except FileNotFoundError:
            return None

    def delete(self, sha256: Sha256) -> None:
        path = self._path(sha256)
        if path.exists():
            path.chmod(0o600)  # Windows does not remove read-only files.
            path.unlink()
            durable.sync_folder(path.parent)

    def trash(self, sha256: Sha256) -> None:
        path = self._path(sha256)
        try:
            os.utime(path)  # The sweep counts from here.
            os.replace(path, self._trash / sha256)
        except FileNotFoundError:
            return
        durable.sync_folder(self._trash)
        durable.sync_folder(path.parent)

    def inventory(self) -> Iterator[tuple[Sha256, int, datetime]]:
        for path in self._blobs.glob("??/??/*"):
            found = path.stat()
            yield Sha256(path.name), found.st_size, datetime.fromtimestamp(found.st_mtime, UTC)

    def is_writable(self) -> bool:
        return shutil.disk_usage(self._root).free > self._min_free and os.access(self._tmp, os.W_OK)

    def sweep(self, older_than_s: float) -> int:
        """Remove temporary files that no upload owns any more; how many there were."""
        _sweep(self._trash, TRASH_S)
        return _sweep(self._tmp, older_than_s)

    def _identity(self) -> str:
        path = self._root / "STORE_ID"
        if not path.exists():
            temporary = self._tmp / uuid.uuid4().hex
            descriptor = durable.create_exclusive(temporary)
            try:
                os.write(descriptor, f"{uuid.uuid4().hex}\n".encode())
                durable.sync_file(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
            durable.sync_folder(self._root)
        return path.read_text().strip()

    def _path(self, sha256: Sha256) -> Path:
        return self._blobs / sha256[:2] / sha256[2:4] / sha256

    @contextmanager
    def _upload(self, expected: Sha256 | None, size: int | None) -> Iterator["_Upload"]:
        self._check_space(size or 0)
        path = self._tmp / uuid.uuid4().hex
        with _full_disk_is_no_space(), _removed_on_failure(path):
            upload = _Upload(self, path, expected, size)
            try:
                upload.reserve()
                yield upload
            finally:
                upload.close()

    def _check_space(self, coming: int) -> None:
        if shutil.disk_usage(self._root).free - coming < self._min_free:
            raise NoSpace("the hub's disk is full; nothing was stored")

    def _publish(self, temporary: Path, sha256: Sha256) -> None:
        final = self._path(sha256)
        durable.make_folders(final.parent, self._blobs)
        temporary.chmod(0o444)
        try:
            # Over an older copy too: these bytes have just been verified, so it is also a repair.
            os.replace(temporary, final)
        except PermissionError:
            # Windows, while somebody reads the older copy.
            if not final.exists() or final.stat().st_size != temporary.stat().st_size:
                raise
            temporary.chmod(0o600)
            temporary.unlink()
        durable.sync_folder(final.parent)


class _Upload:
    """One temporary file on its way to becoming a blob."""

    def __init__(
        self,
        store: FileBlobStore,
        path: Path,
        expected: Sha256 | None,
        size: int | None,
    ) -> None:
        self._store = store
        self._path = path
        self._expected = expected
        self._size = size
        self._hashes = Hashes(size)
        self._checked = 0
        self._descriptor = durable.create_exclusive(path)
        self._is_open = True

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            os.close(self._descriptor)

    def reserve(self) -> None:
        """Fail now rather than after gigabytes, where the file system can tell."""
        if self._size is not None:
            durable.reserve(self._descriptor, self._size)

    def write(self, chunk: bytes) -> None:
        if self._size is not None and self._hashes.size + len(chunk) > self._size:
            raise BadUpload(f"more than the announced {self._size} bytes arrived")
        if self._size is None and self._hashes.size - self._checked >= 64 * CHUNK:
            self._store._check_space(0)
            self._checked = self._hashes.size
        view = memoryview(chunk)
        while view:
            view = view[os.write(self._descriptor, view) :]
        self._hashes.update(chunk)

    def finish(self) -> Stored:
        hashes = self._hashes
        if self._size is not None and hashes.size != self._size:
            raise BadUpload(f"{hashes.size} of the announced {self._size} bytes arrived")
        if self._expected is not None and hashes.sha256 != self._expected:
            raise DigestMismatch(
                f"the bytes have SHA-256 {hashes.sha256}, not {self._expected}; send them again"
            )
        durable.sync_file(self._descriptor)
        self.close()  # Windows renames only closed files.
        git_oid = hashes.git_oid or self._git_oid(hashes.size)
        self._store._publish(self._path, hashes.sha256)
        return Stored(hashes.sha256, git_oid, hashes.size)

    def _git_oid(self, size: int) -> str | None:
        # The size stands in front of the bytes in a git object, so it can be too late to stream.
        if size > MAX_GIT_BYTES:
            return None
        hashed = git_blob_hash(size)
        for chunk in _read(self._path, 0, size):
            hashed.update(chunk)
        return hashed.hexdigest()


def _sweep(folder: Path, older_than_s: float) -> int:
    limit = time.time() - older_than_s
    stale = [path for path in folder.iterdir() if path.stat().st_mtime <= limit]
    for path in stale:
        path.unlink(missing_ok=True)
    return len(stale)


def _read(path: Path, start: int, end: int) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while start < end:
            chunk = file.read(min(CHUNK, end - start))
            if not chunk:
                raise OSError(errno.EIO, f"{path.name} is shorter than it was")
            start += len(chunk)
            yield chunk


@contextmanager
def _removed_on_failure(path: Path) -> Iterator[None]:
    done = False
    try:
        yield
        done = True
    finally:
        if not done:
            path.unlink(missing_ok=True)


@contextmanager
def _full_disk_is_no_space() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise NoSpace("the hub's disk is full; nothing was stored") from error
