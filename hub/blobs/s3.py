"""Blobs in an S3 bucket: `STORE_ID`, `blobs/sha256/ab/cd/<hex>`, `staging/<upload>`.

A blob appears with one request and only after its digest was right: a PUT of what fits in memory,
else the completion of a multipart upload at the final key. Bytes whose digest or number is not
known before go to a local file first. A crash leaves an upload in parts that nobody sees, which the
bucket's own rule for unfinished uploads removes, or a blob nobody refers to.
"""

import uuid
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from hub.blobs.bucket import Bucket
from hub.blobs.cache import Cache
from hub.blobs.spool import (
    Spool,
    SpoolFile,
    Uploads,
    git_oid_of,
    read_file,
    removed_on_failure,
)
from hub.blobs.staging import StagedParts
from hub.blobs.store import Arrival, Hashes, Sha256, Stored
from hub.errors import StoreFailed
from hub.failpoints import reach

MiB = 2**20
PART_BYTES = 8 * MiB  # S3 takes parts of 5 MiB to 5 GiB
MOST_PARTS = 10_000
SENDERS = 4
MARKER = "STORE_ID"
_BLOBS = "blobs/sha256/"
_SAID = {
    "Content-Type": "ResponseContentType",
    "Content-Disposition": "ResponseContentDisposition",
    "Cache-Control": "ResponseCacheControl",
}


class S3BlobStore(Uploads):
    """`folder` holds what is on its way in, and copies for jobs of at most `cache_bytes`.

    `presigner` is a client whose endpoint the hub's clients can reach too, if there is one;
    `can_copy` whether the store can copy its objects itself, `can_redirect` whether its own answers
    will do for downloads.
    """

    def __init__(
        self,
        bucket: Bucket,
        folder: Path,
        *,
        cache_bytes: int = 0,
        min_free_bytes: int = 0,
        presigner: Any | None = None,
        can_copy: bool = True,
        can_redirect: bool = True,
    ) -> None:
        self.bucket = bucket
        self._spool = Spool(folder / "tmp", min_free_bytes)
        self._cache = Cache(folder / "cache", cache_bytes)
        self._reader = presigner if can_redirect else None
        self.parts = StagedParts(bucket, self._spool, key_of, self.put, presigner, can_copy)
        self.id = self._identity()

    @staticmethod
    def is_at(bucket: Bucket) -> bool:
        """Whether a store was made in this bucket before."""
        return bucket.head(MARKER) is not None

    def adopt(self, path: Path, *, expected: Sha256 | None = None) -> Stored:
        size = path.stat().st_size
        arrival = Arrival(expected, size)
        for chunk in read_file(path, 0, size):
            arrival.update(chunk)
        hashes = arrival.check()
        self._send_file(path, hashes)
        path.unlink()
        return Stored(hashes.sha256, hashes.git_oid, size)

    def open(self, sha256: Sha256, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        return self.bucket.read(key_of(sha256), start, end)

    def path(self, sha256: Sha256) -> Path | None:
        return None

    def local(self, sha256: Sha256) -> AbstractContextManager[Path]:
        return self._cache.file(sha256, self._download)

    def address(self, sha256: Sha256, seconds: int, headers: Mapping[str, str]) -> str | None:
        if self._reader is None:
            return None
        said = {_SAID[name]: value for name, value in headers.items()}
        at = {**self.bucket.at(key_of(sha256)), **said}
        return str(self._reader.generate_presigned_url("get_object", at, ExpiresIn=seconds))

    def size(self, sha256: Sha256) -> int | None:
        return self.bucket.size(key_of(sha256))

    def delete(self, sha256: Sha256) -> None:
        self.bucket.delete(key_of(sha256))
        self._cache.forget(sha256)

    def trash(self, sha256: Sha256) -> None:
        """S3 has no renaming; a bucket with versions keeps what was deleted."""
        self.delete(sha256)

    def inventory(self) -> Iterator[tuple[Sha256, int, datetime]]:
        for found in self.bucket.list(_BLOBS):
            name = found.key.rpartition("/")[2]
            if found.key == key_of(Sha256(name)):
                yield Sha256(name), found.size, found.changed

    def sweep(self, older_than_s: float) -> int:
        self.parts.sweep()
        return self._spool.sweep(older_than_s) + self._cache.sweep(older_than_s)

    def is_writable(self) -> bool:
        """Asks the bucket for its marker; credentials that may not write are found by the probe."""
        try:
            return self._spool.is_writable() and self.bucket.head(MARKER) is not None
        except StoreFailed:
            return False

    def renew(self) -> None:
        self.bucket.put(MARKER, f"{uuid.uuid4().hex}\n".encode())
        self.id = self._identity()

    def _identity(self) -> str:
        if self.bucket.head(MARKER) is None:
            self.bucket.put(MARKER, f"{uuid.uuid4().hex}\n".encode())
        # What is there now, which may be another's who was faster.
        return b"".join(self.bucket.read(MARKER)).decode().strip()

    def _download(self, sha256: Sha256, path: Path) -> None:
        """A whole copy at a new path; StoreFailed if these are not the blob's bytes."""
        size = self.bucket.size(key_of(sha256))
        if size is None:
            raise FileNotFoundError(sha256)
        self._spool.check_space(size)
        hashes = Hashes(size)
        with self._spool.writing(), removed_on_failure(path):
            file = SpoolFile(self._spool, path, size)
            try:
                for chunk in self.open(sha256):
                    hashes.update(chunk)
                    file.write(chunk)
            finally:
                file.close()
            if hashes.sha256 != sha256:
                raise StoreFailed(f"{self.bucket} has other bytes under the digest {sha256}")

    def _send_file(self, path: Path, hashes: Hashes) -> None:
        key = key_of(hashes.sha256)
        if hashes.size <= PART_BYTES:
            self.bucket.put(key, path.read_bytes())
            return
        part_bytes = part_bytes_for(hashes.size)
        with Parts(self.bucket, key) as parts, path.open("rb", buffering=0) as file:
            while data := file.read(part_bytes):
                parts.send(data)
            parts.complete(hashes.size)

    @contextmanager
    def _upload(self, expected: Sha256 | None, size: int | None) -> Iterator["_Upload"]:
        upload = _Upload(self, expected, size)
        reach("S1")
        try:
            yield upload
        finally:
            upload.close()


class _Upload:
    """Bytes that are kept in memory while they fit in one part, and then go on.

    To the final key if it is known, else to a local file.
    """

    def __init__(self, store: S3BlobStore, expected: Sha256 | None, size: int | None) -> None:
        self._store = store
        self._expected, self._size = expected, size
        self._arrival = Arrival(expected, size)
        self._part_bytes = part_bytes_for(size or 0)
        self._waiting = bytearray()
        self._parts: Parts | None = None
        self._file: SpoolFile | None = None

    def write(self, chunk: bytes) -> None:
        self._arrival.update(chunk)
        self._waiting += chunk
        while len(self._waiting) > self._part_bytes:
            self._flush(self._part_bytes)

    def finish(self) -> Stored:
        hashes = self._arrival.check()
        git_oid = hashes.git_oid
        if self._parts is not None:
            self._flush(len(self._waiting))
            self._parts.complete(hashes.size)
        elif self._file is not None:
            self._flush(len(self._waiting))
            git_oid = git_oid or git_oid_of(self._file.path, hashes.size)
            self._store._send_file(self._file.path, hashes)
        else:
            data = bytes(self._waiting)
            git_oid = git_oid or _git_oid(data)
            self._store.bucket.put(key_of(hashes.sha256), data)
        reach("S5")
        return Stored(hashes.sha256, git_oid, hashes.size)

    def close(self) -> None:
        if self._parts is not None:
            self._parts.close()
        if self._file is not None:
            self._file.close()
            self._file.path.unlink(missing_ok=True)

    def _flush(self, n: int) -> None:
        data = bytes(memoryview(self._waiting)[:n])
        del self._waiting[:n]
        if self._expected is not None and self._size is not None:
            if self._parts is None:
                self._parts = Parts(self._store.bucket, key_of(self._expected))
                reach("S2")
            self._parts.send(data)
            return
        spool = self._store._spool
        with spool.writing():
            if self._file is None:
                spool.check_space(self._size or 0)
                self._file = SpoolFile(spool, spool.new_path(), self._size)
            self._file.write(data)


class Parts:
    """A multipart upload, sent by a few threads; left without `complete` it is taken back."""

    def __init__(self, bucket: Bucket, key: str) -> None:
        self._bucket, self._key = bucket, key
        self._upload_id = bucket.begin(key)
        self._senders = ThreadPoolExecutor(SENDERS, thread_name_prefix="s3")
        self._sending: deque[Future[str]] = deque()
        self._tags: list[str] = []
        self._is_complete = False

    def send(self, data: bytes) -> None:
        """The next part; waits while all senders are busy, and raises what went wrong so far."""
        if len(self._sending) == SENDERS:
            self._tags.append(self._sending.popleft().result())
        number = len(self._tags) + len(self._sending) + 1
        self._sending.append(
            self._senders.submit(self._bucket.put_part, self._key, self._upload_id, number, data)
        )
        reach("S3")

    def complete(self, size: int) -> None:
        while self._sending:
            self._tags.append(self._sending.popleft().result())
        reach("S4")
        found = self._bucket.complete(self._key, self._upload_id, self._tags, size)
        self._is_complete = True
        if found != size:
            raise StoreFailed(
                f"{self._bucket} says it has {found} bytes of the {size} that were sent"
            )

    def close(self) -> None:
        # Before the upload is taken back: a part that arrives later would stay.
        self._senders.shutdown(cancel_futures=True)
        if not self._is_complete:
            self._bucket.abort(self._key, self._upload_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def key_of(sha256: Sha256) -> str:
    return f"{_BLOBS}{sha256[:2]}/{sha256[2:4]}/{sha256}"


def part_bytes_for(size: int) -> int:
    """So large that a file of this size has no more parts than S3 takes."""
    return max(PART_BYTES, -(-size // MOST_PARTS))


def _git_oid(data: bytes) -> str | None:
    hashes = Hashes(len(data))
    hashes.update(data)
    return hashes.git_oid
