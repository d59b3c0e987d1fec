"""Objects of an S3 store as inputs that are read where they lie, and as outputs that appear whole.

A read names the version that the first one saw, so that an object which changes meanwhile is an
error. An output is a multipart upload: parts are sent by several threads as they become ready, and
the last request makes all of them one object, or takes all of them back.
"""

import io
import secrets
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from types import TracebackType
from typing import Any, Self

from botocore.exceptions import BotoCoreError, ClientError

from cli.console import CommandError
from cli.ranges import HEAD_BYTES, Absent, Blocks, Ranged
from merge.errors import BadFile, CannotWrite
from merge.formats.targets import Output
from train.s3 import ERRORS, code_of, reason, s3_client

# S3 answers AccessDenied for a missing object to those who may not list the bucket.
_ABSENT = {"NoSuchKey", "AccessDenied"}
# What a read of a version says when the object is another one by now, or gone.
_CHANGED = {"PreconditionFailed", "NoSuchKey", "InvalidRange", "412"}
# The same of a request for an object's head, whose answers have no body that could say more.
# Who may only write is not told: then the upload decides.
_NOT_THERE = {"404", "403", "NoSuchKey", "NoSuchBucket", "AccessDenied"}
_ATTEMPTS = 3
_PIECE_BYTES = 2**18
_PART_BYTES = 8 * 2**20
_MOST_PARTS = 10_000
_SENDERS = 6
_MARK = "graft-upload"


def open_s3(bucket: str, key: str, blocks: Blocks) -> Ranged:
    """The object as it is now; CommandError in one sentence, Absent where there is none."""
    name = f"s3://{bucket}/{key}"
    with _explained(name):
        return _open(s3_client(), bucket, key, blocks)


def _open(client: Any, bucket: str, key: str, blocks: Blocks) -> Ranged:
    name = f"s3://{bucket}/{key}"
    try:
        answer = client.get_object(Bucket=bucket, Key=key, Range=f"bytes=0-{HEAD_BYTES - 1}")
        with closing(answer["Body"]) as body:
            head, version = body.read(HEAD_BYTES), answer["ETag"]
        size = int(answer.get("ContentRange", str(answer["ContentLength"])).rpartition("/")[2])
    except ClientError as error:
        if code_of(error) != "InvalidRange":
            raise
        head, version, size = b"", "", 0  # an empty object has no byte 0
    if len(head) != min(size, HEAD_BYTES):
        raise CommandError(f"{name}: the store does not send ranges of it")

    def fetch(buffer: memoryview, begin: int) -> None:
        _read(client, bucket, key, version, buffer, begin)

    def find(sibling: str) -> Ranged | None:
        path = key[: key.rfind("/") + 1] + sibling
        try:
            with _explained(f"s3://{bucket}/{path}"):
                return _open(client, bucket, path, blocks)
        except Absent:
            return None

    return Ranged(name, version, head, size, fetch, find, blocks)


def _read(client: Any, bucket: str, key: str, version: str, buffer: memoryview, begin: int) -> None:
    """Fill `buffer` from byte `begin` of that version of an object, or BadFile."""
    name = f"s3://{bucket}/{key}"
    span = f"bytes={begin}-{begin + len(buffer) - 1}"
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            answer = client.get_object(Bucket=bucket, Key=key, Range=span, IfMatch=version)
        except ERRORS as error:
            if code_of(error) in _CHANGED:
                raise _changed(name) from error
            raise BadFile(name, "st_unreadable", reason(error)) from error
        with closing(answer["Body"]) as body:
            if answer["ETag"] != version:  # some stores ignore If-Match
                raise _changed(name)
            try:
                done = _receive(body, buffer)
            except BotoCoreError as error:  # boto3 itself repeats only what fails before the body
                if attempt == _ATTEMPTS:
                    raise BadFile(name, "st_unreadable", reason(error)) from error
                continue
        if done == len(buffer):
            return
    raise BadFile(name, "st_short_read", f"the store does not send {span}")


def _receive(body: Any, buffer: memoryview) -> int:
    """How many bytes came, in small pieces: a large read is copied on its way through urllib3."""
    done = 0
    for chunk in body.iter_chunks(_PIECE_BYTES):
        part = buffer[done : done + len(chunk)]
        part[:] = chunk[: len(part)]
        done += len(chunk)
    return done


def _changed(name: str) -> BadFile:
    return BadFile(name, "st_changed", "the object changed while it was read")


class S3Target:
    """An object that is written in parts; `merge.formats.targets.Target` says how."""

    def __init__(self, bucket: str, key: str) -> None:
        self.bucket, self.key = bucket, key
        self.name = f"s3://{bucket}/{key}"
        self.waiting_threads = _SENDERS
        with _explained(self.name):
            self.client = s3_client()

    def check(self) -> None:
        """CannotWrite unless the store would take an upload, asked before anything is computed."""
        upload = _Upload(self, 1)
        upload.begin()
        upload.take_back()

    def exists(self) -> bool:
        """Whether an object is there, as far as we may know."""
        with _explained(self.name):
            try:
                self.client.head_object(Bucket=self.bucket, Key=self.key)
            except ClientError as error:
                if code_of(error) in _NOT_THERE:
                    return False
                raise
        return True

    def block_bytes(self, size: int) -> int:
        return max(_PART_BYTES, -(-size // _MOST_PARTS))

    def create(self, size: int, block: int) -> AbstractContextManager[Output]:
        return _Upload(self, block)


class _Upload:
    """Parts of an object that nobody sees until all of them are there."""

    def __init__(self, target: S3Target, block: int) -> None:
        self._target, self._block = target, block
        self._mark = secrets.token_hex(8)
        self._lock = threading.Lock()
        self._parts: dict[int, str] = {}

    def begin(self) -> None:
        with self._or_cannot_write():
            answer = self._target.client.create_multipart_upload(
                **self._object, ContentType="application/octet-stream", Metadata={_MARK: self._mark}
            )
        self._upload = {**self._object, "UploadId": answer["UploadId"]}

    def __enter__(self) -> Self:
        self.begin()
        return self

    def write(self, buffer: memoryview, n: int, offset: int) -> None:
        number, rest = divmod(offset, self._block)
        assert rest == 0, f"a part of {self._target.name} begins inside another"
        with self._or_cannot_write():
            answer = self._target.client.upload_part(
                **self._upload, PartNumber=number + 1, Body=_Reader(buffer[:n])
            )
        with self._lock:
            self._parts[number + 1] = answer["ETag"]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """By now no thread writes any more, so that what is taken back stays away."""
        if error is not None:
            self.take_back()
            return
        try:
            self._complete()
        except BaseException:
            self.take_back()
            raise

    def _complete(self) -> None:
        parts = [{"PartNumber": n, "ETag": tag} for n, tag in sorted(self._parts.items())]
        assert [part["PartNumber"] for part in parts] == list(range(1, len(parts) + 1))
        with self._or_cannot_write():
            try:
                self._target.client.complete_multipart_upload(
                    **self._upload, MultipartUpload={"Parts": parts}
                )
            except ERRORS:
                # The answer may have been lost and not the request, or this was boto3's second try.
                if not self._is_there():
                    raise

    def _is_there(self) -> bool:
        try:
            found = self._target.client.head_object(**self._object).get("Metadata", {})
        except ERRORS:
            return False
        return self._mark in found.values()  # some stores change how the mark's name is spelled

    def take_back(self) -> None:
        try:
            self._target.client.abort_multipart_upload(**self._upload)
        except ERRORS as error:
            if code_of(error) != "NoSuchUpload":
                upload = self._upload["UploadId"]
                detail = f"{reason(error)}, so that its unfinished upload {upload} may remain"
                raise CannotWrite(self._target.name, detail) from error

    @property
    def _object(self) -> dict[str, str]:
        return {"Bucket": self._target.bucket, "Key": self._target.key}

    @contextmanager
    def _or_cannot_write(self) -> Iterator[None]:
        try:
            yield
        except ERRORS as error:
            raise CannotWrite(self._target.name, reason(error)) from error


class _Reader(io.RawIOBase):
    """A part as the file that boto3 wants, so that it is not copied to be sent."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = self._data[self._at : self._at + len(buffer)]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._data)}[whence]
        self._at = start + offset
        return self._at


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except (*ERRORS, ValueError) as error:  # ValueError: an endpoint that is no address
        kind = Absent if code_of(error) in _ABSENT else CommandError
        raise kind(f"{name}: {reason(error)}") from error
