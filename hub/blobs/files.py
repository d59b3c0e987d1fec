"""Blobs in a local folder: `blobs/ab/cd/<sha256>` with mode 0444, `STORE_ID`.

`tmp/` and `parts/` hold what is on its way in, `trash/` what was removed in the last day.

The order of one upload: temporary file on the same file system, hash while streaming, compare,
fsync the file, rename, fsync the folder. Only then may a catalogue row name the blob.
A crash leaves at most a temporary file, which `sweep` removes, or a blob nobody refers to.
"""

import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from hub.blobs import durable
from hub.blobs.parts import FileParts
from hub.blobs.spool import (
    Spool,
    SpoolFile,
    Uploads,
    git_oid_of,
    read_file,
    removed_on_failure,
    sweep_folder,
)
from hub.blobs.store import Arrival, Sha256, Stored
from hub.failpoints import reach

TRASH_S = 24 * 3600


class FileBlobStore(Uploads):
    """The default store; `min_free_bytes` stay free on its file system."""

    def __init__(self, root: Path, *, min_free_bytes: int = 0) -> None:
        self._root = root
        self._tmp = root / "tmp"
        self._blobs = root / "blobs"
        self._trash = root / "trash"
        if not root.is_dir():
            root.mkdir(parents=True)
            durable.sync_folder(root.parent)
        for folder in (self._tmp, self._blobs, self._trash):
            durable.make_folders(folder, root)
        self._spool = Spool(self._tmp, min_free_bytes)
        self.parts = FileParts(root / "parts", self._spool, self.adopt)
        if not self.is_at(root):
            self.renew()
        self.id = self._identity()

    @staticmethod
    def is_at(root: Path) -> bool:
        """Whether a store was made in this folder before."""
        return (root / "STORE_ID").is_file()

    def adopt(self, path: Path, *, expected: Sha256 | None = None) -> Stored:
        size = path.stat().st_size
        if path.stat().st_dev != self._tmp.stat().st_dev:
            stored = self.put(read_file(path, 0, size), expected=expected, size=size)
            path.unlink()
            return stored
        taken = self._tmp / uuid.uuid4().hex
        os.rename(path, taken)
        with self._spool.writing(), removed_on_failure(taken):
            arrival = Arrival(expected, size)
            for chunk in read_file(taken, 0, size):
                arrival.update(chunk)
            hashes = arrival.check()
            descriptor = os.open(taken, os.O_RDWR | getattr(os, "O_BINARY", 0))
            try:
                with self._spool.syncing():
                    durable.sync_file(descriptor)
            finally:
                os.close(descriptor)
            self._publish(taken, hashes.sha256)
        return Stored(hashes.sha256, hashes.git_oid, size)

    def open(self, sha256: Sha256, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        path = self._path(sha256)
        size = path.stat().st_size
        return read_file(path, start, size if end is None else min(end, size))

    def path(self, sha256: Sha256) -> Path | None:
        path = self._path(sha256)
        return path if path.is_file() else None

    @contextmanager
    def local(self, sha256: Sha256) -> Iterator[Path]:
        path = self._path(sha256)
        path.stat()
        yield path

    def address(self, sha256: Sha256, seconds: int, headers: Mapping[str, str]) -> str | None:
        return None

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
        return self._spool.is_writable()

    def sweep(self, older_than_s: float) -> int:
        sweep_folder(self._trash, TRASH_S)
        self.parts.sweep()
        return self._spool.sweep(older_than_s)

    def renew(self) -> None:
        temporary = self._tmp / uuid.uuid4().hex
        descriptor = durable.create_exclusive(temporary)
        try:
            os.write(descriptor, f"{uuid.uuid4().hex}\n".encode())
            durable.sync_file(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, self._root / "STORE_ID")
        durable.sync_folder(self._root)
        self.id = self._identity()

    def _identity(self) -> str:
        return (self._root / "STORE_ID").read_text().strip()

    def _path(self, sha256: Sha256) -> Path:
        return self._blobs / sha256[:2] / sha256[2:4] / sha256

    @contextmanager
    def _upload(self, expected: Sha256 | None, size: int | None) -> Iterator["_Upload"]:
        self._spool.check_space(size or 0)
        path = self._spool.new_path()
        with self._spool.writing(), removed_on_failure(path):
            reach("U1")
            upload = _Upload(self, SpoolFile(self._spool, path, size), Arrival(expected, size))
            try:
                reach("U2")
                yield upload
            finally:
                upload.close()

    def _publish(self, temporary: Path, sha256: Sha256) -> None:
        final = self._path(sha256)
        durable.make_folders(final.parent, self._blobs)
        reach("U6")
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
        reach("U7")
        with self._spool.syncing():
            durable.sync_folder(final.parent)
        reach("U8")


class _Upload:
    """One temporary file on its way to becoming a blob."""

    def __init__(self, store: FileBlobStore, file: SpoolFile, arrival: Arrival) -> None:
        self._store = store
        self._file = file
        self._arrival = arrival

    def close(self) -> None:
        self._file.close()

    def write(self, chunk: bytes) -> None:
        self._arrival.update(chunk)
        self._file.write(chunk)
        reach("U3")

    def finish(self) -> Stored:
        hashes = self._arrival.check()
        reach("U4")
        self._file.sync()
        reach("U5")
        self.close()  # Windows renames only closed files.
        path = self._file.path
        git_oid = hashes.git_oid or git_oid_of(path, hashes.size)
        self._store._publish(path, hashes.sha256)
        return Stored(hashes.sha256, git_oid, hashes.size)
