"""The catalogue's database: SQLite with exactly one writer, or PostgreSQL by URL.

SQLite 3.7.0 to 3.51.2 (Debian 12 ships 3.40.1) can corrupt a WAL database when two connections
write or checkpoint at the same time (sqlite.org/wal.html, "WAL-reset bug").
So one connection in one process writes and checkpoints, every other connection is `query_only`,
and a file lock keeps a second server away.
"""

import os
import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from sqlalchemy import (
    Connection,
    DateTime,
    Dialect,
    Engine,
    QueuePool,
    create_engine,
    event,
    text,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.types import TypeDecorator
from sqlmodel import Session, SQLModel

from hub.errors import CannotStart, OutcomeUnknown

T = TypeVar("T")

# Before any table is declared: names that migrations can rely on, on both databases.
SQLModel.metadata.naming_convention = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}

# What a database that is away, or busy for too long, is known by.
UNREACHABLE = (OperationalError, PoolTimeout, OutcomeUnknown)
WRITER_WAIT_S = 30
# Of one process, on SQLite; more reading threads than this only take turns at the interpreter.
READERS = max(8, os.cpu_count() or 1)
MAX_DEADLOCKS = 4
# serialization_failure, deadlock_detected: the other transaction went on, this one left nothing.
_TRY_AGAIN = ("40001", "40P01")
_LATE = "at the end"


class UTCDateTime(TypeDecorator[datetime]):
    """An aware time stamp in UTC; SQLite has no time zones, so its rows are naive UTC."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        assert value.tzinfo is not None, "a time stamp without a time zone"
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)


def now() -> datetime:
    """The present time, aware, in UTC."""
    return datetime.now(UTC)


def why(error: Exception) -> str:
    """What one of `UNREACHABLE` says, in a line: loops that go on meanwhile would fill a log."""
    return str(getattr(error, "orig", None) or error).partition("\n")[0]


class Database:
    """Opened once per process; `read()` and `write()` are the only ways in.

    With `read_only` it needs no lock, so it can be opened beside a running hub; any write fails.
    """

    def __init__(self, data_dir: Path, url: str | None = None, *, read_only: bool = False) -> None:
        self.is_sqlite = url is None
        # What every writing session carries in its own `info`.
        self.info: dict[str, Any] = {}
        self._lock: FileLock | None = None
        if url is None and read_only:
            self._writer = self._reader = _sqlite(data_dir / "hub.sqlite3", writer=False)
        elif url is None:
            self._lock = _take_lock(data_dir / "hub.lock")
            path = data_dir / "hub.sqlite3"
            self._writer = _sqlite(path, writer=True)
            self._reader = _sqlite(path, writer=False)
        else:
            self._writer = _postgresql(url)
            # Else each statement would see another moment, as it does between other writers.
            self._reader = self._writer.execution_options(
                isolation_level="REPEATABLE READ", postgresql_readonly=True
            )

    @contextmanager
    def read(self, *, for_long: bool = False) -> Iterator[Session]:
        """A snapshot of the catalogue; any attempt to write fails.

        On PostgreSQL the server ends it after two idle minutes, unless it is opened `for_long`.
        """
        with Session(self._reader, expire_on_commit=False) as session:
            if for_long and not self.is_sqlite:
                session.execute(text("SET LOCAL statement_timeout = 0"))
                session.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """One transaction, committed when the block ends without an exception.

        On SQLite the next writer waits until this block has ended, from its first statement on:
        no streaming, hashing or network inside.
        On PostgreSQL other writers go on meanwhile: a block that inserts what must be there once
        upserts it, or takes its name with `wait_for_others` first.
        An OperationalError means that nothing was changed; OutcomeUnknown is the exception.
        """
        made = Session(self._writer, expire_on_commit=False, info=self.info)
        with made as session, session.begin():
            yield session
            while late := session.info.pop(_LATE, []):
                for step in late:
                    step(session)
            session.flush()
            if not self.is_sqlite:
                from hub.outcome import commit  # The driver is PostgreSQL's.

                commit(session, self._writer)

    def change(self, steps: Callable[[Session], T]) -> T:
        """`steps` in one `write()`, again where PostgreSQL ended it in favour of another one."""
        for n in range(MAX_DEADLOCKS):
            try:
                with self.write() as session:
                    return steps(session)
            except OperationalError as error:
                if getattr(error.orig, "sqlstate", None) not in _TRY_AGAIN:
                    raise
            # The other one has yet to wake up: at once we would take its row again.
            time.sleep(random.uniform(0.02, 0.05) * 2**n)
        with self.write() as session:
            return steps(session)

    @property
    def writer(self) -> Engine:
        """For migrations only."""
        return self._writer

    def close(self) -> None:
        """Readers first: SQLite does the last checkpoint when its last connection closes."""
        self._reader.dispose()
        self._writer.dispose()
        if self._lock is not None:
            self._lock.release()


def wait_for_others(connection: Connection, what: str) -> None:
    """From here to the end of the transaction nobody else is in one that waited for `what`.

    SQLite's transactions wait for each other anyway.
    """
    if connection.dialect.name == "postgresql":
        lock = text("SELECT pg_advisory_xact_lock(hashtextextended(:what, 0))")
        connection.execute(lock, {"what": what})


def insert_once(session: Session, table: type[SQLModel]) -> sqlite.Insert | postgresql.Insert:
    """An INSERT that can say what happens `on_conflict_…`, in the dialect of the database."""
    if session.get_bind().dialect.name == "sqlite":
        return sqlite.insert(table)
    return postgresql.insert(table)


def at_the_end(session: Session, step: Callable[[Session], None]) -> None:
    """Have `step` done in this `write()` right before its commit.

    For what all writers wait for: they then wait for a moment, and nobody waits for anything else
    while having it, so that no two can wait for each other.
    """
    session.info.setdefault(_LATE, []).append(step)


def _take_lock(path: Path) -> FileLock:
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise CannotStart(f"another hub is running on {path.parent}") from None
    return lock


def _sqlite(path: Path, *, writer: bool) -> Engine:
    engine = create_engine(
        f"sqlite:///{path}",
        poolclass=QueuePool,
        pool_size=1 if writer else READERS,
        # A reader is a file handle: more of them never wait for each other.
        max_overflow=0 if writer else -1,
        pool_timeout=WRITER_WAIT_S,
        connect_args={"check_same_thread": False, "timeout": 5},
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: sqlite3.Connection, record: Any) -> None:
        # The driver would begin (deferred) transactions by itself, and only before writes.
        connection.isolation_level = None
        pragmas = ["foreign_keys=ON", "trusted_schema=OFF", "synchronous=FULL", "mmap_size=0"]
        pragmas += ["journal_mode=WAL"] if writer else ["query_only=ON", "wal_autocheckpoint=0"]
        for pragma in pragmas:
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writer else "BEGIN")

    return engine


def _postgresql(url: str) -> Engine:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        # Not its text, which may hold a password; and without the cause, which quotes it.
        raise CannotStart(
            "GRAFT_DATABASE_URL is no address such as postgresql://user:password@host/name"
        ) from None
    if not parsed.drivername.startswith("postgresql"):
        raise CannotStart(f"GRAFT_DATABASE_URL names {parsed.drivername}; use postgresql://…")
    engine = create_engine(
        parsed.set(drivername="postgresql+psycopg"),
        pool_size=16,
        max_overflow=48,
        pool_timeout=WRITER_WAIT_S,
        pool_pre_ping=True,
        connect_args={
            "connect_timeout": 10,
            "options": "-c statement_timeout=60s -c lock_timeout=20s"
            " -c idle_in_transaction_session_timeout=120s",
        },
    )
    try:
        engine.connect().close()
    except OperationalError as error:
        where = f"{parsed.host or 'the local socket'}:{parsed.port or 5432}"
        reason = str(error.orig).splitlines()[0]
        raise CannotStart(f"cannot reach the database at {where}: {reason}") from error
    return engine
