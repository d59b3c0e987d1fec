"""The opened hub: everything a request or a job needs, made once per process."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy.exc import DatabaseError
from sqlmodel import Field, Session, SQLModel, select

from hub.blobs import durable
from hub.blobs.files import FileBlobStore
from hub.blobs.store import BlobStore
from hub.db import Database, wait_for_others
from hub.errors import CannotStart, StoreFailed
from hub.limits import quotas
from hub.repos.downloads import Downloads
from hub.repos.holds import STORE
from hub.settings import Settings
from hub.signing import Signer, secret_in, write_secret
from hub.users import service as users
from hub.users.models import Scope, User
from hub.users.uses import Uses

ADMIN = "admin"
DAY_S = 24 * 3600


class StoreIdentity(SQLModel, table=True):
    """Which blob store this catalogue describes; one row."""

    __tablename__ = "store_identity"

    store_id: str = Field(primary_key=True)
    # Why nothing may be collected, after a restore until a full check has passed.
    unchecked: str | None = None
    # What a store that is not a local folder can do: `hub.blobs.probe.Probe` as JSON.
    probe: str | None = None


@dataclass(frozen=True)
class Hub:
    """`admin_token` is set only by the start that made it, so that it can be printed once."""

    settings: Settings
    db: Database
    store: BlobStore
    signer: Signer
    downloads: Downloads
    admin_token: str | None = None
    uses: Uses = field(default_factory=Uses)

    @property
    def scratch(self) -> Path:
        """Folder for what jobs write before it becomes a blob; a start empties it of what is dead."""
        return self.settings.data_dir / "scratch"

    @property
    def thumbs(self) -> Path:
        """Folder of pictures made from others; may be deleted at any time."""
        return self.settings.data_dir / "thumbs"


@contextmanager
def open_hub(settings: Settings) -> Iterator[Hub]:
    """Make or open the data folder, migrate the catalogue, check that store and catalogue match.

    CannotStart says in one sentence why not.
    """
    from hub.migrations import migrate

    data = settings.data_dir
    try:
        data.mkdir(parents=True, exist_ok=True, mode=0o700)
        (data / "scratch").mkdir(exist_ok=True)
        durable.sync_folder(data.absolute().parent)
    except OSError as error:
        raise CannotStart(f"cannot write to the data folder {data}: {error.strerror}") from error
    url = settings.database_url
    database = Database(data, url.get_secret_value() if url is not None else None)
    try:
        with _readable(settings):
            migrate(database, data / "backups")
        with database.write() as session:
            wait_for_others(session.connection(), "start")
            store = database.info[STORE] = _store(session, settings)
            database.info[quotas.DEFAULT] = settings.quota_bytes
            signer = _signer(settings)
            token = _first_admin(session)
            if token is not None:
                write_secret(data / "admin.token", token)
        # On SQLite the lock says that nobody else uses the folder; servers on PostgreSQL share it.
        try:
            store.sweep(older_than_s=0 if database.is_sqlite else DAY_S)
        except StoreFailed as error:
            raise CannotStart(error.message) from error
        downloads = Downloads()
        hub = Hub(settings, database, store, signer, downloads, token)
        yield hub
        downloads.flush(database)
        hub.uses.flush(database)
    finally:
        database.close()


@contextmanager
def look_into_hub(settings: Settings) -> Iterator[Hub]:
    """A hub that may be running: its catalogue can be read, but not written.

    CannotStart if there is none, or one of another version.
    """
    from hub.migrations import require_current

    data, url = settings.data_dir, settings.database_url
    if url is None and not (data / "hub.sqlite3").is_file():
        raise CannotStart(f"there is no hub in {data}")
    secret = url.get_secret_value() if url is not None else None
    database = Database(data, secret, read_only=True)
    try:
        with _readable(settings):
            require_current(database)
        with database.read() as session:
            store = _store(session, settings)
        yield Hub(settings, database, store, _signer(settings), Downloads())
    finally:
        database.close()


@contextmanager
def _readable(settings: Settings) -> Iterator[None]:
    """CannotStart for a file that is no database, or one that this user may not open."""
    try:
        yield
    except DatabaseError as error:
        where = "" if settings.database_url is not None else f" {settings.data_dir / 'hub.sqlite3'}"
        raise CannotStart(f"cannot open the catalogue{where}: {error.orig}") from error


def _signer(settings: Settings) -> Signer:
    secret = settings.secret_key
    path = settings.data_dir / "secret.key"
    return Signer(secret.get_secret_value() if secret is not None else secret_in(path))


def _store(session: Session, settings: Settings) -> BlobStore:
    """The store this catalogue describes; a repair on the wrong one would remove everything."""
    row = session.exec(select(StoreIdentity)).first()
    if row is None:
        opened = open_store(settings, must_exist=False)
        row = StoreIdentity(store_id=opened.store.id)
    else:
        opened = open_store(settings, must_exist=True, probed=row.probe)
    if row.store_id != opened.store.id:
        raise CannotStart(
            f"the catalogue describes blob store {row.store_id},"
            f" but the one at {opened.where} is {opened.store.id}"
        )
    row.probe = opened.probe
    session.add(row)
    return opened.store


@dataclass(frozen=True, slots=True)
class Opened:
    """A store, how a person finds it, and what its probe found, as JSON."""

    store: BlobStore
    where: str
    probe: str | None = None


def open_store(settings: Settings, *, must_exist: bool, probed: str | None = None) -> Opened:
    """The store that the settings name; `probed` spares a probe if it is about that store."""
    root = settings.data_dir / "store"
    if settings.s3_bucket is None:
        for name in ("s3_prefix", "s3_endpoint", "s3_public_endpoint"):
            if getattr(settings, name):
                raise CannotStart(f"GRAFT_{name.upper()} needs GRAFT_S3_BUCKET")
        if must_exist and not FileBlobStore.is_at(root):
            raise CannotStart(f"the blobs of this catalogue are not at {root}; nothing was changed")
        return Opened(FileBlobStore(root, min_free_bytes=settings.min_free_bytes), str(root))
    # It imports boto3, which others do without.
    from hub.blobs.opening import open_s3

    store, found = open_s3(settings, must_exist=must_exist, probed=probed)
    return Opened(store, str(store.bucket), found)


def _first_admin(session: Session) -> str | None:
    if session.exec(select(User.id)).first() is not None:
        return None
    user = users.create_user(session, ADMIN, admin=True)
    return users.issue_token(session, user, "first start", Scope.ADMIN)
