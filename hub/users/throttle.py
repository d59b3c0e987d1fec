"""Tries to sign in, counted by user and by address, in the database that all servers share."""

import hashlib
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import IPv6Address, ip_address
from math import ceil

from sqlalchemy import delete
from sqlmodel import Session, col

from hub.audit import record
from hub.db import Database, now, wait_for_others
from hub.errors import TooManyTries
from hub.users.models import Tries
from hub.users.names import key_of

WINDOW = timedelta(minutes=15)
PER_USER = 10
PER_ADDRESS = 50


@dataclass(frozen=True, slots=True)
class Keys:
    user: str
    address: str


def keys_of(name: str, address: str) -> Keys:
    """Names are hashed: people type passwords into the wrong field."""
    digest = hashlib.sha256(key_of(name).encode("utf-8", "surrogatepass")).hexdigest()
    return Keys(f"user:{digest}", f"address:{network_of(address)}")


def network_of(address: str) -> str:
    """Whoever has one IPv6 address has the 2^64 beside it."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return address[:100]
    if not isinstance(parsed, IPv6Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(IPv6Address(int(parsed) >> 64 << 64)) + "/64"


def count_try(database: Database, keys: Keys) -> None:
    """One more try, counted before the password is compared: parallel tries count too.

    TooManyTries if this window has no more; what is refused does not lengthen the wait.
    """
    with database.write() as session:
        wait_for_others(session.connection(), "throttle")
        moment = now()
        session.execute(delete(Tries).where(col(Tries.since) < moment - WINDOW))
        user = session.get(Tries, keys.user) or Tries(key=keys.user, n=0, since=moment)
        near = session.get(Tries, keys.address) or Tries(key=keys.address, n=0, since=moment)
        full = [row for row, limit in ((user, PER_USER), (near, PER_ADDRESS)) if row.n >= limit]
        wait_s = max((_seconds_left(row, moment) for row in full), default=0)
        if not full:
            for row, limit in ((user, PER_USER), (near, PER_ADDRESS)):
                row.n += 1
                session.add(row)
                if row.n == limit:
                    record(session, None, "login.throttle", row.key)
    if wait_s > 0:
        raise TooManyTries(f"Too many tries to sign in: wait {_minutes(wait_s)}", wait_s)


def forget(session: Session, key: str) -> None:
    """The right password was given."""
    session.execute(delete(Tries).where(col(Tries.key) == key))


def _seconds_left(row: Tries, moment: datetime) -> int:
    return max(1, ceil((row.since + WINDOW - moment).total_seconds()))


def _minutes(seconds: int) -> str:
    minutes = ceil(seconds / 60)
    return "a minute" if minutes == 1 else f"{minutes} minutes"
