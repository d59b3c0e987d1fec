"""Files that arrive in parts, in S3: multipart uploads of `staging/<id>`.

Clients send the parts to the store themselves where it has an address for them, else through us.
The whole is read back and hashed before it is copied to the key of its digest, because a client
that holds an address for a part could send anything.
"""

import base64
import hashlib
import uuid
from collections.abc import AsyncIterable, Callable, Sequence
from typing import Any

from anyio import to_thread

from hub.blobs.bucket import Bucket
from hub.blobs.parts import FORGOTTEN_S
from hub.blobs.spool import Spool, SpoolFile, receive, removed_at_end
from hub.blobs.store import Arrival, Sha256, Stored
from hub.db import now
from hub.errors import BadUpload, DigestMismatch

STAGING = "staging/"
GiB = 2**30
MOST_COPIED_BYTES = 5 * GiB  # CopyObject takes no more; copying by parts is broken in rclone.
Put = Callable[..., Stored]


class StagedParts:
    """`presigner` is a client whose endpoint clients can reach; `put` stores bytes of any size."""

    def __init__(
        self,
        bucket: Bucket,
        spool: Spool,
        key_of: Callable[[Sha256], str],
        put: Put,
        presigner: Any | None,
        can_copy: bool,
    ) -> None:
        self._bucket, self._spool = bucket, spool
        self._key_of, self._put = key_of, put
        self._presigner = presigner
        self._most_copied = MOST_COPIED_BYTES if can_copy else 0

    def begin(self) -> str:
        name = uuid.uuid4().hex
        return f"{name}/{self._bucket.begin(STAGING + name)}"

    def address(self, handle: str, number: int, size: int, seconds: int) -> str | None:
        if self._presigner is None:
            return None
        key, upload_id = _parse(handle)
        # With its length in the signature, nobody can send more than was announced.
        part = {"UploadId": upload_id, "PartNumber": number, "ContentLength": size}
        return str(
            self._presigner.generate_presigned_url(
                "upload_part", {**self._bucket.at(key), **part}, ExpiresIn=seconds
            )
        )

    async def put(
        self, handle: str, number: int, offset: int, size: int, chunks: AsyncIterable[bytes]
    ) -> str:
        key, upload_id = _parse(handle)
        self._spool.check_space(size)
        path = self._spool.new_path()
        with self._spool.writing(), removed_at_end(path):
            part = _Part(SpoolFile(self._spool, path, size), size)
            try:
                md5 = await receive(chunks, part)
            finally:
                part.close()
            return await to_thread.run_sync(
                self._bucket.put_part_file, key, upload_id, number, path, md5
            )

    def finish(self, handle: str, tags: Sequence[str], expected: Sha256, size: int) -> Stored:
        key, upload_id = _parse(handle)
        try:
            found = self._bucket.complete(key, upload_id, tags, size)
            if found != size:
                raise BadUpload(f"the parts are {found} bytes and not {size}")
            return self._publish(key, expected, size)
        except (BadUpload, DigestMismatch):
            self.drop(handle)
            raise

    def drop(self, handle: str) -> None:
        key, upload_id = _parse(handle)
        self._bucket.abort(key, upload_id)
        self._bucket.delete(key)

    def sweep(self) -> None:
        """Remove what no ledger can know any more; unfinished uploads are the bucket's to remove."""
        for found in self._bucket.list(STAGING):
            if (now() - found.changed).total_seconds() > FORGOTTEN_S:
                self._bucket.delete(found.key)

    def _publish(self, key: str, expected: Sha256, size: int) -> Stored:
        if size > self._most_copied:
            stored = self._put(self._bucket.read(key), expected=expected, size=size)
        else:
            arrival = Arrival(expected, size)
            for chunk in self._bucket.read(key):
                arrival.update(chunk)
            hashes = arrival.check()
            self._bucket.copy(key, self._key_of(expected), size)
            stored = Stored(expected, hashes.git_oid, size)
        self._bucket.delete(key)
        return stored


class _Part:
    """One part in a local file, because a signature needs the whole of it."""

    def __init__(self, file: SpoolFile, size: int) -> None:
        self._file, self._size, self._arrived = file, size, 0
        self._md5 = hashlib.md5(usedforsecurity=False)

    def write(self, chunk: bytes) -> None:
        self._arrived += len(chunk)
        if self._arrived > self._size:
            raise BadUpload(f"more than the {self._size} bytes of this part arrived")
        self._md5.update(chunk)
        self._file.write(chunk)

    def finish(self) -> str:
        """Content-MD5."""
        if self._arrived != self._size:
            raise BadUpload(f"{self._arrived} of the {self._size} bytes of this part arrived")
        return base64.b64encode(self._md5.digest()).decode()

    def close(self) -> None:
        self._file.close()


def _parse(handle: str) -> tuple[str, str]:
    """The key and the upload id."""
    name, _, upload_id = handle.partition("/")
    assert uuid.UUID(name).hex == name, "a handle that is not ours"
    return STAGING + name, upload_id
