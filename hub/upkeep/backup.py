"""Copying a hub that may be running: the catalogue first, then every blob that it names.

Blobs are never changed, and one that nothing refers to is kept longer than a copy takes
(`hub.upkeep.gc`), so every row of the copied catalogue finds its bytes.

    <folder>/store/                    the blobs, shared by all snapshots
    <folder>/snapshots/<time>.sqlite3  a catalogue, or `.pgdump` of PostgreSQL
    <folder>/snapshots/<time>.json     written last: without it there is no such snapshot
    <folder>/secret.key
"""

import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import URL
from sqlalchemy.engine import make_url
from sqlmodel import col, select

from hub.blobs import durable
from hub.blobs.files import FileBlobStore
from hub.blobs.store import BlobStore, Sha256
from hub.context import Hub
from hub.db import now
from hub.errors import BadUpload, Conflict, DigestMismatch
from hub.repos.models import Blob, BlobState
from hub.signing import write_secret
from hub.upkeep import last_backup

Report = Callable[[int, int], None]
FORMAT = 1


class BackupFailed(Conflict):
    """No snapshot was made, or none can be read."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One backup; `lost` are blobs that the hub itself had lost or damaged when it was made."""

    name: str
    at: datetime
    catalogue: str
    sha256: str
    store_id: str
    blobs: int
    copied: int
    lost: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "name": self.name,
            "at": self.at.isoformat(),
            "catalogue": self.catalogue,
            "sha256": self.sha256,
            "store_id": self.store_id,
            "blobs": self.blobs,
            "copied": self.copied,
            "lost": list(self.lost),
        }


def backup(hub: Hub, folder: Path, report: Report = lambda done, total: None) -> Snapshot:
    """A new snapshot in `folder`, with those blobs that it does not have yet. BackupFailed."""
    at = now()
    name = f"{at:%Y%m%dT%H%M%S}{at.microsecond // 1000:03d}Z"
    snapshots = folder / "snapshots"
    snapshots.mkdir(parents=True, exist_ok=True, mode=0o700)
    store = FileBlobStore(folder / "store")
    if store.id == hub.store.id:
        raise BackupFailed(f"{folder} is the hub's own folder")
    copy = _copy_sqlite if hub.db.is_sqlite else _dump_postgresql
    catalogue = copy(hub, snapshots / name)
    # Read after the copy was made: it has every row of the copy, and none is removed in a hurry.
    with hub.db.read() as session:
        query = select(Blob.sha256, Blob.size).where(col(Blob.state) != BlobState.DELETING)
        sizes = dict(session.exec(query).all())
    new = {sha256: size for sha256, size in sizes.items() if store.size(Sha256(sha256)) != size}
    lost = copy_blobs(hub.store, store, new, report)
    if hub.settings.secret_key is None:
        key = (hub.settings.data_dir / "secret.key").read_text().strip()
        write_secret(folder / "secret.key", key)
    snapshot = Snapshot(
        name,
        at,
        catalogue.name,
        _hash(catalogue),
        hub.store.id,
        len(sizes),
        len(new) - len(lost),
        tuple(lost),
    )
    _write_whole(snapshots / f"{name}.json", json.dumps(snapshot.to_json(), indent=2).encode())
    if not lost:
        last_backup.remember(hub.settings, at, folder.resolve())
    return snapshot


def snapshots(folder: Path) -> list[Snapshot]:
    """The complete ones, oldest first."""
    return [_read(path) for path in sorted((folder / "snapshots").glob("*.json"))]


def check_catalogue(folder: Path, snapshot: Snapshot) -> Path:
    """The catalogue of a snapshot, byte for byte as it was written; BackupFailed."""
    path = folder / "snapshots" / snapshot.catalogue
    if not path.is_file() or _hash(path) != snapshot.sha256:
        raise BackupFailed(f"{path} is damaged or missing; take another snapshot")
    return path


def copy_blobs(
    source: BlobStore, target: BlobStore, sizes: dict[str, int], report: Report
) -> list[str]:
    """Blobs, hashed on their way; those that the source has lost or damaged."""
    done, total = 0, sum(sizes.values())
    lost = []
    for sha256, size in sorted(sizes.items()):
        report(done, total)
        try:
            target.put(source.open(Sha256(sha256)), expected=Sha256(sha256), size=size)
        except (FileNotFoundError, DigestMismatch, BadUpload):
            lost.append(sha256)
        done += size
    report(total, total)
    return lost


def client_tool(name: str, url: str) -> Iterator[str]:
    """The beginning of a command of PostgreSQL's client tools; its password is not in it."""
    tool = shutil.which(name)
    if tool is None:
        raise BackupFailed(f"{name} of PostgreSQL's client tools is needed, and not on the PATH")
    parsed = make_url(url)
    plain = URL.create(
        "postgresql",
        username=parsed.username,
        host=parsed.host,
        port=parsed.port,
        database=parsed.database,
        query=parsed.query,
    )
    yield tool
    yield f"--dbname={plain.render_as_string(hide_password=False)}"


def run_tool(command: list[str], url: str) -> None:
    """BackupFailed with what the tool said."""
    password = make_url(url).password
    environment = os.environ | ({"PGPASSWORD": str(password)} if password else {})
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        what = done.stderr.strip().splitlines()
        raise BackupFailed(f"{Path(command[0]).name} failed: {what[-1] if what else 'no message'}")


def _copy_sqlite(hub: Hub, stem: Path) -> Path:
    """SQLite's online backup, checked and made durable."""
    final, temporary = stem.with_suffix(".sqlite3"), stem.with_suffix(".tmp")
    source = hub.settings.data_dir / "hub.sqlite3"
    with (
        closing(sqlite3.connect(f"{source.resolve().as_uri()}?mode=ro", uri=True)) as reading,
        closing(sqlite3.connect(temporary)) as writing,
    ):
        reading.backup(writing)
        writing.execute("PRAGMA journal_mode=DELETE")  # One file, whatever reads it.
        (answer,) = writing.execute("PRAGMA integrity_check").fetchone()
    if answer != "ok":
        temporary.unlink()
        raise BackupFailed(f"the catalogue is damaged: {answer}")
    _make_durable(temporary, final)
    return final


def _dump_postgresql(hub: Hub, stem: Path) -> Path:
    final, temporary = stem.with_suffix(".pgdump"), stem.with_suffix(".tmp")
    assert hub.settings.database_url is not None
    url = hub.settings.database_url.get_secret_value()
    command = [*client_tool("pg_dump", url), "--format=custom", "--no-owner", f"--file={temporary}"]
    try:
        run_tool(command, url)
    except BackupFailed:
        temporary.unlink(missing_ok=True)
        raise
    _make_durable(temporary, final)
    return final


def _read(path: Path) -> Snapshot:
    try:
        document = json.loads(path.read_text())
        document["at"] = datetime.fromisoformat(document["at"])
        document["lost"] = tuple(document["lost"])
        if document.pop("format") != FORMAT:
            raise ValueError("another version")
        return Snapshot(**document)
    except (ValueError, KeyError, TypeError) as error:
        raise BackupFailed(f"{path} does not describe a snapshot: {error}") from error


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_whole(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(content)
    _make_durable(temporary, path)


def _make_durable(temporary: Path, final: Path) -> None:
    descriptor = os.open(temporary, os.O_RDWR | getattr(os, "O_BINARY", 0))
    try:
        durable.sync_file(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, final)
    durable.sync_folder(final.parent)
