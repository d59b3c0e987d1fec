"""The routes of webhooks, as huggingface_hub calls them, and the log of deliveries beside them.

A webhook sends on what its owner may read for as long as it is there, so all of them need a token
that may change the account.
"""

from typing import Annotated, Any

from fastapi import Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from hub.deps import AccountDep, HubDep, ReadSession, WriteSession, public_url
from hub.errors import NotImplementedHere, WebhookNotFound
from hub.hf.info import date
from hub.hf.routing import hf_router, next_page
from hub.webhooks import service
from hub.webhooks.models import Delivery, Domain, Watched, Webhook
from hub.webhooks.payload import payload
from hub.webhooks.queue import may_hear

WEBHOOKS = "/api/settings/webhooks"
ONE = WEBHOOKS + "/{webhook_id}"

router = hf_router()


class Item(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    type: Watched
    name: str = Field(min_length=1, max_length=200, pattern=r"^[\w.\-]+(/[\w.\-]+)?$")


class Wish(BaseModel):
    """A change of a webhook; what is not named stays. Unknown fields are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    url: str | None = None
    watched: list[Item] = Field(max_length=100)
    domains: list[Domain] | None = None
    secret: str | None = None
    job: str | None = Field(default=None, alias="jobSourceId")


class NewWish(Wish):
    url: str | None = ""
    domains: list[Domain] | None = list(Domain)


@router.get(WEBHOOKS)
def listed(session: ReadSession, viewer: AccountDep) -> list[dict[str, Any]]:
    return [_webhook(found) for found in service.listed(session, viewer.require_user())]


@router.post(WEBHOOKS)
def create(session: WriteSession, viewer: AccountDep, hub: HubDep, body: NewWish) -> dict[str, Any]:
    _refuse_jobs(body)
    made = service.create(
        session,
        viewer.require_user(),
        url=body.url or "",
        watched=_items(body),
        domains=body.domains or [],
        secret=body.secret,
        allow_private=hub.settings.webhook_private,
    )
    return {"webhook": _webhook(made)}


@router.get(ONE)
def get(session: ReadSession, viewer: AccountDep, webhook_id: str) -> dict[str, Any]:
    return {"webhook": _webhook(service.get(session, viewer.require_user(), webhook_id))}


@router.post(ONE)
def change(
    session: WriteSession, viewer: AccountDep, hub: HubDep, webhook_id: str, body: Wish
) -> dict[str, Any]:
    _refuse_jobs(body)
    changed = service.change(
        session,
        viewer.require_user(),
        webhook_id,
        url=body.url,
        watched=_items(body),
        domains=body.domains,
        secret=body.secret,
        allow_private=hub.settings.webhook_private,
    )
    return {"webhook": _webhook(changed)}


@router.post(ONE + "/enable")
def enable(session: WriteSession, viewer: AccountDep, webhook_id: str) -> dict[str, Any]:
    return {"webhook": _webhook(service.enable(session, viewer.require_user(), webhook_id))}


@router.post(ONE + "/disable")
def disable(session: WriteSession, viewer: AccountDep, webhook_id: str) -> dict[str, Any]:
    return {"webhook": _webhook(service.disable(session, viewer.require_user(), webhook_id))}


@router.delete(ONE)
def delete(session: WriteSession, viewer: AccountDep, webhook_id: str) -> dict[str, Any]:
    service.delete(session, viewer.require_user(), webhook_id)
    return {"success": True}


@router.get(ONE + "/deliveries")
def deliveries(
    request: Request,
    session: ReadSession,
    viewer: AccountDep,
    webhook_id: str,
    cursor: Annotated[int | None, Query(ge=1, lt=2**63)] = None,
) -> Response:
    """The newest first; `payload` is what would be sent now, if the caller may still know of it."""
    user = viewer.require_user()
    webhook, page = service.deliveries(session, user, webhook_id, cursor)
    base = public_url(request)
    items = []
    for found in page:
        is_theirs = may_hear(session, user, found.repo_id, found.document)
        told = payload(session, webhook, found, base) if is_theirs else None
        items.append(_delivery(found) | {"payload": told})
    headers = {}
    if len(page) == service.PAGE:
        headers["Link"] = next_page(request, str(page[-1].id))
    return JSONResponse(items, headers=headers)


@router.post(ONE + "/deliveries/{delivery_id}/redeliver")
def redeliver(
    session: WriteSession, viewer: AccountDep, webhook_id: str, delivery_id: str
) -> dict[str, Any]:
    is_number = delivery_id.isascii() and delivery_id.isdigit() and len(delivery_id) < 19
    if not is_number:
        raise WebhookNotFound("this webhook has no such delivery")
    user = viewer.require_user()
    return _delivery(service.redeliver(session, user, webhook_id, int(delivery_id)))


def _refuse_jobs(body: Wish) -> None:
    if body.job is not None:
        raise NotImplementedHere("webhooks of this hub start no jobs: name a url")


def _items(body: Wish) -> list[dict[str, str]]:
    return [{"type": str(item.type), "name": item.name} for item in body.watched]


def _webhook(found: Webhook) -> dict[str, Any]:
    return {
        "id": found.key,
        "url": found.url,
        "watched": found.watched,
        "domains": found.domains,
        "secret": found.secret,
        "disabled": found.disabled,
        "disabledReason": found.reason,
        "failures": found.failures,
        "createdAt": date(found.created_at),
    }


def _delivery(found: Delivery) -> dict[str, Any]:
    return {
        "id": str(found.id),
        "state": found.state,
        "attempts": found.attempts,
        "status": found.status,
        "error": found.error,
        "createdAt": date(found.created_at),
        "nextAttemptAt": date(found.due_at) if found.finished_at is None else None,
        "finishedAt": date(found.finished_at) if found.finished_at is not None else None,
    }
