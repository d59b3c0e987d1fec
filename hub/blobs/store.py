"""What every blob store can do, and the value it answers with."""

import hashlib
from collections.abc import AsyncIterable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NewType, Protocol

from hub.errors import BadUpload, DigestMismatch

# 64 lower-case hexadecimal digits.
Sha256 = NewType("Sha256", str)

# A git object id is kept beside the digest up to this size; larger files are Git LFS objects,
# whose git object is the small pointer file.
MAX_GIT_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Stored:
    """Bytes that a store holds durably; `git_oid` is the SHA-1 of the git blob object."""

    sha256: Sha256
    git_oid: str | None
    size: int


class BlobStore(Protocol):
    """Whole blobs only: after a failed `put` nothing of it is visible."""

    @property
    def id(self) -> str:
        """Identity of this store; the catalogue remembers it and refuses another one."""

    def renew(self) -> None:
        """Take another identity: catalogues that know the old one refuse this store."""

    def put(
        self, chunks: Iterable[bytes], *, expected: Sha256 | None = None, size: int | None = None
    ) -> Stored:
        """Durable when it returns. DigestMismatch, BadUpload (size), NoSpace."""

    async def put_stream(
        self,
        chunks: AsyncIterable[bytes],
        *,
        expected: Sha256 | None = None,
        size: int | None = None,
    ) -> Stored:
        """As `put`, from a request body."""

    def adopt(self, path: Path, *, expected: Sha256 | None = None) -> Stored:
        """Take over a finished local file, which is gone from `path` afterwards. DigestMismatch."""

    def open(self, sha256: Sha256, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The bytes [start, end); FileNotFoundError at once if the store lacks the blob."""

    def path(self, sha256: Sha256) -> Path | None:
        """The local file, if this store has one and it exists."""

    def local(self, sha256: Sha256) -> AbstractContextManager[Path]:
        """A local file with these bytes while the block runs; not to be changed."""

    def address(self, sha256: Sha256, seconds: int, headers: Mapping[str, str]) -> str | None:
        """Where a client may get the blob itself for so long, with these headers; None: from us.

        Content-Type, Content-Disposition and Cache-Control can be given.
        """

    def size(self, sha256: Sha256) -> int | None:
        """Bytes, or None when the store lacks the blob."""

    def delete(self, sha256: Sha256) -> None:
        """At once and for good; no error if it is already gone."""

    def trash(self, sha256: Sha256) -> None:
        """As `delete`, but where the store can, the bytes stay aside for a day."""

    def inventory(self) -> Iterator[tuple[Sha256, int, datetime]]:
        """Digest, size and time of every blob the store has; an error rather than a part of them.

        The time is when the bytes became visible last, aware, in UTC.
        """

    def sweep(self, older_than_s: float) -> int:
        """Remove what unfinished uploads and reads have left; how many files there were."""

    @property
    def parts(self) -> "PartStore":
        """For files that arrive in parts."""

    def is_writable(self) -> bool:
        """Whether an upload could succeed now; asked by the readiness probe."""


class PartStore(Protocol):
    """Files on their way in as parts, in any order, perhaps for days and through restarts.

    A handle says which file; whoever begins one remembers it, and finishes or drops it.
    """

    def begin(self) -> str:
        """The handle of a new file."""

    def address(self, handle: str, number: int, size: int, seconds: int) -> str | None:
        """Where a client may PUT the part of this size itself for so long; None: to us."""

    async def put(
        self, handle: str, number: int, offset: int, size: int, chunks: AsyncIterable[bytes]
    ) -> str:
        """Durable when it returns; what `finish` names the part by. BadUpload (size), NoSpace.

        Numbers begin with 1; the bytes belong at `offset` of the file.
        """

    def finish(self, handle: str, tags: Sequence[str], expected: Sha256, size: int) -> Stored:
        """All parts by their numbers become a blob, which appears only if its digest is right.

        BadUpload or DigestMismatch, after which the parts are gone;
        FileNotFoundError if they were gone before.
        """

    def drop(self, handle: str) -> None:
        """No error if it is already gone."""


class Hashes:
    """SHA-256 of bytes as they pass, and their git object id if their number is known before."""

    def __init__(self, size: int | None) -> None:
        self.size = 0
        self._sha256 = hashlib.sha256()
        self._git = None
        if size is not None and size <= MAX_GIT_BYTES:
            self._git = git_blob_hash(size)

    def update(self, chunk: bytes) -> None:
        self.size += len(chunk)
        self._sha256.update(chunk)
        if self._git is not None:
            self._git.update(chunk)

    @property
    def sha256(self) -> Sha256:
        return Sha256(self._sha256.hexdigest())

    @property
    def git_oid(self) -> str | None:
        return self._git.hexdigest() if self._git is not None else None


class Arrival:
    """Bytes on their way in, held against what was announced of them."""

    def __init__(self, expected: Sha256 | None, size: int | None) -> None:
        self._expected = expected
        self._size = size
        self._hashes = Hashes(size)

    @property
    def size(self) -> int:
        return self._hashes.size

    def update(self, chunk: bytes) -> None:
        """BadUpload as soon as there are too many."""
        if self._size is not None and self._hashes.size + len(chunk) > self._size:
            raise BadUpload(f"more than the announced {self._size} bytes arrived")
        self._hashes.update(chunk)

    def check(self) -> Hashes:
        """BadUpload or DigestMismatch unless everything came."""
        hashes = self._hashes
        if self._size is not None and hashes.size != self._size:
            raise BadUpload(f"{hashes.size} of the announced {self._size} bytes arrived")
        if self._expected is not None and hashes.sha256 != self._expected:
            raise DigestMismatch(
                f"the bytes have SHA-256 {hashes.sha256}, not {self._expected}; send them again"
            )
        return hashes


def git_blob_hash(size: int) -> "hashlib._Hash":
    """SHA-1 as git starts it for a blob of `size` bytes (git-hash-object(1))."""
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def lfs_pointer_oid(sha256: Sha256, size: int) -> str:
    """Git object id of the pointer file that stands for an LFS object in a git tree.

    Git LFS specification, "The Pointer", version 1.
    """
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    hashed = git_blob_hash(len(pointer))
    hashed.update(pointer.encode())
    return hashed.hexdigest()
