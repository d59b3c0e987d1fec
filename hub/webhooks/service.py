"""A user's webhooks: making, changing and removing them, and the log of their deliveries."""

import secrets
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from sqlalchemy import func, update
from sqlmodel import Session, col, select

from hub.audit import record
from hub.db import now
from hub.errors import BadField, BadRequest, WebhookNotFound
from hub.mirror.upstream import is_public
from hub.repos.models import Event
from hub.users.models import User
from hub.webhooks.models import Delivery, DeliveryState, Domain, Webhook

MAX_OF_USER = 50
MAX_URL = 2000
MAX_SECRET = 256
PAGE = 100
Items = Sequence[dict[str, str]]


def listed(session: Session, user: User) -> list[Webhook]:
    """Oldest first."""
    query = select(Webhook).where(Webhook.user_id == user.id).order_by(col(Webhook.id))
    return list(session.exec(query))


def get(session: Session, user: User, key: str, *, to_change: bool = False) -> Webhook:
    """WebhookNotFound for those of others too."""
    query = select(Webhook).where(Webhook.key == key, Webhook.user_id == user.id)
    found = session.exec(query.with_for_update() if to_change else query).first()
    if found is None:
        raise WebhookNotFound("there is no such webhook of yours")
    return found


def create(
    session: Session,
    user: User,
    *,
    url: str,
    watched: Items,
    domains: Sequence[Domain],
    secret: str | None,
    allow_private: bool,
) -> Webhook:
    """BadField says which field no webhook can have."""
    assert user.id is not None
    if len(listed(session, user)) >= MAX_OF_USER:
        raise BadRequest(f"a user has at most {MAX_OF_USER} webhooks")
    made = Webhook(
        key=secrets.token_hex(12),
        user_id=user.id,
        url=checked_url(url, allow_private=allow_private),
        secret=_checked_secret(secret),
        watched=list(watched),
        domains=[str(domain) for domain in domains],
        after_event=_listen(session),
    )
    session.add(made)
    session.flush()
    record(session, user.id, "webhook.create", f"{made.key} {_shown(made.url)}")
    return made


def change(
    session: Session,
    user: User,
    key: str,
    *,
    url: str | None,
    watched: Items,
    domains: Sequence[Domain] | None,
    secret: str | None,
    allow_private: bool,
) -> Webhook:
    """What is None stays as it is."""
    found = get(session, user, key, to_change=True)
    if url is not None:
        found.url = checked_url(url, allow_private=allow_private)
    if domains is not None:
        found.domains = [str(domain) for domain in domains]
    if secret is not None:
        found.secret = _checked_secret(secret)
    found.watched = list(watched)
    session.add(found)
    record(session, user.id, "webhook.change", f"{found.key} {_shown(found.url)}")
    return found


def enable(session: Session, user: User, key: str) -> Webhook:
    """It hears of what happens from now on; what it missed can be delivered again from the log."""
    found = get(session, user, key, to_change=True)
    if found.disabled:
        found.after_event = _listen(session)
        found.disabled, found.reason = False, None
        found.failures, found.failing_since, found.not_before = 0, None, now()
        session.add(found)
        record(session, user.id, "webhook.enable", found.key)
    return found


def disable(session: Session, user: User, key: str) -> Webhook:
    """What waits for it is not sent; the log says so."""
    found = get(session, user, key, to_change=True)
    if not found.disabled:
        silence(session, found, None)
        record(session, user.id, "webhook.disable", found.key)
    return found


def silence(session: Session, webhook: Webhook, reason: str | None) -> None:
    """Disable a webhook, for a reason that its owner reads if it was not their own wish."""
    webhook.disabled, webhook.reason = True, reason
    session.add(webhook)
    session.flush()
    session.execute(
        update(Delivery)
        .where(
            col(Delivery.webhook_id) == webhook.id,
            col(Delivery.state) == DeliveryState.WAITING,
        )
        .values(state=DeliveryState.DEAD, finished_at=now(), error="the webhook was disabled")
        .execution_options(synchronize_session=False)
    )


def delete(session: Session, user: User, key: str) -> None:
    found = get(session, user, key, to_change=True)
    session.delete(found)
    record(session, user.id, "webhook.delete", found.key)


def deliveries(
    session: Session, user: User, key: str, before: int | None = None
) -> tuple[Webhook, list[Delivery]]:
    """The webhook and a page of its log, newest first, from below the id `before`."""
    found = get(session, user, key)
    query = select(Delivery).where(Delivery.webhook_id == found.id)
    if before is not None:
        query = query.where(col(Delivery.id) < before)
    return found, list(session.exec(query.order_by(col(Delivery.id).desc()).limit(PAGE)))


def redeliver(session: Session, user: User, key: str, delivery_id: int) -> Delivery:
    """Send one again under the same id; WebhookNotFound, BadRequest while the webhook is off."""
    webhook = get(session, user, key, to_change=True)
    query = select(Delivery).where(Delivery.id == delivery_id, Delivery.webhook_id == webhook.id)
    found = session.exec(query.with_for_update()).first()
    if found is None:
        raise WebhookNotFound("this webhook has no such delivery")
    if webhook.disabled:
        raise BadRequest("the webhook is disabled: enable it first")
    if found.state != DeliveryState.WAITING:
        found.state, found.attempts, found.due_at = DeliveryState.WAITING, 0, now()
        found.status = found.error = found.finished_at = None
        session.add(found)
    return found


def checked_url(url: str, *, allow_private: bool) -> str:
    """BadField unless a webhook may go there; names are looked up when something is sent."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise BadField(f"url: {error}", "url") from error
    schemes = ("https", "http") if allow_private else ("https",)
    is_clean = url.isascii() and url.isprintable() and " " not in url and "\\" not in url
    if parts.scheme not in schemes or not parts.hostname or port == 0 or not is_clean:
        raise BadField(f"url is no address that begins with {schemes[0]}://", "url")
    if len(url) > MAX_URL:
        raise BadField(f"url has more than {MAX_URL} characters", "url")
    if "@" in parts.netloc:
        raise BadField("url holds a user or password; receivers are told by a secret", "url")
    if not allow_private:
        for address in _numeric(parts.hostname):
            if not is_public(address):
                raise BadField(f"url leads to {address}, which is no public address", "url")
    return url


def _numeric(host: str) -> list[str]:
    """The address that a host is a spelling of, decimal and octal ones too; none for a name."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return []
    return [str(item[4][0]).partition("%")[0] for item in found]


def _checked_secret(secret: str | None) -> str | None:
    if not secret:
        return None
    if not (secret.isascii() and secret.isprintable() and secret == secret.strip()):
        raise BadField("secret has characters that no header carries", "secret")
    if len(secret) > MAX_SECRET:
        raise BadField(f"secret has more than {MAX_SECRET} characters", "secret")
    return secret


def _listen(session: Session) -> int:
    """The last event so far; where nobody listened yet, all until now are over."""
    if session.exec(select(Webhook.id).where(col(Webhook.disabled).is_(False))).first() is None:
        session.execute(
            update(Event)
            .where(col(Event.heard_at).is_(None))
            .values(heard_at=now())
            .execution_options(synchronize_session=False)
        )
    return session.exec(select(func.max(Event.id))).one() or 0


def _shown(url: str) -> str:
    """Without the query, which may be a secret."""
    return url.partition("?")[0]
