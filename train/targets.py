"""The two kinds of places a result can be published to: a hub's repo, and an S3 prefix."""

import hashlib
import mimetypes
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from botocore.exceptions import BotoCoreError, ClientError
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from train.errors import CannotPublish
from train.manifest import MANIFEST, Entry
from train.s3 import ERRORS, reason, s3_client

CHUNK = 2**20


@dataclass(frozen=True, slots=True)
class HubTarget:
    """A repo on a hub that speaks the Hugging Face protocol.

    Its evidence is the SHA-256 (large files) or git id (small ones) of what the hub received.
    A refusal is huggingface_hub's own error.
    """

    api: HfApi
    repo: str
    private: bool = False

    @property
    def name(self) -> str:
        return f"{self.api.endpoint}/{self.repo}"

    def check(self) -> None:
        who = self.api.whoami()
        if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise CannotPublish(self.name, "your token may only read; use one with write scope")
        mine = {who["name"], *(org["name"] for org in who.get("orgs", []))}
        if self.repo.partition("/")[0] not in mine:
            # Only the hub knows whether this user may write in somebody else's namespace.
            self._create()

    def manifest(self) -> str | None:
        try:
            path = self.api.hf_hub_download(self.repo, MANIFEST)
        except (RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
            return None
        return Path(path).read_text(encoding="utf-8")

    def held(self, folder: Path, files: Mapping[str, Entry]) -> set[str]:
        try:
            found = self.api.get_paths_info(self.repo, list(files))
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return set()
        return {
            file.path
            for file in found
            if isinstance(file, RepoFile) and _is_same(file, folder, files[file.path])
        }

    def send(self, folder: Path, paths: list[str]) -> None:
        self._create()
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(path, folder / path) for path in paths
        ]
        if self.manifest() is not None:
            operations.append(CommitOperationDelete(MANIFEST))
        self.api.create_commit(self.repo, operations, commit_message=f"Upload {len(paths)} files")

    def register(self, manifest: str, stale: list[str]) -> None:
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(MANIFEST, manifest.encode()),
            *(CommitOperationDelete(path) for path in stale),
        ]
        self.api.create_commit(self.repo, operations, commit_message="Register the manifest")

    def _create(self) -> None:
        self.api.create_repo(self.repo, private=self.private, exist_ok=True)


def _is_same(remote: RepoFile, folder: Path, entry: Entry) -> bool:
    if remote.lfs is not None:
        return bool(remote.lfs.sha256 == entry.sha256)
    if remote.size != entry.size:
        return False
    data = (folder / remote.path).read_bytes()
    return bool(remote.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())


@dataclass(frozen=True, slots=True)
class S3Target:
    """Objects under one prefix of a bucket.

    Stores differ in which checksums they verify and keep, so the evidence is the bytes themselves,
    read back and hashed.
    The client is that of train.s3.
    """

    client: Any
    bucket: str
    prefix: str

    @property
    def name(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def check(self) -> None:
        """Write, read and remove a small object."""
        key = self._key(f".probe-{secrets.token_hex(8)}")
        with self._explained():
            self.client.put_object(Bucket=self.bucket, Key=key, Body=b"probe")
            body = self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
            self.client.delete_object(Bucket=self.bucket, Key=key)
        if body != b"probe":
            raise CannotPublish(self.name, "does not give back what is written to it")

    def manifest(self) -> str | None:
        with self._explained():
            body = self._body(MANIFEST)
            return None if body is None else body.read().decode("utf-8", "replace")

    def held(self, folder: Path, files: Mapping[str, Entry]) -> set[str]:
        with self._explained():
            return {path for path, entry in files.items() if self._digest(path) == entry.sha256}

    def send(self, folder: Path, paths: list[str]) -> None:
        with self._explained():
            self.client.delete_object(Bucket=self.bucket, Key=self._key(MANIFEST))
            for path in paths:
                with (folder / path).open("rb") as file:
                    self._put(path, file)

    def register(self, manifest: str, stale: list[str]) -> None:
        with self._explained():
            self._put(MANIFEST, manifest.encode())
            for path in stale:
                self.client.delete_object(Bucket=self.bucket, Key=self._key(path))

    def _put(self, path: str, body: Any) -> None:
        kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
        self.client.put_object(Bucket=self.bucket, Key=self._key(path), Body=body, ContentType=kind)

    def _digest(self, path: str) -> str | None:
        body = self._body(path)
        if body is None:
            return None
        digest = hashlib.sha256()
        for chunk in body.iter_chunks(CHUNK):
            digest.update(chunk)
        return digest.hexdigest()

    def _body(self, path: str) -> Any | None:
        try:
            return self.client.get_object(Bucket=self.bucket, Key=self._key(path))["Body"]
        except ClientError as error:
            if error.response["Error"]["Code"] == "NoSuchKey":
                return None
            raise

    def _key(self, path: str) -> str:
        return f"{self.prefix}/{path}".lstrip("/")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """The store's error as one sentence."""
        try:
            yield
        except ERRORS as error:
            raise CannotPublish(self.name, reason(error)) from error


def s3_target(url: str, name: str) -> S3Target:
    """The place `s3://bucket/prefix/NAME/`: a folder of its own, so that runs share a prefix."""
    parts = urlsplit(url)
    if parts.scheme != "s3" or not parts.netloc or parts.query or parts.fragment:
        raise CannotPublish(url, "is not an address like s3://bucket/prefix")
    prefix = "/".join([*parts.path.strip("/").split("/"), name]).lstrip("/")
    try:
        client = s3_client()
    except (BotoCoreError, ValueError) as error:
        raise CannotPublish(url, " ".join(str(error).split())) from error
    return S3Target(client, parts.netloc, prefix)
