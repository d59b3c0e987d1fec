"""The few words of S3 that every store speaks, and what its refusals mean here.

PUT, GET with a range, HEAD, DELETE, LIST, COPY, multipart, presigned addresses; nothing else.
No If-None-Match (rclone ignores it, Swift is not atomic), no ETag as a checksum (objects in parts
have none), no tags, ACLs or legal holds (some stores write the request over the object).
"""

import base64
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from hub.errors import BadUpload, NoSpace, StoreFailed

CHUNK = 1 << 20
ERRORS = (ClientError, BotoCoreError)
_ATTEMPTS = 3
_ABSENT = {"404", "NoSuchKey", "NotFound"}
_WRONG_PARTS = {"InvalidPart", "InvalidPartOrder", "EntityTooSmall"}
_FULL = {"InsufficientStorage", "QuotaExceeded", "XMinioStorageFull", "507"}


@dataclass(frozen=True, slots=True)
class Found:
    """An object as a listing or HEAD tells of it; `changed` is aware, in UTC."""

    key: str
    size: int
    changed: datetime


def make_client(endpoint: str | None, region: str | None) -> Any:
    """Credentials come from where boto3 looks for them; so do endpoint and region if not given."""
    options: dict[str, Any] = {
        # Other stores than AWS get the newer default checksums wrong; Content-MD5 goes instead.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        "signature_version": "s3v4",
        "connect_timeout": 10,
        "read_timeout": 60,
        "retries": {"mode": "standard", "total_max_attempts": _ATTEMPTS},
        "max_pool_connections": 64,
    }
    session = boto3.Session()
    try:
        client = session.client(
            "s3", endpoint_url=endpoint, region_name=region, config=Config(**options)
        )
        if ".amazonaws.com" in client.meta.endpoint_url:
            return client
        # Buckets as host names need a wildcard in the DNS, which others than AWS rarely have.
        return session.client(
            "s3",
            endpoint_url=client.meta.endpoint_url,
            region_name=region or client.meta.region_name or "us-east-1",
            config=Config(**options, s3={"addressing_style": "path"}),
        )
    except (BotoCoreError, ValueError) as error:  # ValueError: an endpoint that is no address
        raise StoreFailed(f"the S3 store: {_words(error)}") from error


class Bucket:
    """One bucket, or what lies below a prefix of it; keys are given without the prefix.

    Every method may raise StoreFailed, and NoSpace if it writes.
    """

    def __init__(self, client: Any, name: str, prefix: str = "") -> None:
        self.client = client
        self.name = name
        self.prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""

    def put(self, key: str, data: bytes) -> None:
        """Durable when it returns."""
        try:
            with self._explained():
                self.client.put_object(**self.at(key), Body=data, ContentMD5=md5_of(data))
        except StoreFailed:
            # The answer may be lost and not the bytes.
            if self.size(key) != len(data):
                raise

    def size(self, key: str) -> int | None:
        found = self.head(key)
        return found.size if found is not None else None

    def head(self, key: str) -> Found | None:
        """None if there is no such object."""
        try:
            with self._explained():
                answer = self.client.head_object(**self.at(key))
        except _Absent:
            return None
        return Found(key, answer["ContentLength"], answer["LastModified"].astimezone(UTC))

    def read(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The bytes [start, end); FileNotFoundError at once. Broken connections are continued."""
        if end is not None and end <= start:
            if self.head(key) is None:
                raise FileNotFoundError(key)
            return iter(())
        try:
            body, last = self._get(key, start, end)
        except _Absent as error:
            raise FileNotFoundError(key) from error
        return self._pieces(key, body, start, last) if body is not None else iter(())

    def delete(self, key: str) -> None:
        """No error if it is already gone."""
        try:
            with self._explained():
                self.client.delete_object(**self.at(key))
        except _Absent:
            return

    def list(self, under: str) -> Iterator[Found]:
        """Every object whose key begins so; an error rather than a part of them."""
        pages = self.client.get_paginator("list_objects_v2").paginate(
            Bucket=self.name, Prefix=self.prefix + under
        )
        with self._explained():
            for page in pages:
                for item in page.get("Contents", []):
                    key = item["Key"].removeprefix(self.prefix)
                    yield Found(key, item["Size"], item["LastModified"].astimezone(UTC))

    def copy(self, source: str, key: str, size: int) -> None:
        """At most 5 GB; durable when it returns."""
        try:
            with self._explained():
                self.client.copy_object(**self.at(key), CopySource=self.at(source))
        except StoreFailed:
            if self.size(key) != size:
                raise

    def begin(self, key: str) -> str:
        """The id of a new multipart upload."""
        with self._explained():
            answer = self.client.create_multipart_upload(
                **self.at(key), ContentType="application/octet-stream"
            )
        return str(answer["UploadId"])

    def put_part(self, key: str, upload_id: str, number: int, data: bytes) -> str:
        """What the completion names this part by; numbers begin with 1."""
        with self._explained():
            answer = self.client.upload_part(
                **self.at(key),
                UploadId=upload_id,
                PartNumber=number,
                Body=data,
                ContentMD5=md5_of(data),
            )
        return str(answer["ETag"])

    def put_part_file(self, key: str, upload_id: str, number: int, path: Path, md5: str) -> str:
        """As `put_part`, from a file whose Content-MD5 is known."""
        with path.open("rb") as file, self._explained():
            answer = self.client.upload_part(
                **self.at(key), UploadId=upload_id, PartNumber=number, Body=file, ContentMD5=md5
            )
        return str(answer["ETag"])

    def complete(self, key: str, upload_id: str, parts: Sequence[str], size: int) -> int | None:
        """All parts, in their order, become one object; how large it is then.

        FileNotFoundError if there is no such upload and no object; BadUpload for a wrong part.
        """
        numbered = [{"PartNumber": n, "ETag": tag} for n, tag in enumerate(parts, 1)]
        try:
            with self._explained():
                self.client.complete_multipart_upload(
                    **self.at(key), UploadId=upload_id, MultipartUpload={"Parts": numbered}
                )
        except StoreFailed as error:
            # The answer may be lost, or this was a second request after a first that worked.
            found = self.size(key)
            if found is None and isinstance(error, _Absent):
                raise FileNotFoundError(key) from error
            if found != size:
                raise
        return self.size(key)

    def abort(self, key: str, upload_id: str) -> None:
        """No error if the upload is already gone."""
        try:
            with self._explained():
                self.client.abort_multipart_upload(**self.at(key), UploadId=upload_id)
        except _Absent:
            return

    def at(self, key: str) -> dict[str, str]:
        return {"Bucket": self.name, "Key": self.prefix + key}

    def __str__(self) -> str:
        return f"s3://{self.name}/{self.prefix}"

    def _get(self, key: str, start: int, end: int | None) -> tuple[Any, int]:
        """The body and where it ends; no body where the object ends before `start`."""
        span = f"bytes={start}-{end - 1 if end is not None else ''}"
        try:
            with self._explained():
                answer = self.client.get_object(**self.at(key), Range=span)
        except _OutOfRange:
            return None, start
        told = answer.get("ContentRange", "")
        if not told.startswith(f"bytes {start}-"):
            answer["Body"].close()
            raise StoreFailed(f"{self} does not send ranges of its objects")
        return answer["Body"], start + answer["ContentLength"]

    def _pieces(self, key: str, body: Any, start: int, end: int) -> Iterator[bytes]:
        failures = 0
        while True:
            try:
                with closing(body):
                    for piece in body.iter_chunks(CHUNK):
                        start += len(piece)
                        failures = 0
                        yield piece
                if start >= end:
                    return
                reason = "the connection ended early"
            except BotoCoreError as error:
                reason = _words(error)
            failures += 1
            if failures == _ATTEMPTS:
                raise StoreFailed(f"{self}: {reason}")
            body, _ = self._get(key, start, end)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except ClientError as error:
            code = code_of(error)
            if code in _ABSENT or code == "NoSuchUpload":
                raise _Absent(self._sentence(error)) from error
            if code in ("InvalidRange", "416"):
                raise _OutOfRange(self._sentence(error)) from error
            if code in _WRONG_PARTS:
                raise BadUpload(self._sentence(error)) from error
            if code in _FULL:
                raise NoSpace(f"{self} is full; nothing was stored") from error
            raise StoreFailed(self._sentence(error)) from error
        except BotoCoreError as error:
            raise StoreFailed(self._sentence(error)) from error

    def _sentence(self, error: Exception) -> str:
        return f"{self}: {_words(error)}"


class _Absent(StoreFailed):
    """What was asked for is not there; some callers make more of it."""

    code = StoreFailed.__name__


class _OutOfRange(StoreFailed):
    """The object has no such byte."""

    code = StoreFailed.__name__


def md5_of(data: bytes) -> str:
    """As Content-MD5 wants it: the one checksum of a body that nearly every store checks."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def code_of(error: ClientError) -> str:
    """The store's name of an error, or the status where the answer had no body."""
    return str(error.response.get("Error", {}).get("Code", "unknown"))


def _words(error: Exception) -> str:
    if isinstance(error, ClientError):
        code = code_of(error)
        return _CODES.get(code, f"the store answers {code}")
    return " ".join(str(error).split())


_CODES = {
    "NoSuchBucket": "there is no such bucket",
    "AccessDenied": "the store does not let these credentials do this",
    "403": "the store does not let these credentials do this",
    "InvalidAccessKeyId": "the store does not know this access key",
    "SignatureDoesNotMatch": "the store does not accept this secret key",
}
