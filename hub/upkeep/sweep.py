"""What goes by itself when its time is over: promises to keep bytes, unfinished uploads, trash."""

import logging
from collections.abc import Callable
from datetime import timedelta

from sqlalchemy import CursorResult, Delete, delete
from sqlmodel import col

from hub.context import DAY_S, Hub
from hub.db import now
from hub.errors import HubError
from hub.hf.lfs_parts import drop_expired
from hub.repos.models import Blob, BlobState, Hold
from hub.upkeep import gc
from hub.upkeep.manifests import write_missing, write_recent
from hub.webhooks.queue import sweep as forget_old

log = logging.getLogger(__name__)

EVERY_S = 60.0
# As long as the trash keeps bytes, and longer than any upload takes from its bytes to its row.
REMEMBER = timedelta(hours=24)


def sweep(hub: Hub) -> dict[str, int]:
    """Everything that is over, by kind: how many there were."""
    swept = {"temporary files": hub.store.sweep(DAY_S)}
    return swept | {what: step(hub) for what, step in SWEEPS.items()}


def keep_up(hub: Hub, minute: int) -> None:
    """What a running hub does at its start (minute 0), and every minute and hour after it."""
    hour, rest = divmod(minute, 60)
    if rest:
        _try(lambda: write_recent(hub))
        return
    _try(lambda: sweep(hub))
    _try(lambda: write_missing(hub))
    every = hub.settings.gc_every_hours
    if every and hour and hour % every == 0:
        _try(lambda: gc.collect(hub, gc.plan(hub)))


def _try(step: Callable[[], object]) -> None:
    try:
        step()
    except HubError as error:
        log.warning("upkeep: %s", error.message)
    except Exception:  # a hub that cannot clean up still serves; the next hour tries again
        log.exception("upkeep failed")


def _holds(hub: Hub) -> int:
    return _delete(hub, delete(Hold).where(col(Hold.expires_at) < now()))


def _removed(hub: Hub) -> int:
    """Rows of bytes that are gone, once no upload can remember them as present."""
    gone = delete(Blob).where(
        col(Blob.state) == BlobState.DELETING, col(Blob.condemned_at) < now() - REMEMBER
    )
    return _delete(hub, gone)


def _delete(hub: Hub, statement: Delete) -> int:
    with hub.db.write() as session:
        done = session.execute(statement)
        assert isinstance(done, CursorResult)
        return done.rowcount


# Add to it what comes later.
SWEEPS: dict[str, Callable[[Hub], int]] = {
    "uploads in parts": drop_expired,
    "expired holds": _holds,
    "rows of collected blobs": _removed,
    "old webhook deliveries": forget_old,
}
