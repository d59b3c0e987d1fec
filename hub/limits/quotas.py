"""How many bytes a user or organisation keeps, and the refusal of a commit that would be too much.

What counts is every blob that some commit of the namespace's repos refers to, once, however many
of them do: old commits keep their bytes, and deleting a repo gives them back.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from sqlalchemy import func, text
from sqlmodel import Session, col, select

from hub.audit import record
from hub.errors import BadField, QuotaExceeded
from hub.limits.models import UNLIMITED, Quota
from hub.repos.models import Commit, CommitEntry, Repo
from hub.users.models import Namespace, User

# Of `session.info` in a writing session: the limit of whoever has none of their own.
DEFAULT = "default_quota_bytes"
_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes that a namespace keeps, and may keep; None without a limit."""

    namespace: str
    used_bytes: int
    limit_bytes: int | None
    is_default: bool


def charge(session: Session, key: str, blobs: Mapping[str, int]) -> None:
    """Count `blobs` (digest to bytes), of a commit that is about to be made in the namespace.

    QuotaExceeded before anything is changed. Other commits of the namespace wait from here on, so
    two that fit alone cannot both pass.
    """
    new = _not_here(session, key, blobs)
    if not new:
        return
    quota = _locked(session, key)
    limit = _limit(quota, session.info.get(DEFAULT))
    used = quota.used_bytes + new
    if limit is not None and used > limit:
        # The count may hold what was deleted since; only a true one refuses.
        quota.used_bytes = count(session, key)
        used = quota.used_bytes + new
        if used > limit:
            raise _exceeded(key, used, limit)
    quota.used_bytes = used
    session.flush()


def settle(session: Session, key: str) -> None:
    """Count a namespace anew after a repo came into it; QuotaExceeded."""
    quota = _locked(session, key)
    limit = _limit(quota, session.info.get(DEFAULT))
    quota.used_bytes = count(session, key)
    if limit is not None and quota.used_bytes > limit:
        raise _exceeded(key, quota.used_bytes, limit)
    session.flush()


def require_room(session: Session, key: str, size: int, default: int | None) -> None:
    """QuotaExceeded where a commit of `size` new bytes would be refused; nothing is reserved.

    Asked before bytes are sent, so that nobody sends them in vain.
    """
    quota = session.get(Quota, key) or Quota(key=key)
    limit = _limit(quota, default)
    if limit is not None and quota.used_bytes + size > limit:
        used = count(session, key) + size
        if used > limit:
            raise _exceeded(key, used, limit)


def require_room_for_sizes(
    session: Session, key: str, sizes: Collection[int], default: int | None
) -> None:
    """As `require_room`, of files of which only the sizes are known: those that one content of each
    size would need, and only of sizes that nothing in the namespace has.

    So nobody is refused who sends again what is here, and not everybody who will be refused.
    """
    quota = session.get(Quota, key) or Quota(key=key)
    limit = _limit(quota, default)
    if limit is None or quota.used_bytes + sum(set(sizes)) <= limit:
        return
    query = (
        select(CommitEntry.size)
        .join(Commit, col(Commit.id) == col(CommitEntry.commit_id))
        .join(Repo, col(Repo.id) == col(Commit.repo_id))
        .where(Repo.namespace_key == key)
        .distinct()
    )
    here: set[int] = set(session.exec(query).all())
    require_room(session, key, sum(set(sizes) - here), default)


def count(session: Session, key: str) -> int:
    """Bytes that the commits of a namespace refer to, each blob once."""
    referred = (
        select(CommitEntry.sha256, CommitEntry.size)
        .join(Commit, col(Commit.id) == col(CommitEntry.commit_id))
        .join(Repo, col(Repo.id) == col(Commit.repo_id))
        .where(Repo.namespace_key == key)
        .distinct()
        .subquery()
    )
    return int(session.exec(select(func.coalesce(func.sum(referred.c.size), 0))).one())


def usage(session: Session, key: str, default: int | None) -> Usage:
    """What a namespace keeps, counted now."""
    quota = session.get(Quota, key)
    own = quota.limit_bytes if quota is not None else None
    limit = _limit(quota or Quota(key=key), default)
    return Usage(key, count(session, key), limit, is_default=own is None)


def usages(session: Session, default: int | None) -> Iterator[Usage]:
    """Of every namespace that keeps something or has a limit of its own, by name."""
    for key in session.exec(select(Quota.key).order_by(col(Quota.key))).all():
        yield usage(session, key, default)


def set_limit(session: Session, by: User | None, key: str, limit_bytes: int | None) -> None:
    """UNLIMITED, bytes, or None for the default; what is there already stays. BadField."""
    if session.get(Namespace, key) is None:
        raise BadField(f"there is no user or organisation {key!r}", "namespace")
    if limit_bytes is not None and not UNLIMITED <= limit_bytes < 2**63:
        raise BadField("a quota is a number of bytes from 0 on", "limit_bytes")
    _locked(session, key).limit_bytes = limit_bytes
    what = {None: "default", UNLIMITED: "unlimited"}.get(limit_bytes, f"{limit_bytes} bytes")
    record(session, by.id if by is not None else None, "quota.set", f"{key}: {what}")


def _not_here(session: Session, key: str, blobs: Mapping[str, int]) -> int:
    """Bytes of those that no commit of the namespace refers to."""
    missing = dict(blobs)
    names = list(blobs)
    for start in range(0, len(names), _AT_ONCE):
        some = names[start : start + _AT_ONCE]
        query = (
            select(CommitEntry.sha256)
            .join(Commit, col(Commit.id) == col(CommitEntry.commit_id))
            .join(Repo, col(Repo.id) == col(Commit.repo_id))
            .where(Repo.namespace_key == key, col(CommitEntry.sha256).in_(some))
            .distinct()
        )
        for sha256 in session.exec(query):
            missing.pop(sha256, None)
    return sum(missing.values())


def _locked(session: Session, key: str) -> Quota:
    """The namespace's row, made if need be, and no other transaction's until this one ends."""
    statement = text("INSERT INTO quota (key, used_bytes) VALUES (:key, 0) ON CONFLICT DO NOTHING")
    session.execute(statement, {"key": key})
    query = select(Quota).where(Quota.key == key).with_for_update()
    return session.exec(query.execution_options(populate_existing=True)).one()


def _limit(quota: Quota, default: int | None) -> int | None:
    limit = default if quota.limit_bytes is None else quota.limit_bytes
    return None if limit == UNLIMITED else limit


def _exceeded(key: str, used: int, limit: int) -> QuotaExceeded:
    return QuotaExceeded(
        f"{key} may keep {limit:,} bytes on this hub and would keep {used:,}; delete repos that"
        " are not needed, or ask an administrator for a larger quota"
    )
