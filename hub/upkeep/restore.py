"""Bringing a hub back from a backup, into an empty place.

Its blobs come first and its catalogue last, so a restore that breaks can be begun again.
The store takes a new identity, so that a catalogue that survived elsewhere does not touch it, and
nothing is collected until a full check has passed.
"""

import shutil
from pathlib import Path

from sqlalchemy import delete, inspect, update
from sqlmodel import Session, col, select

from hub.audit import record
from hub.blobs import durable
from hub.blobs.files import FileBlobStore
from hub.blobs.store import Sha256
from hub.context import Hub, StoreIdentity, open_store
from hub.db import Database, now
from hub.jobs import queue
from hub.migrations import migrate
from hub.repos.models import Blob, BlobState
from hub.settings import Settings
from hub.signing import write_secret
from hub.upkeep.backup import (
    BackupFailed,
    Report,
    Snapshot,
    check_catalogue,
    client_tool,
    copy_blobs,
    run_tool,
    snapshots,
)
from hub.upkeep.stock import hash_of
from hub.users.models import Token


def choose(folder: Path, name: str | None) -> Snapshot:
    """The snapshot of that name, or the latest one; BackupFailed."""
    there = snapshots(folder)
    if not there:
        raise BackupFailed(f"there is no complete snapshot in {folder}")
    found = [snapshot for snapshot in there if name in (None, snapshot.name)]
    if not found:
        raise BackupFailed(f"{folder} has no snapshot {name}; the latest is {there[-1].name}")
    return found[-1]


def restore(
    settings: Settings,
    folder: Path,
    snapshot: Snapshot,
    *,
    revoke_tokens: bool = False,
    report: Report = lambda done, total: None,
) -> list[str]:
    """Make the hub of a snapshot; digests of blobs that the backup lacks. BackupFailed."""
    catalogue = check_catalogue(folder, snapshot)
    data = settings.data_dir
    working = data / "restoring"
    mark = working / "snapshot"
    is_begun = _is_begun(settings, snapshot, catalogue, mark)
    data.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not is_begun:
        shutil.rmtree(working, ignore_errors=True)
        working.mkdir()
        mark.write_text(snapshot.name)
    url = settings.database_url.get_secret_value() if settings.database_url is not None else None
    if url is None:
        shutil.copyfile(catalogue, working / "hub.sqlite3")
    elif not is_begun:
        # In one transaction, which fails where there is anything already.
        run_tool(
            [
                *client_tool("pg_restore", url),
                "--no-owner",
                "--single-transaction",
                "--exit-on-error",
                str(catalogue),
            ],
            url,
        )
    database = Database(working, url)
    try:
        migrate(database)
        with database.read() as session:
            sizes = _sizes(session)
        store = open_store(settings, must_exist=False).store
        store.renew()
        missing = {sha: size for sha, size in sizes.items() if store.size(Sha256(sha)) != size}
        lost = copy_blobs(FileBlobStore(folder / "store"), store, missing, report)
        if settings.secret_key is None and (folder / "secret.key").is_file():
            write_secret(data / "secret.key", (folder / "secret.key").read_text().strip())
        with database.write() as session:
            session.execute(delete(StoreIdentity))
            why = f"this hub was restored from {snapshot.name}"
            session.add(StoreIdentity(store_id=store.id, unchecked=why))
            queue.release_all(session)
            if revoke_tokens:
                valid = col(Token.revoked_at).is_(None)
                session.execute(update(Token).where(valid).values(revoked_at=now()))
            record(session, None, "store.restore", snapshot.name)
    finally:
        database.close()
    if url is None:
        (working / "hub.sqlite3").replace(data / "hub.sqlite3")
        durable.sync_folder(data)
    shutil.rmtree(working)
    return lost


def mend(
    hub: Hub, folder: Path, report: Report = lambda done, total: None
) -> tuple[int, list[str]]:
    """Put back what the hub's store has lost or damaged, which needs every byte of it to be read:
    how many blobs, and which the backup lacks as well."""
    with hub.db.read() as session:
        sizes = _sizes(session)
    bad: dict[str, int] = {}
    done, total = 0, sum(sizes.values())
    for sha256, size in sorted(sizes.items()):
        report(done, total)
        if hash_of(hub.store, Sha256(sha256)) != sha256:
            bad[sha256] = size
        done += size
    lost = copy_blobs(FileBlobStore(folder / "store"), hub.store, bad, report)
    return len(bad) - len(lost), lost


def _sizes(session: Session) -> dict[str, int]:
    query = select(Blob.sha256, Blob.size).where(col(Blob.state) != BlobState.DELETING)
    return dict(session.exec(query).all())


def _is_begun(settings: Settings, snapshot: Snapshot, catalogue: Path, mark: Path) -> bool:
    """Whether the database has the catalogue already, of a restore that broke after it; else there
    is nothing. BackupFailed."""
    kind = "SQLite" if settings.database_url is None else "PostgreSQL"
    if (catalogue.suffix == ".sqlite3") != (settings.database_url is None):
        raise BackupFailed(f"the snapshot's catalogue is {catalogue.name}, and the hub's is {kind}")
    is_begun = False
    if settings.database_url is None:
        there = (settings.data_dir / "hub.sqlite3").exists()
        where = str(settings.data_dir)
    else:
        database = Database(settings.data_dir, settings.database_url.get_secret_value())
        try:
            there = bool(inspect(database.writer).get_table_names())
            if there and mark.is_file() and mark.read_text() == snapshot.name:
                with database.read() as session:
                    # The last step gives it the new identity.
                    of = session.exec(select(StoreIdentity.store_id)).first()
                is_begun = of == snapshot.store_id
        finally:
            database.close()
        where = "the database"
    if there and not is_begun:
        raise BackupFailed(f"there is a hub in {where} already; restore into an empty place")
    return is_begun
