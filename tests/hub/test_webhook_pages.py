"""The pages of one's webhooks: making, changing, switching and removing them, and their log."""

from datetime import timedelta
from html import unescape

import pytest
from sqlmodel import select
from starlette.testclient import TestClient

from hub.context import Hub
from hub.db import now
from hub.users.models import Scope
from hub.webhooks.models import Delivery, DeliveryState, Webhook
from tests.hub.conftest import make_user

ALL = "/settings/webhooks"
HTML = {"Accept": "text/html", "Origin": "http://127.0.0.1:8470"}
WISH = {
    "url": "https://ci.example.com/hook?key=1",
    "watched": "acme, eve/ink\ndatasets/eve/faces",
    "domains": ["repo"],
    "secret": "s3cret",
}


@pytest.fixture
def eve(hub: Hub, client: TestClient) -> TestClient:
    """Signed in with a token that may change her account."""
    _, token = make_user(hub, "eve", Scope.ADMIN)
    assert client.post("/login", data={"token": token}).status_code == 303
    return client


def send(client: TestClient, path: str, code: int = 303, **fields: object) -> str:
    answer = client.post(path, data=fields, headers=HTML)
    assert answer.status_code == code, answer.text
    return answer.headers["Location"] if code == 303 else unescape(answer.text)


def see(client: TestClient, path: str) -> str:
    answer = client.get(path, headers=HTML)
    assert answer.status_code == 200, answer.text
    return unescape(answer.text)


def test_a_webhook_is_made_changed_switched_and_deleted(hub: Hub, eve: TestClient) -> None:
    assert "You have no webhook." in see(eve, ALL)
    place = send(eve, ALL, **WISH)
    answer = eve.get(place, headers=HTML)
    assert answer.headers["Cache-Control"] == "private, no-store"
    assert 'value="s3cret"' in answer.text
    assert "acme, eve/ink, datasets/eve/faces" in answer.text
    with hub.db.read() as session:
        made = session.exec(select(Webhook)).one()
    assert [item["type"] for item in made.watched] == ["user", "model", "dataset"]
    assert (made.domains, made.secret) == (["repo"], "s3cret")
    assert WISH["url"] in see(eve, ALL)
    send(eve, place, **WISH | {"watched": "bob", "secret": "", "domains": ["discussion"]})
    assert "its requests are not signed" in see(eve, place)
    send(eve, f"{place}/disable")
    assert "It is off." in see(eve, place)
    send(eve, f"{place}/enable")
    assert "It is off" not in see(eve, place)
    assert send(eve, f"{place}/delete") == ALL
    assert "You have no webhook." in see(eve, ALL)
    assert eve.get(place, headers=HTML).status_code == 404


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("url", "https://127.0.0.1/x", "no public address"),
        ("url", "ftp://a.example", "no address that begins with https://"),
        ("watched", "a/b/c", "a/b/c is no name"),
        ("watched", " ", "Name at least one"),
        ("domains", [], "Choose what it hears of"),
        ("secret", "sch\N{LATIN SMALL LETTER U WITH DIAERESIS}", "no header carries"),
    ],
)
def test_what_no_webhook_can_have_is_named_and_nothing_typed_is_lost(
    eve: TestClient, field: str, value: object, why: str
) -> None:
    place = send(eve, ALL, **WISH)
    kept = {"watched": "typed.example"} if field == "url" else {"url": "https://typed.example"}
    wrong = WISH | {field: value} | kept
    for form in (ALL, place):
        page = send(eve, form, 422, **wrong)
        assert why in page
        assert "typed.example" in page
    assert "typed.example" not in see(eve, place)


def test_webhooks_are_for_who_may_change_the_account_from_a_page_of_ours(
    hub: Hub, client: TestClient
) -> None:
    assert client.get(ALL, headers=HTML).status_code == 401
    _, token = make_user(hub, "bob", Scope.WRITE)
    client.post("/login", data={"token": token})
    assert ALL not in see(client, "/settings")
    assert client.get(ALL, headers=HTML).status_code == 403
    send(client, ALL, 403, **WISH)
    _, token = make_user(hub, "eve", Scope.ADMIN)
    client.post("/login", data={"token": token})
    place = send(client, ALL, **WISH)
    for path in (ALL, place, f"{place}/delete"):
        for headers in ({}, {"Origin": "http://evil.example"}):
            assert client.post(path, data=WISH, headers=headers).status_code == 403
    assert WISH["url"] in see(client, place)


def test_the_log_says_what_was_answered_and_what_comes_next(hub: Hub, eve: TestClient) -> None:
    place = send(eve, ALL, **WISH)
    said = {"type": "model", "namespace": "eve", "name": "ink", "private": False}
    closed = said | {"namespace": "bob", "name": "hidden", "private": True}
    states = [
        (DeliveryState.DELIVERED, 1, 204, None, said),
        (DeliveryState.DEAD, 9, 500, "the receiver answers with status 500", said),
        (DeliveryState.WAITING, 2, None, "no answer within 15 s", said),
        (DeliveryState.WAITING, 0, None, None, said),
        (DeliveryState.DEAD, 0, None, None, closed),
    ]
    with hub.db.write() as session:
        hook = session.exec(select(Webhook)).one()
        for state, attempts, status, error, document in states:
            is_over = state != DeliveryState.WAITING
            session.add(
                Delivery(
                    webhook_id=hook.id or 0,
                    kind="repo.committed",
                    repo_id=1,
                    document=document,
                    state=state,
                    attempts=attempts,
                    status=status,
                    error=error,
                    due_at=now() + timedelta(hours=2, minutes=5),
                    finished_at=now() if is_over else None,
                )
            )
            session.flush()
    page = see(eve, place)
    rows = page.split("<tbody>")[1].split("</tr>")
    assert "a repo you may not see" in rows[0]
    assert "bob/hidden" not in page
    assert "after 3" in rows[1]
    assert "no answer within 15 s" in rows[2]
    assert "next in 2 h " in rows[2]
    assert "Send again" not in rows[2]
    assert "given up" in rows[3]
    assert "after 9 attempts" in rows[3]
    assert "204" in rows[4]
    assert "update repo.content" in rows[4]
    send(eve, f"{place}/deliveries/2/redeliver")
    with hub.db.read() as session:
        again = session.get_one(Delivery, 2)
        assert (again.state, again.attempts) == (DeliveryState.WAITING, 0)
    send(eve, f"{place}/deliveries/99/redeliver", 404)
    send(eve, f"{place}/disable")
    assert "enable it first" in send(eve, f"{place}/deliveries/1/redeliver", 400)
