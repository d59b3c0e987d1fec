"""What an operator wants to know before trusting a hub with files; reads, and changes nothing.

A hub may be running meanwhile. Of a bucket it tries throw-away objects, which it removes.
"""

import importlib.util
import os
import platform
import shutil
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryFile

from sqlalchemy import text
from sqlmodel import func, select

from hub.context import Hub, look_into_hub
from hub.db import now
from hub.errors import CannotStart, HubError
from hub.repos.models import Event
from hub.settings import GiB, MiB, Settings

# Without locks and orders of writes that a database needs; the kinds that mountinfo knows.
SHARED = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "virtiofs", "ceph", "glusterfs"}
SKEW = timedelta(seconds=30)
_DURABLE = ("fsync", "synchronous_commit")


class Level(StrEnum):
    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Finding:
    check: str
    level: Level
    message: str


def examine(settings: Settings) -> Iterator[Finding]:
    """Every check in its order; a check that cannot be made is a finding too."""
    yield from _program()
    yield from _data_folder(settings)
    yield from _addresses(settings)
    yield from _sqlite(settings)
    yield from _catalogue_and_store(settings)
    if settings.s3_bucket is not None:
        yield from _bucket(settings)


def _program() -> Iterator[Finding]:
    python = f"Python {platform.python_version()} on {platform.system()} {platform.release()}"
    yield Finding("program", Level.OK, python)
    if importlib.util.find_spec("torch") is None:
        yield Finding(
            "engine", Level.WARNING, "torch is not installed: merges, bakes and reports will fail"
        )
    else:
        yield Finding("engine", Level.OK, "torch is installed, for jobs")
    yield Finding("browser", Level.OK, "none is needed here; only the tests use Chromium")


def _data_folder(settings: Settings) -> Iterator[Finding]:
    folder = settings.data_dir
    if not folder.is_dir():
        there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        if not there.is_dir():
            yield Finding("data folder", Level.FAILED, f"{there} is a file")
            return
        if not os.access(there, os.W_OK | os.X_OK):
            said = f"{folder} is not there, and this user cannot make it in {there}"
            yield Finding("data folder", Level.FAILED, said)
            return
        yield Finding(
            "data folder", Level.NOTE, f"{folder} is not there yet; the first start makes it"
        )
        folder = there
    elif not os.access(folder, os.W_OK | os.X_OK):
        yield Finding("data folder", Level.FAILED, f"this user cannot write to {folder}")
        return
    else:
        yield Finding("data folder", Level.OK, str(folder.resolve()))
    yield _file_system(folder)
    yield from _one_file_system(settings)
    yield _space(folder, settings.min_free_bytes)
    yield from _clock(folder)
    for name in ("secret.key", "admin.token"):
        path = settings.data_dir / name
        if os.name == "posix" and path.is_file() and path.stat().st_mode & 0o077:
            yield Finding("secrets", Level.FAILED, f"others can read {path}: chmod 600 {path}")
    folder = settings.data_dir
    if os.name == "posix" and folder.is_dir() and folder.stat().st_mode & 0o007:
        said = f"every user of this machine can read private repos in {folder}: chmod 750 {folder}"
        yield Finding("secrets", Level.WARNING, said)


def _file_system(folder: Path) -> Finding:
    kind = file_system_of(folder)
    if kind is None:
        return Finding("file system", Level.NOTE, "this system does not say of which kind it is")
    if kind in SHARED or kind.startswith("fuse."):
        return Finding(
            "file system",
            Level.FAILED,
            f"{kind}: neither SQLite nor the lock of a hub can be trusted there; use a local disk",
        )
    if kind in ("tmpfs", "ramfs", "overlay"):
        return Finding(
            "file system", Level.WARNING, f"{kind}: what is on it may not outlive a restart"
        )
    return Finding("file system", Level.OK, kind)


def file_system_of(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str | None:
    """Its kind, as Linux names it; None elsewhere. proc_pid_mountinfo(5)."""
    if not mounts.exists():
        return None
    best, kind = Path(), None
    for line in mounts.read_text(errors="replace").splitlines():
        before, _, after = line.partition(" - ")
        where = Path(before.split()[4].encode().decode("unicode_escape"))
        if folder.resolve().is_relative_to(where) and len(where.parts) >= len(best.parts):
            best, kind = where, after.split()[0]
    return kind


def _one_file_system(settings: Settings) -> Iterator[Finding]:
    folders = [settings.data_dir / "store" / name for name in ("tmp", "blobs", "parts", "trash")]
    there = [path for path in folders if path.is_dir()]
    if len({path.stat().st_dev for path in there}) > 1:
        names = ", ".join(str(path) for path in there)
        yield Finding("file system", Level.FAILED, f"these must be on one file system: {names}")


def _space(folder: Path, reserve: int) -> Finding:
    usage = shutil.disk_usage(folder)
    said = f"{usage.free / GiB:.1f} GiB free of {usage.total / GiB:.1f} GiB"
    if usage.free <= reserve:
        reason = f"{said}: uploads are refused below {reserve / MiB:.0f} MiB"
        return Finding("free space", Level.FAILED, reason)
    if usage.free < usage.total / 20:
        return Finding("free space", Level.WARNING, said)
    return Finding("free space", Level.OK, said)


def _clock(folder: Path) -> Iterator[Finding]:
    """Against the clock of the file system, which on a network is another machine's."""
    if not os.access(folder, os.W_OK):
        return
    with TemporaryFile(dir=folder) as file:
        file.write(b"now")
        file.flush()
        skew = abs(os.fstat(file.fileno()).st_mtime - time.time())
    yield _skew("the file system", timedelta(seconds=skew))


def _skew(whose: str, skew: timedelta) -> Finding:
    if abs(skew) > SKEW:
        said = f"this machine and {whose} differ by {abs(skew).total_seconds():.0f} s"
        return Finding("clock", Level.FAILED, said)
    return Finding("clock", Level.OK, f"this machine and {whose} agree")


def _addresses(settings: Settings) -> Iterator[Finding]:
    if settings.public_url is None:
        yield Finding(
            "address", Level.NOTE, "GRAFT_PUBLIC_URL is not set: only this machine is served"
        )
    elif not settings.public_url.startswith("https://"):
        said = f"{settings.public_url}: tokens and files go over the network in the clear"
        yield Finding("address", Level.WARNING, said)
    else:
        yield Finding("address", Level.OK, settings.public_url)


def _sqlite(settings: Settings) -> Iterator[Finding]:
    if settings.database_url is not None:
        return
    version = sqlite3.sqlite_version
    if can_corrupt(sqlite3.sqlite_version_info):
        said = (
            f"{version} can corrupt a database when two connections write at once (fixed in 3.51.3);"
            " a hub has only one that writes: let no other program write to hub.sqlite3"
        )
        yield Finding("SQLite", Level.WARNING, said)
    else:
        yield Finding("SQLite", Level.OK, version)


def can_corrupt(version: tuple[int, int, int]) -> bool:
    """The WAL-reset bug; sqlite.org/wal.html, fixed in 3.51.3 and in 3.44.6 and 3.50.7."""
    if version[:2] == (3, 44):
        return version < (3, 44, 6)
    if version[:2] == (3, 50):
        return version < (3, 50, 7)
    return (3, 7, 0) <= version <= (3, 51, 2)


def _catalogue_and_store(settings: Settings) -> Iterator[Finding]:
    url = settings.database_url
    if url is None and not (settings.data_dir / "hub.sqlite3").is_file():
        yield Finding("catalogue", Level.NOTE, "there is none yet; the first start makes it")
        return
    try:
        with look_into_hub(settings) as hub:
            yield Finding("catalogue", Level.OK, "it can be read and has this version's schema")
            yield from _database(hub)
            yield Finding("store", Level.OK, f"it is the catalogue's own, {hub.store.id}")
            yield from _stored_events(hub)
    except CannotStart as error:
        yield Finding("catalogue", Level.FAILED, error.message)


def _database(hub: Hub) -> Iterator[Finding]:
    if hub.db.is_sqlite:
        return
    with hub.db.read() as session:
        version, checksums, *durable = (
            str(session.execute(text(f"SHOW {name}")).scalar_one())
            for name in ("server_version", "data_checksums", *_DURABLE)
        )
        theirs = session.execute(text("SELECT clock_timestamp()")).scalar_one()
    yield Finding(
        "PostgreSQL", Level.OK if int(version.split(".")[0]) >= 15 else Level.WARNING, version
    )
    for name, value in zip(_DURABLE, durable, strict=True):
        if value != "off":
            continue
        said = f"{name} is off: what was acknowledged can be lost with the power"
        yield Finding("PostgreSQL", Level.FAILED, said)
    if checksums == "off":
        yield Finding("PostgreSQL", Level.NOTE, "data checksums are off (pg_checksums --enable)")
    yield _skew("the database", now() - theirs)


def _stored_events(hub: Hub) -> Iterator[Finding]:
    with hub.db.read() as session:
        last = session.exec(select(func.max(Event.created_at))).one()
    if isinstance(last, datetime) and last - now() > SKEW:
        said = f"the catalogue's last change is from {last:%Y-%m-%d %H:%M}, which is in the future"
        yield Finding("clock", Level.FAILED, said)


def _bucket(settings: Settings) -> Iterator[Finding]:
    from hub.blobs.bucket import Bucket, make_client
    from hub.blobs.probe import MUST, TOLD, USED, probe

    public = settings.s3_public_endpoint
    try:
        client = make_client(settings.s3_endpoint, settings.s3_region)
        presigner = make_client(public, settings.s3_region) if public is not None else None
        bucket = Bucket(client, settings.s3_bucket or "", settings.s3_prefix)
        found = probe(bucket, presigner, public)
    except HubError as error:
        yield Finding("bucket", Level.FAILED, error.message)
        return
    yield Finding("bucket", Level.OK, found.where)
    if public is None:
        yield Finding(
            "bucket", Level.NOTE, "GRAFT_S3_PUBLIC_ENDPOINT is not set: all bytes pass here"
        )
    for meanings, level in ((MUST, Level.FAILED), (USED, Level.WARNING), (TOLD, Level.NOTE)):
        for name, meaning in meanings.items():
            if name in found.failures:
                yield Finding("bucket", level, f"not true: {meaning} ({found.failures[name]})")
            elif public is not None or not name.startswith("presigned"):
                yield Finding("bucket", Level.OK, meaning)
