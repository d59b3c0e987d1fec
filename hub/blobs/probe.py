"""What an S3 store really does, tried on throw-away objects below `probe/`.

Stores differ in ways that no version number tells. What a hub cannot do without keeps it from
starting; what it can do without is switched off; the rest is for `graft doctor` to tell.
"""

import base64
import contextlib
import hashlib
import http.client
import ssl
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

import httpx2
from pydantic import BaseModel, ConfigDict

from hub.blobs.bucket import ERRORS, Bucket
from hub.db import now
from hub.errors import HubError, StoreFailed

# Another one makes every hub probe its store anew.
VERSION = 1
MiB = 2**20
LEAST_PART_BYTES = 5 * MiB
_TIMEOUT_S = 20.0

# What is tried, in words; a hub needs the first, uses the second if it can, tells the third.
MUST: Mapping[str, str] = {
    "put": "objects come back as they were sent",
    "range": "ranges of objects can be read",
    "parts": "parts in any order become an object",
    "list": "objects are listed as soon as they are there",
    "delete": "deleted objects are gone",
}
USED: Mapping[str, str] = {
    "copy": "objects can be copied inside the store",
    "presigned": "clients can send and get bytes by presigned addresses",
    "presigned range": "clients that go on with a download get 206 and a part",
    "presigned expiry": "presigned addresses expire",
    "presigned signature": "presigned addresses that were changed are refused",
    "presigned length": "presigned addresses take no more than was announced",
}
TOLD: Mapping[str, str] = {
    "short": "an upload that is cut short leaves no object",
    "md5": "bytes that do not fit their Content-MD5 are refused",
    "sha256": "bytes that do not fit their SHA-256 are refused",
    "create only": "If-None-Match keeps an object from being overwritten (not relied on)",
    "uploads": "unfinished uploads are listed (not relied on)",
    "part copy": "parts can be copied inside the store (not relied on)",
}


class Probe(BaseModel):
    """`failures` has the reason of everything that did not work; names are those above."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int
    where: str
    public_endpoint: str | None
    at: datetime
    failures: dict[str, str]

    def is_about(self, bucket: Bucket, public_endpoint: str | None) -> bool:
        """Whether it tells of this store as it is used now."""
        asked = (VERSION, where_of(bucket), public_endpoint)
        return (self.version, self.where, self.public_endpoint) == asked

    @property
    def missing(self) -> str | None:
        """What keeps a hub from using this store, in a sentence."""
        for name, meaning in MUST.items():
            if name in self.failures:
                return (
                    f"{self.where} cannot hold a hub: that {meaning} fails ({self.failures[name]})"
                )
        return None

    @property
    def can_copy(self) -> bool:
        return "copy" not in self.failures

    @property
    def can_presign(self) -> bool:
        """Never where addresses do not expire: they would be good for ever."""
        wanted = ("presigned", "presigned expiry", "presigned signature", "presigned length")
        return self.public_endpoint is not None and not any(n in self.failures for n in wanted)

    @property
    def can_redirect(self) -> bool:
        """rclone sends a part with the status of a whole, which clients would take for one."""
        return self.can_presign and "presigned range" not in self.failures


def where_of(bucket: Bucket) -> str:
    return f"{bucket.client.meta.endpoint_url} s3://{bucket.name}/{bucket.prefix}"


def probe(bucket: Bucket, presigner: Any | None, public_endpoint: str | None) -> Probe:
    """Try everything; StoreFailed only if what was made cannot be removed."""
    trial = _Trial(bucket, presigner, f"probe/{uuid.uuid4().hex}")
    failures = {}
    try:
        for name, attempt in _ATTEMPTS.items():
            if name.startswith("presigned") and presigner is None:
                continue
            try:
                attempt(trial)
            except _No as no:
                failures[name] = str(no)
            except (*ERRORS, HubError, OSError, httpx2.HTTPError) as error:
                failures[name] = " ".join(str(error).split())
    finally:
        trial.clean()
    return Probe(
        version=VERSION,
        where=where_of(bucket),
        public_endpoint=public_endpoint,
        at=now(),
        failures=failures,
    )


class _No(Exception):
    """It does not; the reason."""


@dataclass
class _Trial:
    bucket: Bucket
    presigner: Any | None
    prefix: str
    made: set[str] = field(default_factory=set)
    expiring: tuple[str, float] = ("", 0.0)

    def key(self, name: str) -> str:
        key = f"{self.prefix}/{name}"
        self.made.add(key)
        return key

    def put(self, name: str, data: bytes) -> str:
        key = self.key(name)
        self.bucket.put(key, data)
        return key

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        return b"".join(self.bucket.read(key, start, end))

    def address(self, method: str, key: str, seconds: int = 60, **options: Any) -> str:
        client = self.presigner or self.bucket.client
        at = {**self.bucket.at(key), **options}
        return str(client.generate_presigned_url(method, at, ExpiresIn=seconds))

    def part_address(self, key: str, upload_id: str) -> str:
        """Of a first part of five bytes."""
        part = {"UploadId": upload_id, "PartNumber": 1, "ContentLength": 5}
        return self.address("upload_part", key, 60, **part)

    @contextlib.contextmanager
    def upload(self, name: str) -> Iterator[tuple[str, str]]:
        key = self.key(name)
        upload_id = self.bucket.begin(key)
        try:
            yield key, upload_id
        finally:
            with contextlib.suppress(StoreFailed):
                self.bucket.abort(key, upload_id)

    def clean(self) -> None:
        for key in sorted(self.made):
            self.bucket.delete(key)


def _put(trial: _Trial) -> None:
    key = trial.put("put", b"hello")
    if trial.read(key) != b"hello" or trial.bucket.size(key) != len(b"hello"):
        raise _No("other bytes came back")
    if trial.bucket.size(trial.put("empty", b"")) != 0:
        raise _No("an empty object is not there")


def _range(trial: _Trial) -> None:
    key = trial.put("range", b"0123456789")
    if (trial.read(key, 2, 5), trial.read(key, 7), trial.read(key, 10)) != (b"234", b"789", b""):
        raise _No("other bytes came back")


def _parts(trial: _Trial) -> None:
    first, last = bytes(LEAST_PART_BYTES), b"the end"
    with trial.upload("parts") as (key, upload_id):
        tags = {
            n: trial.bucket.put_part(key, upload_id, n, data) for n, data in [(2, last), (1, first)]
        }
        if trial.bucket.size(key) is not None:
            raise _No("they are seen before they are complete")
        size = len(first) + len(last)
        if trial.bucket.complete(key, upload_id, [tags[1], tags[2]], size) != size:
            raise _No("the object has another size")
    if trial.read(key, len(first)) != last:
        raise _No("they are in another order")


def _list(trial: _Trial) -> None:
    key = trial.put("list", b"hello")
    if (key, 5) not in [(found.key, found.size) for found in trial.bucket.list(trial.prefix)]:
        raise _No("it is not in the list")


def _delete(trial: _Trial) -> None:
    key = trial.put("delete", b"hello")
    for _ in range(2):
        trial.bucket.delete(key)
    if trial.bucket.size(key) is not None:
        raise _No("it is still there")


def _copy(trial: _Trial) -> None:
    source, key = trial.put("source", b"hello"), trial.key("copy")
    trial.bucket.copy(source, key, 5)
    if trial.read(key) != b"hello":
        raise _No("the copy has other bytes")


def _presigned(trial: _Trial) -> None:
    # Signed now and used last, because it has to grow old.
    kept = trial.put("kept", b"hello")
    trial.expiring = (trial.address("get_object", kept, seconds=1), time.monotonic())
    with trial.upload("presigned") as (key, upload_id):
        sent = _ask("PUT", trial.part_address(key, upload_id), b"hello")
        if sent.status_code != 200 or not sent.headers.get("ETag"):
            raise _No(f"a part was answered with {sent.status_code}")
        trial.bucket.complete(key, upload_id, [sent.headers["ETag"]], 5)
    if _ask("GET", trial.address("get_object", key)).content != b"hello":
        raise _No("other bytes came back")


def _presigned_range(trial: _Trial) -> None:
    key = trial.put("part", b"hello")
    answer = _ask("GET", trial.address("get_object", key), headers={"Range": "bytes=1-2"})
    if answer.status_code != 206 or answer.headers.get("Content-Range") != "bytes 1-2/5":
        raise _No(f"the answer is {answer.status_code}")


def _presigned_length(trial: _Trial) -> None:
    with trial.upload("length") as (key, upload_id):
        sent = _ask("PUT", trial.part_address(key, upload_id), b"hello, world")
        if sent.status_code < 400:
            raise _No("more than was announced was taken")


def _presigned_signature(trial: _Trial) -> None:
    here, other = trial.put("here", b"hello"), trial.put("other", b"other")
    address = trial.address("get_object", here)
    if _ask("GET", address.replace(here, other)).status_code < 400:
        raise _No("an address was good for another object")


def _presigned_expiry(trial: _Trial) -> None:
    address, since = trial.expiring
    if not address:
        raise _No("presigned addresses do not work")
    time.sleep(max(0.0, since + 2.5 - time.monotonic()))
    if _ask("GET", address).status_code < 400:
        raise _No("one was good after its time")


def _short(trial: _Trial) -> None:
    key = trial.key("short")
    address = urlsplit(
        trial.bucket.client.generate_presigned_url("put_object", trial.bucket.at(key))
    )
    connection: http.client.HTTPConnection
    if address.scheme == "https":
        connection = http.client.HTTPSConnection(
            address.netloc, timeout=_TIMEOUT_S, context=ssl.create_default_context()
        )
    else:
        connection = http.client.HTTPConnection(address.netloc, timeout=_TIMEOUT_S)
    with contextlib.closing(connection):
        connection.putrequest("PUT", f"{address.path}?{address.query}")
        connection.putheader("Content-Length", "10")
        connection.endheaders(b"short")
    time.sleep(0.2)
    if trial.bucket.size(key) is not None:
        raise _No("half an object is there")


def _md5(trial: _Trial) -> None:
    wrong = base64.b64encode(hashlib.md5(b"other", usedforsecurity=False).digest()).decode()
    _refused(trial, "md5", ContentMD5=wrong)


def _sha256(trial: _Trial) -> None:
    wrong = base64.b64encode(hashlib.sha256(b"other").digest()).decode()
    _refused(trial, "sha256", ChecksumSHA256=wrong)


def _refused(trial: _Trial, name: str, **checksum: str) -> None:
    at = trial.bucket.at(trial.key(name))
    try:
        trial.bucket.client.put_object(**at, Body=b"hello", **checksum)
    except ERRORS:
        return
    raise _No("they were taken")


def _create_only(trial: _Trial) -> None:
    at = trial.bucket.at(trial.put("create only", b"first"))
    try:
        trial.bucket.client.put_object(**at, Body=b"second", IfNoneMatch="*")
    except ERRORS:
        return
    raise _No("it was overwritten")


def _uploads(trial: _Trial) -> None:
    with trial.upload("uploads") as (key, upload_id):
        trial.bucket.put_part(key, upload_id, 1, b"hello")
        at = trial.bucket.at(key)
        found = trial.bucket.client.list_multipart_uploads(Bucket=at["Bucket"], Prefix=at["Key"])
        if upload_id not in [upload["UploadId"] for upload in found.get("Uploads", [])]:
            raise _No("one is not in the list")


def _part_copy(trial: _Trial) -> None:
    source = trial.put("part source", b"hello")
    with trial.upload("part copy") as (key, upload_id):
        copied = trial.bucket.client.upload_part_copy(
            **trial.bucket.at(key),
            UploadId=upload_id,
            PartNumber=1,
            CopySource=trial.bucket.at(source),
        )
        tag = copied["CopyPartResult"].get("ETag")
        if tag is None:
            raise _No("the store does not say how the part is called")
        trial.bucket.complete(key, upload_id, [tag], 5)
    if trial.read(key) != b"hello":
        raise _No("the copy has other bytes")


def _ask(
    method: str, address: str, content: bytes | None = None, headers: dict[str, str] | None = None
) -> httpx2.Response:
    return httpx2.request(method, address, content=content, headers=headers, timeout=_TIMEOUT_S)


_ATTEMPTS: Mapping[str, Callable[[_Trial], None]] = {
    "put": _put,
    "range": _range,
    "parts": _parts,
    "list": _list,
    "delete": _delete,
    "copy": _copy,
    "presigned": _presigned,
    "presigned signature": _presigned_signature,
    "presigned range": _presigned_range,
    "presigned length": _presigned_length,
    "short": _short,
    "md5": _md5,
    "sha256": _sha256,
    "create only": _create_only,
    "uploads": _uploads,
    "part copy": _part_copy,
    "presigned expiry": _presigned_expiry,
}
