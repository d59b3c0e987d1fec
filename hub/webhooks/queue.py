"""Which delivery is sent when: from the outbox to the log.

Deliveries of one repo to one webhook are sent in the order of its events: the oldest that waits
keeps the later ones waiting.
A claim is a lease, so what a dying process was sending is sent again: receivers may hear the same
delivery twice, under the same id.
"""

import base64
import hashlib
import hmac
import json
import random
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import func
from sqlalchemy.orm import aliased
from sqlmodel import Session, col, delete, select

from hub.context import Hub
from hub.db import now, wait_for_others
from hub.repos import permissions
from hub.repos.models import Event, Repo
from hub.users import service as users
from hub.users.models import Scope, User
from hub.users.names import key_of
from hub.users.service import Viewer
from hub.webhooks import service
from hub.webhooks.models import Delivery, DeliveryState, Watched, Webhook
from hub.webhooks.payload import EVENTS, domain_of, payload

# The pauses sum up to 27 hours before, and 34 hours after, they are spread.
MAX_ATTEMPTS = 9
FIRST_PAUSE_S = 30.0
GROWTH = 3.0
SPREAD = 0.25
# Longer than a request may take.
LEASE = timedelta(minutes=2)
# From so many failures in a row on an address rests before the next delivery, whichever it is.
RESTS_FROM = 5
MAX_REST_S = 3600.0
GIVES_UP_AFTER = timedelta(days=1)
MAX_WAITING = 10_000
KEPT = timedelta(days=30)
_AT_ONCE = 200


@dataclass(frozen=True, slots=True)
class Sending:
    """One attempt; `attempt` tells it from a later one that took its place."""

    delivery_id: int
    attempt: int
    url: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Outcome:
    """`error` is None if the receiver took it."""

    status: int | None
    error: str | None


def spread(hub: Hub) -> int:
    """Make deliveries of the events that no webhook has heard of; how many events there were."""
    with hub.db.read() as session:
        if _listening(session) is None or _unheard(session, 1) == []:
            return 0
    with hub.db.write() as session:
        wait_for_others(session.connection(), "webhooks")
        webhooks = list(
            session.exec(
                select(Webhook, User)
                .join(User, col(User.id) == col(Webhook.user_id))
                .where(col(Webhook.disabled).is_(False))
                .order_by(col(Webhook.id))
            )
        )
        events = _unheard(session, _AT_ONCE)
        for event in events:
            for webhook, user in webhooks:
                if not webhook.disabled and _hears(session, webhook, user, event):
                    _add(session, webhook, event)
                if event.kind == "repo.moved" and event.document is not None:
                    _follow(session, webhook, user, event.repo_id, event.document)
            event.heard_at = now()
            session.add(event)
        return len(events)


def claim(hub: Hub, base: str, limit: int) -> list[Sending]:
    """Deliveries whose time has come, one of each webhook, taken for the length of a lease."""
    with hub.db.read() as session:
        if limit < 1 or not _due(session, 1):
            return []
    with hub.db.write() as session:
        found: dict[int, Sending | None] = {}
        for delivery, webhook in _due(session, limit, lock=True):
            if webhook.id in found or webhook.id is None:
                continue
            found[webhook.id] = _take(session, webhook, delivery, base)
        return [sending for sending in found.values() if sending is not None]


def finish(hub: Hub, sending: Sending, outcome: Outcome) -> None:
    """Write what became of an attempt, unless its lease was over and another one came since."""
    with hub.db.write() as session:
        query = (
            select(Delivery, Webhook)
            .join(Webhook, col(Webhook.id) == col(Delivery.webhook_id))
            .where(Delivery.id == sending.delivery_id, Delivery.attempts == sending.attempt)
            .where(Delivery.state == DeliveryState.WAITING)
            .with_for_update()
        )
        found = session.exec(query).first()
        if found is None:
            return
        delivery, webhook = found
        delivery.status, delivery.error = outcome.status, outcome.error
        if outcome.error is None:
            delivery.state, delivery.finished_at = DeliveryState.DELIVERED, now()
            webhook.failures, webhook.failing_since, webhook.not_before = 0, None, now()
        else:
            _failed(session, webhook, delivery)
        session.add_all([delivery, webhook])


def sweep(hub: Hub) -> int:
    """Forget what was over long ago; how many deliveries."""
    with hub.db.write() as session:
        over = select(Delivery.id).where(col(Delivery.finished_at) < now() - KEPT)
        ids = list(session.exec(over.limit(10_000)))
        session.execute(delete(Delivery).where(col(Delivery.id).in_(ids)))
        return len(ids)


def signature(secret: str, delivery_id: str, timestamp: str, body: bytes) -> str:
    """As Standard Webhooks 1.0.0 says, with the bytes of the secret as the key."""
    content = f"{delivery_id}.{timestamp}.".encode() + body
    digest = hmac.new(secret.encode(), content, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


def pause(attempts: int) -> timedelta:
    """How long to wait after so many attempts, longer each time and never all at once."""
    seconds = FIRST_PAUSE_S * GROWTH ** (attempts - 1)
    return timedelta(seconds=seconds * random.uniform(1, 1 + SPREAD))


def _listening(session: Session) -> int | None:
    return session.exec(select(Webhook.id).where(col(Webhook.disabled).is_(False))).first()


def _unheard(session: Session, limit: int) -> list[Event]:
    query = select(Event).where(col(Event.heard_at).is_(None)).order_by(col(Event.id))
    return list(session.exec(query.limit(limit)))


def _hears(session: Session, webhook: Webhook, user: User, event: Event) -> bool:
    said = event.document
    if said is None or (event.id or 0) <= webhook.after_event:
        return False
    if event.kind not in EVENTS or domain_of(event.kind) not in webhook.domains:
        return False
    is_watched = any(_is_about(item, said) for item in webhook.watched)
    return is_watched and may_hear(session, user, event.repo_id, said)


def _is_about(item: dict[str, str], said: dict[str, Any]) -> bool:
    names = {key_of(f"{said['namespace']}/{said['name']}"), key_of(said.get("moved_from", ""))}
    if item["type"] in (Watched.USER, Watched.ORG):
        return key_of(item["name"]) in {name.partition("/")[0] for name in names}
    return item["type"] == said["type"] and key_of(item["name"]) in names


def _follow(
    session: Session, webhook: Webhook, user: User, repo_id: int, said: dict[str, Any]
) -> None:
    """Go on watching a repo under its new name, if the owner may know it."""
    old, new = key_of(said["moved_from"]), f"{said['namespace']}/{said['name']}"
    watched = [
        item | {"name": new}
        if item["type"] == said["type"] and key_of(item["name"]) == old
        else item
        for item in webhook.watched
    ]
    if watched != webhook.watched and may_hear(session, user, repo_id, said):
        webhook.watched = watched
        session.add(webhook)


def may_hear(session: Session, user: User, repo_id: int, said: dict[str, Any]) -> bool:
    """Whether the owner of a webhook may know of the repo, as it was told of and as it is now."""
    if user.is_disabled:
        return False
    viewer = Viewer(user=user, scope=Scope.READ)
    repo = session.get(Repo, repo_id)
    if repo is not None and not permissions.may_read(session, viewer, repo):
        return False
    namespace, name = said["namespace"], said["name"]
    return not said["private"] or users.may_read_private(session, viewer, namespace, name)


def _add(session: Session, webhook: Webhook, event: Event) -> None:
    assert webhook.id is not None
    assert event.document is not None
    waiting = session.exec(
        select(func.count())
        .select_from(Delivery)
        .where(Delivery.webhook_id == webhook.id, Delivery.state == DeliveryState.WAITING)
    ).one()
    if waiting >= MAX_WAITING:
        service.silence(session, webhook, f"more than {MAX_WAITING} deliveries waited")
        return
    made = Delivery(
        webhook_id=webhook.id, kind=event.kind, repo_id=event.repo_id, document=event.document
    )
    session.add(made)
    session.flush()


def _due(session: Session, limit: int, *, lock: bool = False) -> list[tuple[Delivery, Webhook]]:
    earlier = aliased(Delivery)
    has_earlier = (
        select(earlier.id)
        .where(
            col(earlier.webhook_id) == col(Delivery.webhook_id),
            col(earlier.repo_id) == col(Delivery.repo_id),
            col(earlier.state) == DeliveryState.WAITING,
            col(earlier.id) < col(Delivery.id),
        )
        .exists()
    )
    moment = now()
    query = (
        select(Delivery, Webhook)
        .join(Webhook, col(Webhook.id) == col(Delivery.webhook_id))
        .where(
            Delivery.state == DeliveryState.WAITING,
            col(Delivery.due_at) <= moment,
            col(Webhook.disabled).is_(False),
            col(Webhook.not_before) <= moment,
            ~has_earlier,
        )
        .order_by(col(Delivery.due_at), col(Delivery.id))
        .limit(limit)
    )
    return list(session.exec(query.with_for_update(skip_locked=True) if lock else query))


def _take(session: Session, webhook: Webhook, delivery: Delivery, base: str) -> Sending | None:
    user = session.get_one(User, webhook.user_id)
    if not may_hear(session, user, delivery.repo_id, delivery.document):
        delivery.state, delivery.finished_at = DeliveryState.DEAD, now()
        delivery.error = "the owner of the webhook may not read the repo any more"
        session.add(delivery)
        return None
    assert delivery.id is not None
    delivery.attempts += 1
    delivery.due_at = webhook.not_before = now() + LEASE
    session.add_all([delivery, webhook])
    told = payload(session, webhook, delivery, base)
    body = json.dumps(told, separators=(",", ":")).encode()
    identity, timestamp = str(delivery.id), str(int(time.time()))
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "grafthub webhooks",
        "webhook-id": identity,
        "webhook-timestamp": timestamp,
    }
    if webhook.secret is not None:
        headers["X-Webhook-Secret"] = webhook.secret
        headers["webhook-signature"] = signature(webhook.secret, identity, timestamp, body)
    return Sending(delivery.id, delivery.attempts, webhook.url, headers, body)


def _failed(session: Session, webhook: Webhook, delivery: Delivery) -> None:
    webhook.failures += 1
    webhook.failing_since = webhook.failing_since or now()
    webhook.not_before = now()
    if webhook.failures >= RESTS_FROM:
        rest = FIRST_PAUSE_S * 2.0 ** min(webhook.failures - RESTS_FROM, 20)
        webhook.not_before += timedelta(seconds=min(rest, MAX_REST_S))
    if delivery.attempts < MAX_ATTEMPTS:
        delivery.due_at = now() + pause(delivery.attempts)
        return
    delivery.state, delivery.finished_at = DeliveryState.DEAD, now()
    if now() - webhook.failing_since >= GIVES_UP_AFTER:
        why = f"nothing was taken for a day; the last answer: {delivery.error}"
        service.silence(session, webhook, why)
