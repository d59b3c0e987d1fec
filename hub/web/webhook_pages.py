"""One's own webhooks: where they go, what they hear of, and how their deliveries went.

A webhook tells what its owner may read for as long as it is there, so these pages are for logins
that may change the account, as its routes are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, Query, Request
from fastapi.responses import Response
from pydantic import ValidationError
from sqlmodel import Session, select

from hub.context import Hub
from hub.deps import AccountDep, HubDep
from hub.errors import BadField, HubError
from hub.users import service as users
from hub.users.models import Organization, User
from hub.users.names import key_of
from hub.users.service import Viewer
from hub.web.render import refused_page, see_other
from hub.webhooks import service
from hub.webhooks.models import Delivery, DeliveryState, Domain, Watched, Webhook
from hub.webhooks.payload import EVENTS
from hub.webhooks.queue import RESTS_FROM, may_hear
from hub.webhooks.routes import Item

router = APIRouter(prefix="/settings/webhooks", include_in_schema=False, tags=["web"])

MAX_WATCHED = 100
DOMAINS = {
    Domain.REPO: "repos: new ones, commits, settings, moves, deletions",
    Domain.DISCUSSION: "discussions: new ones, pull requests, comments, merges",
}
Url = Annotated[str, Form(max_length=service.MAX_URL * 2)]
Names = Annotated[str, Form(max_length=MAX_WATCHED * 210)]
Secret = Annotated[str, Form(max_length=service.MAX_SECRET * 2)]
Domains = Annotated[list[Domain], Form()]


@router.get("")
def show_all(request: Request, hub: HubDep, viewer: AccountDep) -> Response:
    return _list_page(request, hub, viewer)


def _list_page(
    request: Request,
    hub: Hub,
    viewer: Viewer,
    error: HubError | None = None,
    url: str = "",
    watched: str | None = None,
    secret: str = "",
    domains: list[Domain] | None = None,
) -> Response:
    user = viewer.require_user()
    with hub.db.read() as session:
        return refused_page(
            request,
            "settings_webhooks.html",
            viewer,
            error,
            tab="webhooks",
            manages=viewer.manages,
            webhooks=[(found, _names(found)) for found in service.listed(session, user)],
            url=url,
            watched=user.name if watched is None else watched,
            secret=secret,
            chosen=list(Domain) if domains is None else domains,
            domains=DOMAINS,
            problem=error.message if error is not None else None,
        )


@router.post("")
def create(
    request: Request,
    hub: HubDep,
    viewer: AccountDep,
    url: Url = "",
    watched: Names = "",
    secret: Secret = "",
    domains: Domains = [],  # noqa: B006 - FastAPI copies it
) -> Response:
    try:
        with hub.db.write() as session:
            made = service.create(
                session,
                users.recheck(session, viewer).require_account(),
                url=url.strip(),
                watched=_watched(session, watched),
                domains=_some(domains),
                secret=secret,
                allow_private=hub.settings.webhook_private,
            )
            place = _place(made.key)
    except HubError as error:
        return _list_page(request, hub, viewer, error, url, watched, secret, domains)
    return see_other(place)


@router.get("/{key}")
def show(
    request: Request,
    hub: HubDep,
    viewer: AccountDep,
    key: str,
    before: Annotated[int | None, Query(ge=1, lt=2**63)] = None,
) -> Response:
    """What it is, and the newest of its deliveries, or those before one."""
    return _page(request, hub, viewer, key, before=before)


def _page(
    request: Request,
    hub: Hub,
    viewer: Viewer,
    key: str,
    error: HubError | None = None,
    before: int | None = None,
    typed: dict[str, Any] | None = None,
) -> Response:
    """`typed` is shown in the form in the place of what is kept."""
    user = viewer.require_user()
    with hub.db.read() as session:
        webhook, found = service.deliveries(session, user, key, before)
        answer = refused_page(
            request,
            "settings_webhook.html",
            viewer,
            error,
            tab="webhooks",
            manages=viewer.manages,
            webhook=webhook,
            domains=DOMAINS,
            **(typed or _kept(webhook)),
            place=_place(key),
            deliveries=_rows(session, user, found),
            rests=webhook.failures >= RESTS_FROM,
            older=f"{_place(key)}?before={found[-1].id}" if len(found) == service.PAGE else None,
            problem=error.message if error is not None else None,
        )
    # It shows the secret.
    answer.headers["Cache-Control"] = "private, no-store"
    return answer


def _kept(webhook: Webhook) -> dict[str, Any]:
    return {
        "url": webhook.url,
        "watched": ", ".join(_names(webhook)),
        "secret": webhook.secret or "",
        "chosen": webhook.domains,
    }


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the log: `repo` is None if the user may not know of it any more, `behind` the
    delivery of the same repo that has to go first."""

    delivery: Delivery
    event: str
    repo: str | None
    behind: int | None


def _rows(session: Session, user: User, found: Sequence[Delivery]) -> list[Row]:
    first: dict[int, int | None] = {}
    rows = []
    for delivery in reversed(found):
        said = delivery.document
        is_theirs = may_hear(session, user, delivery.repo_id, said)
        behind = first.get(delivery.repo_id)
        if delivery.state == DeliveryState.WAITING:
            first.setdefault(delivery.repo_id, delivery.id)
        repo = f"{said['namespace']}/{said['name']}" if is_theirs else None
        rows.append(Row(delivery, " ".join(EVENTS[delivery.kind]), repo, behind))
    return rows[::-1]


@router.post("/{key}")
def change(
    request: Request,
    hub: HubDep,
    viewer: AccountDep,
    key: str,
    url: Url = "",
    watched: Names = "",
    secret: Secret = "",
    domains: Domains = [],  # noqa: B006 - FastAPI copies it
) -> Response:
    def steps(session: Session, user: User) -> object:
        return service.change(
            session,
            user,
            key,
            url=url.strip(),
            watched=_watched(session, watched),
            domains=_some(domains),
            secret=secret,
            allow_private=hub.settings.webhook_private,
        )

    typed = {"url": url, "watched": watched, "secret": secret, "chosen": domains}
    return _do(request, hub, viewer, key, steps, typed)


@router.post("/{key}/{turn}")
def switch(
    request: Request,
    hub: HubDep,
    viewer: AccountDep,
    key: str,
    turn: Literal["enable", "disable", "delete"],
) -> Response:
    """Let it hear again, rest, or go."""
    steps = {"enable": service.enable, "disable": service.disable, "delete": service.delete}[turn]
    answer = _do(request, hub, viewer, key, lambda session, user: steps(session, user, key))
    if turn == "delete" and answer.status_code == 303:
        return see_other("/settings/webhooks")
    return answer


@router.post("/{key}/deliveries/{delivery_id}/redeliver")
def redeliver(
    request: Request, hub: HubDep, viewer: AccountDep, key: str, delivery_id: int
) -> Response:
    """Send one again, under the same id."""
    return _do(
        request,
        hub,
        viewer,
        key,
        lambda session, user: service.redeliver(session, user, key, delivery_id),
    )


def _do(
    request: Request,
    hub: Hub,
    viewer: Viewer,
    key: str,
    steps: Callable[[Session, User], object],
    typed: dict[str, Any] | None = None,
) -> Response:
    try:
        with hub.db.write() as session:
            steps(session, users.recheck(session, viewer).require_account())
    except HubError as error:
        return _page(request, hub, viewer, key, error, typed=typed)
    return see_other(_place(key))


def _place(key: str) -> str:
    return f"/settings/webhooks/{key}"


def _names(webhook: Webhook) -> list[str]:
    """What it watches, as `_watched` reads it."""
    prefix = {Watched.DATASET: "datasets/", Watched.SPACE: "spaces/"}
    return [prefix.get(Watched(item["type"]), "") + item["name"] for item in webhook.watched]


def _watched(session: Session, text: str) -> list[dict[str, str]]:
    """Names of users, organisations and repos; those of datasets begin with `datasets/`."""
    names = text.replace(",", " ").split()
    if not names:
        raise BadField("name at least one user, organisation or repo", "watched")
    if len(names) > MAX_WATCHED:
        raise BadField(f"a webhook watches at most {MAX_WATCHED} names", "watched")
    return [_item(session, name) for name in names]


def _item(session: Session, text: str) -> dict[str, str]:
    kind, name = Watched.MODEL, text
    for prefix, other in (("datasets/", Watched.DATASET), ("spaces/", Watched.SPACE)):
        if text.startswith(prefix):
            kind, name = other, text.removeprefix(prefix)
    if kind is Watched.MODEL and "/" not in name:
        query = select(Organization.id).where(Organization.key == key_of(name))
        kind = Watched.USER if session.exec(query).first() is None else Watched.ORG
    try:
        item = Item(type=kind, name=name)
    except ValidationError:
        raise BadField(f"{text} is no name of a user, organisation or repo", "watched") from None
    return {"type": str(item.type), "name": item.name}


def _some(domains: list[Domain]) -> list[Domain]:
    if not domains:
        raise BadField("choose what it hears of: repos, discussions, or both", "domains")
    return domains
