"""Webhooks by the real client to a real receiver, and where they must not go."""

import base64
import hashlib
import hmac
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import anyio
import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, HfApi, WebhookPayload
from huggingface_hub.errors import HfHubHTTPError
from sqlmodel import select
from starlette.testclient import TestClient

from hub.context import Hub
from hub.db import now
from hub.errors import BadField
from hub.mirror import upstream
from hub.repos import discussions, refs
from hub.repos import service as repos
from hub.users import organizations
from hub.users import service as users
from hub.users.models import Role, Scope
from hub.users.service import Viewer
from hub.webhooks import queue, service
from hub.webhooks.models import Delivery, DeliveryState, Domain, Webhook
from hub.webhooks.sending import post
from tests.fixtures.server import RunningHub, running_hub
from tests.hub.conftest import bearer, both_databases, make_user

BASE = "https://hub.example"
SECRET = "my-secret"


@dataclass
class Receiver:
    """What arrived: headers and body of each request; `statuses` are its next answers, then 200."""

    url: str
    statuses: list[int] = field(default_factory=list)
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    def payloads(self) -> list[WebhookPayload]:
        return [WebhookPayload.model_validate_json(body) for _, body in self.got]

    def wait(self, count: int) -> None:
        until = time.monotonic() + 30
        while len(self.got) < count:
            assert time.monotonic() < until, f"{len(self.got)} of {count} arrived"
            time.sleep(0.02)


@contextmanager
def receiving() -> Iterator[Receiver]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            found.got.append((dict(self.headers), body))
            self.send_response(found.statuses.pop(0) if found.statuses else 200)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found = Receiver(f"http://127.0.0.1:{server.server_port}/hook")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as found:
        yield found


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    folder = tmp_path_factory.mktemp("webhooks")
    with running_hub(folder, webhook_private=True) as hub:
        yield hub


@pytest.fixture
def api(running: RunningHub) -> HfApi:
    return HfApi(endpoint=running.url, token=running.admin_token)


WATCHED = [{"type": "user", "name": "admin"}]


def make(
    hub: Hub,
    viewer: Viewer,
    url: str,
    name: str = "admin",
    domains: tuple[Domain, ...] = (*Domain,),
) -> str:
    with hub.db.write() as session:
        made = service.create(
            session,
            viewer.require_user(),
            url=url,
            watched=[{"type": "user", "name": name}],
            domains=domains,
            secret=SECRET,
            allow_private=True,
        )
        return made.key


def watch(hub: Hub, viewer: Viewer, key: str, model: str) -> None:
    """Let a webhook hear of this model and of a dataset that is not there, and of nothing else."""
    with hub.db.write() as session:
        service.change(
            session,
            viewer.require_user(),
            key,
            url=None,
            watched=[{"type": "model", "name": model}, {"type": "dataset", "name": "a/b"}],
            domains=None,
            secret=None,
            allow_private=True,
        )


def new_repo(hub: Hub, viewer: Viewer, name: str, *, private: bool = False) -> None:
    namespace, _, name = name.partition("/")
    with hub.db.write() as session:
        repos.create_repo(session, viewer, namespace, name, private=private)


def log_of(hub: Hub) -> list[Delivery]:
    with hub.db.read() as session:
        return list(session.exec(select(Delivery).order_by("id")))


def only_webhook(hub: Hub) -> Webhook:
    with hub.db.read() as session:
        return session.exec(select(Webhook)).one()


def send_due(hub: Hub, *, allow_private: bool = True) -> int:
    """What a hub does once a second: how many deliveries were tried."""
    queue.spread(hub)
    claimed = queue.claim(hub, BASE, 100)

    async def send(sending: queue.Sending) -> queue.Outcome:
        return await post(sending, allow_private, anyio.CapacityLimiter(1))

    for sending in claimed:
        queue.finish(hub, sending, anyio.run(send, sending))
    return len(claimed)


def let_pass(hub: Hub, how_long: timedelta = timedelta(days=2)) -> None:
    with hub.db.write() as session:
        for delivery in session.exec(select(Delivery)):
            delivery.due_at -= how_long
            session.add(delivery)
        for webhook in session.exec(select(Webhook)):
            webhook.not_before -= how_long
            if webhook.failing_since is not None:
                webhook.failing_since -= how_long
            session.add(webhook)


def test_huggingface_hub_makes_changes_and_removes_webhooks(api: HfApi) -> None:
    made = api.create_webhook(url="https://a.example/x", watched=WATCHED, secret=SECRET)
    assert (made.url, made.secret, made.disabled) == ("https://a.example/x", SECRET, False)
    assert set(made.domains) == {"repo", "discussion"}
    assert [(item.type, item.name) for item in made.watched] == [("user", "admin")]
    assert api.get_webhook(made.id) == made
    assert made in api.list_webhooks()
    ink = [{"type": "model", "name": "admin/ink"}]
    changed = api.update_webhook(made.id, url="https://b.example", watched=ink, domains=["repo"])
    assert (changed.url, changed.domains, changed.secret) == ("https://b.example", ["repo"], SECRET)
    assert changed.watched[0].name == "admin/ink"
    assert api.disable_webhook(made.id).disabled
    assert api.get_webhook(made.id).disabled
    assert not api.enable_webhook(made.id).disabled
    api.delete_webhook(made.id)
    with pytest.raises(HfHubHTTPError, match="404"):
        api.get_webhook(made.id)
    with pytest.raises(HfHubHTTPError, match="501"):
        api.create_webhook(job_id="1", watched=WATCHED)


def test_everything_that_happens_to_a_repo_arrives_signed_and_in_order(
    api: HfApi, running: RunningHub, receiver: Receiver
) -> None:
    hook = api.create_webhook(url=receiver.url, watched=WATCHED, secret=SECRET)
    api.create_repo("admin/ink")
    first = api.model_info("admin/ink").sha
    made = api.create_commit(
        "admin/ink", [CommitOperationAdd("a.txt", b"a")], commit_message="one"
    ).oid
    talk = api.create_discussion("admin/ink", "Ink?")
    api.comment_discussion("admin/ink", talk.num, "yes")
    api.change_discussion_status("admin/ink", talk.num, "closed")
    pull = api.create_pull_request("admin/ink", "Better")
    api.update_repo_settings("admin/ink", private=True)
    api.move_repo("admin/ink", "admin/oil")
    receiver.wait(8)  # The text of a comment is its repo's: it goes with it.
    api.delete_repo("admin/oil")
    receiver.wait(9)
    told = receiver.payloads()
    assert [(t.event.action, t.event.scope) for t in told] == [
        ("create", "repo"),
        ("update", "repo.content"),
        ("create", "discussion"),
        ("create", "discussion.comment"),
        ("update", "discussion"),
        ("create", "discussion"),
        ("update", "repo.config"),
        ("move", "repo"),
        ("delete", "repo"),
    ]
    assert {t.webhook.id for t in told} == {hook.id}
    assert len({t.repo.id for t in told}) == 1
    assert [t.repo.name for t in told] == ["admin/ink"] * 8 + ["admin/oil"]
    assert [t.repo.private for t in told] == [False] * 6 + [True] * 3
    (ref,) = told[1].updatedRefs or []
    assert (ref.ref, ref.oldSha, ref.newSha) == ("refs/heads/main", first, made)
    assert told[2].discussion is not None
    assert (told[2].discussion.num, told[2].discussion.title) == (talk.num, "Ink?")
    assert told[3].comment is not None
    assert told[3].comment.content == "yes"
    assert told[4].discussion is not None
    assert told[4].discussion.status == "closed"
    assert told[5].discussion is not None
    assert told[5].discussion.isPullRequest
    assert told[5].discussion.num == pull.num
    assert told[5].discussion.changes is not None
    assert told[5].discussion.changes.base == "refs/heads/main"
    assert told[7].movedTo is not None
    assert told[7].movedTo.name == "admin/oil"
    for headers, body in receiver.got:
        assert headers["X-Webhook-Secret"] == SECRET
        moment = headers["webhook-timestamp"]
        assert abs(int(moment) - time.time()) < 120
        signed = queue.signature(SECRET, headers["webhook-id"], moment, body)
        assert headers["webhook-signature"] == signed
    log = httpx2.get(
        f"{running.url}/api/settings/webhooks/{hook.id}/deliveries", headers=running.auth
    ).json()
    assert [item["state"] for item in log] == ["delivered"] * 9
    assert log[0]["payload"]["event"] == {"action": "delete", "scope": "repo"}
    api.delete_webhook(hook.id)


def test_the_signature_is_that_of_standard_webhooks() -> None:
    """Over id, time stamp and body, so that none of them can be exchanged."""
    body = b'{"event_type":"ping"}'
    signed = queue.signature("a" * 24, "msg_1", "1614265330", body)
    content = b'msg_1.1614265330.{"event_type":"ping"}'
    digest = hmac.new(b"a" * 24, content, hashlib.sha256).digest()
    assert signed == "v1," + base64.b64encode(digest).decode()
    assert signed != queue.signature("a" * 24, "msg_1", "1614265331", body)
    assert signed != queue.signature("b" * 24, "msg_1", "1614265330", body)


@both_databases
def test_a_webhook_hears_of_its_domains_and_of_what_it_watches(
    hub: Hub, admin: Viewer, receiver: Receiver
) -> None:
    new_repo(hub, admin, "admin/before")
    make(hub, admin, receiver.url, domains=(Domain.DISCUSSION,))
    make(hub, admin, receiver.url, name="nobody")
    new_repo(hub, admin, "admin/ink")
    with hub.db.write() as session:
        repo = repos.get_repo(session, admin, "admin", "ink")
        talk = discussions.start(session, admin, repo, "Ink?", "text")
        said = discussions.comment(session, admin, repo, talk, "a secret")
        assert said.id is not None
        discussions.hide(session, admin, repo, talk, said.id)
    while send_due(hub):
        pass
    told = receiver.payloads()
    scopes = [t.event.scope for t in told]
    assert scopes == ["discussion", "discussion.comment", "discussion.comment"]
    # What was hidden before it was sent is not sent.
    assert b"a secret" not in b"".join(body for _, body in receiver.got)
    assert [t.comment.hidden for t in told if t.comment] == [True, True]


@both_databases
def test_a_delivery_of_a_deleted_repo_tells_nothing_of_what_was_said_since(
    hub: Hub, admin: Viewer, receiver: Receiver
) -> None:
    """SQLite gives the number of a comment that is gone to the next one."""
    eve = make_user(hub, "eve", Scope.ADMIN)[0]
    key = make(hub, eve, receiver.url, name="eve")
    texts = {"eve/bait": (eve, "bait"), "admin/closed": (admin, "a secret")}
    for name, (viewer, text) in texts.items():
        with hub.db.write() as session:
            namespace, _, short = name.partition("/")
            private = viewer is admin
            repo = repos.create_repo(session, viewer, namespace, short, private=private)
            talk = discussions.start(session, viewer, repo, "About")
            discussions.comment(session, viewer, repo, talk, text)
        if viewer is eve:
            while send_due(hub):
                pass
            with hub.db.write() as session:
                repos.delete_repo(session, eve, repo)
    with hub.db.read() as session:
        sent = service.deliveries(session, eve.require_user(), key)[1]
    told = next(delivery.id for delivery in sent if delivery.kind == "comment.created")
    assert told is not None
    with hub.db.write() as session:
        service.redeliver(session, eve.require_user(), key, told)
    while send_due(hub):
        pass
    said = [t.comment for t in receiver.payloads() if t.comment]
    assert [(comment.content, comment.hidden) for comment in said] == [
        ("bait", False),
        (None, True),
    ]


@both_databases
def test_branches_and_tags_are_told_and_a_moved_repo_stays_watched(
    hub: Hub, admin: Viewer, receiver: Receiver
) -> None:
    new_repo(hub, admin, "admin/ink")
    watch(hub, admin, make(hub, admin, receiver.url), "Admin/Ink")
    with hub.db.write() as session:
        repo = repos.get_repo(session, admin, "admin", "ink")
        head = repo.head
        refs.create_branch(session, admin, repo, "next")
        refs.create_tag(session, admin, repo, "v1")
        refs.delete_branch(session, admin, repo, "next")
        repos.move_repo(session, admin, repo, "admin", "oil")
        refs.delete_tag(session, admin, repo, "v1")
    while send_due(hub):
        pass
    told = receiver.payloads()
    assert [(t.event.action, t.event.scope) for t in told] == [
        *[("update", "repo.content")] * 3,
        ("move", "repo"),
        ("update", "repo.content"),
    ]
    assert [(r.ref, r.oldSha, r.newSha) for t in told for r in t.updatedRefs or []] == [
        ("refs/heads/next", None, head),
        ("refs/tags/v1", None, head),
        ("refs/heads/next", head, None),
        ("refs/tags/v1", head, None),
    ]
    assert told[4].repo.name == "admin/oil"
    assert [item["name"] for item in only_webhook(hub).watched] == ["admin/oil", "a/b"]
    # Whose webhook it is may not know the repo any more: it does not learn of its new name.
    eve, _ = make_user(hub, "eve")
    watch(hub, eve, make(hub, eve, receiver.url), "admin/oil")
    with hub.db.write() as session:
        repos.update_settings(session, admin, repo, private=True)
        repos.move_repo(session, admin, repo, "admin", "hidden")
    queue.spread(hub)
    with hub.db.read() as session:
        (eves,) = service.listed(session, eve.require_user())
        (admins,) = service.listed(session, admin.require_user())
    assert [item["name"] for item in (*admins.watched, *eves.watched)] == [
        *("admin/hidden", "a/b", "admin/oil", "a/b"),
    ]


def test_a_disabled_user_hears_nothing_any_more(
    hub: Hub, admin: Viewer, receiver: Receiver
) -> None:
    """Neither what waits for them already nor what happens later."""
    ada, _ = make_user(hub, "ada")
    make(hub, ada, receiver.url, name="admin")
    new_repo(hub, admin, "admin/ink")
    queue.spread(hub)
    with hub.db.write() as session:
        users.change_user(session, admin.require_user(), "ada", is_disabled=True)
    new_repo(hub, admin, "admin/oil")
    send_due(hub)
    assert receiver.got == []
    assert [d.state for d in log_of(hub)] == [DeliveryState.DEAD]


@both_databases
def test_only_who_may_read_a_private_repo_hears_of_it(
    hub: Hub, admin: Viewer, receiver: Receiver
) -> None:
    ada, _ = make_user(hub, "ada")
    bob, _ = make_user(hub, "bob")
    eve, _ = make_user(hub, "eve")
    with hub.db.write() as session:
        users.create_organization(session, "acme", admin.require_user())
        organizations.set_role(session, admin, "acme", "ada", Role.WRITER)
        organizations.set_role(session, admin, "acme", "bob", Role.READER)
    with receiving() as bobs, receiving() as eves:
        for viewer, address in ((ada, receiver), (bob, bobs), (eve, eves)):
            make(hub, viewer, address.url, name="ACME")
        new_repo(hub, ada, "acme/ink", private=True)
        queue.spread(hub)
        with hub.db.write() as session:
            organizations.remove(session, admin, "acme", "bob")
        send_due(hub)
        assert (len(receiver.got), bobs.got, eves.got) == (1, [], [])
        with hub.db.write() as session:
            repo = repos.get_repo(session, ada, "acme", "ink")
            repos.update_settings(session, ada, repo, private=False)
        send_due(hub)
        assert [len(r.got) for r in (receiver, bobs, eves)] == [2, 1, 1]
    dead = [d for d in log_of(hub) if d.state == DeliveryState.DEAD]
    assert [d.error for d in dead] == ["the owner of the webhook may not read the repo any more"]


@both_databases
def test_a_failed_delivery_is_tried_again_and_later_ones_of_its_repo_wait(
    hub: Hub, admin: Viewer, receiver: Receiver
) -> None:
    make(hub, admin, receiver.url)
    receiver.statuses = [500]
    new_repo(hub, admin, "admin/ink")
    with hub.db.write() as session:
        repo = repos.get_repo(session, admin, "admin", "ink")
        repos.update_settings(session, admin, repo, private=True)
    new_repo(hub, admin, "admin/oil")
    while send_due(hub):
        pass
    assert [t.repo.name for t in receiver.payloads()] == ["admin/ink", "admin/oil"]
    first, second, other = log_of(hub)
    assert (first.state, first.attempts, first.status) == (DeliveryState.WAITING, 1, 500)
    assert first.error == "the receiver answers with status 500"
    assert first.due_at > now()
    assert (second.state, second.attempts) == (DeliveryState.WAITING, 0)
    assert other.state == DeliveryState.DELIVERED
    let_pass(hub)
    while send_due(hub):
        pass
    scopes = [t.event.scope for t in receiver.payloads()]
    assert scopes == ["repo", "repo", "repo", "repo.config"]
    # The same id tells a receiver that it is the same.
    ids = [headers["webhook-id"] for headers, _ in receiver.got]
    assert ids[0] == ids[2]
    assert len(set(ids)) == 3
    assert {d.state for d in log_of(hub)} == {DeliveryState.DELIVERED}


def test_what_a_dying_hub_was_sending_is_sent_again(
    hub: Hub, admin: Viewer, receiver: Receiver
) -> None:
    make(hub, admin, receiver.url)
    new_repo(hub, admin, "admin/ink")
    queue.spread(hub)
    (lost,) = queue.claim(hub, BASE, 8)
    assert queue.claim(hub, BASE, 8) == []
    let_pass(hub)
    (again,) = queue.claim(hub, BASE, 8)
    assert (again.delivery_id, again.attempt) == (lost.delivery_id, 2)
    # The first one comes back after all: it has no say any more.
    queue.finish(hub, lost, queue.Outcome(500, "late"))
    assert log_of(hub)[0].error is None
    queue.finish(hub, again, queue.Outcome(200, None))
    assert log_of(hub)[0].state == DeliveryState.DELIVERED


@both_databases
def test_r15_a_dead_target_rests_is_given_up_after_a_day_and_comes_back_by_hand(
    hub: Hub, admin: Viewer, receiver: Receiver
) -> None:
    key = make(hub, admin, receiver.url)
    receiver.statuses = [503] * (queue.MAX_ATTEMPTS + 1)
    new_repo(hub, admin, "admin/ink")
    for n in range(1, queue.MAX_ATTEMPTS):
        assert send_due(hub) == 1
        hook = only_webhook(hub)
        assert hook.failures == n
        assert (hook.not_before > now()) == (n >= queue.RESTS_FROM)
        let_pass(hub)
    new_repo(hub, admin, "admin/oil")
    queue.spread(hub)
    (last,) = queue.claim(hub, BASE, 1)
    queue.finish(hub, last, queue.Outcome(503, "the receiver answers with status 503"))
    hook = only_webhook(hub)
    assert hook.disabled
    assert hook.reason is not None
    assert "503" in hook.reason
    assert [(d.state, d.error) for d in log_of(hub)] == [
        (DeliveryState.DEAD, "the receiver answers with status 503"),
        (DeliveryState.DEAD, "the webhook was disabled"),
    ]
    new_repo(hub, admin, "admin/unheard")
    assert send_due(hub) == 0
    receiver.statuses = []
    user = admin.require_user()
    with hub.db.write() as session:
        service.enable(session, user, key)
    for delivery in log_of(hub):
        assert delivery.id is not None
        with hub.db.write() as session:
            service.redeliver(session, user, key, delivery.id)
    while send_due(hub):
        pass
    assert [d.state for d in log_of(hub)] == [DeliveryState.DELIVERED] * 2
    assert [t.repo.name for t in receiver.payloads()][-2:] == ["admin/ink", "admin/oil"]


def test_the_pauses_grow_over_a_day_and_are_never_all_the_same() -> None:
    pauses = [queue.pause(n) for n in range(1, queue.MAX_ATTEMPTS)]
    assert timedelta(days=1) < sum(pauses, timedelta()) < timedelta(days=2)
    assert pauses == sorted(pauses)
    assert len({queue.pause(1) for _ in range(20)}) > 1


def test_r15_a_storm_of_events_ends_the_webhook_and_not_the_disk(
    hub: Hub, admin: Viewer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "MAX_WAITING", 3)
    make(hub, admin, "http://127.0.0.1:9/")
    for n in range(5):
        new_repo(hub, admin, f"admin/r{n}")
    queue.spread(hub)
    assert len(log_of(hub)) == 3
    assert only_webhook(hub).reason == "more than 3 deliveries waited"


def test_old_deliveries_are_forgotten(hub: Hub, admin: Viewer, receiver: Receiver) -> None:
    make(hub, admin, receiver.url)
    new_repo(hub, admin, "admin/ink")
    send_due(hub)
    assert queue.sweep(hub) == 0
    with hub.db.write() as session:
        session.exec(select(Delivery)).one().finished_at = now() - queue.KEPT - timedelta(days=1)
    assert queue.sweep(hub) == 1
    assert log_of(hub) == []


# Where a webhook may go

INNER = [
    "https://127.0.0.1/",
    "https://2130706433/",
    "https://0177.0.0.1/",
    "https://0x7f.1/",
    "https://127.1/",
    "https://10.0.0.1/",
    "https://169.254.169.254/latest/meta-data/",
    "https://100.64.0.1/",
    "https://192.168.0.1:8470/",
    "https://0.0.0.0/",
    "https://224.0.0.1/",
    "https://[::1]/",
    "https://[::ffff:127.0.0.1]/",
    "https://[fd00::1]/",
    "https://[fe80::1]/",
    "https://[2002:7f00:1::]/",
    "https://[64:ff9b::7f00:1]/",
    "http://1.1.1.1/",
    "file:///etc/passwd",
    "gopher://1.1.1.1/",
    "ftp://1.1.1.1/",
    "https://user:secret@1.1.1.1/",
    "https:///nothing",
    "https://1.1.1.1:99999/",
    "https://[::1/",
    "https://a.example/\r\nX: y",
    "",
]


def test_h7_no_webhook_is_made_for_an_inner_address(hub: Hub, client: TestClient) -> None:
    for url in INNER:
        answer = client.post(
            "/api/settings/webhooks",
            json={"url": url, "watched": WATCHED},
            headers=bearer(hub.admin_token),
        )
        assert answer.status_code == 422, url
        assert "url" in answer.json()["error"], url


def test_h7_a_name_that_leads_to_an_inner_address_is_refused_when_it_is_sent_to(
    hub: Hub, admin: Viewer, receiver: Receiver
) -> None:
    port = receiver.url.rpartition(":")[2].partition("/")[0]
    make(hub, admin, f"https://localhost:{port}/")
    new_repo(hub, admin, "admin/ink")
    assert send_due(hub, allow_private=False) == 1
    (delivery,) = log_of(hub)
    assert delivery.error is not None
    assert "is no public address" in delivery.error
    assert (delivery.status, receiver.got) == (None, [])


def test_h7_a_webhook_made_before_the_rules_were_strict_goes_nowhere(
    hub: Hub, admin: Viewer, receiver: Receiver
) -> None:
    make(hub, admin, receiver.url)
    new_repo(hub, admin, "admin/ink")
    send_due(hub, allow_private=False)
    assert log_of(hub)[0].error == "the address is not https"
    assert receiver.got == []


def test_h7_the_connection_goes_to_the_address_that_was_checked(
    hub: Hub, admin: Viewer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that answers differently the second time is not asked a second time."""
    asked: list[str] = []

    def flips(host: str, *args: Any, **options: Any) -> list[Any]:
        asked.append(host)
        return [(2, 1, 6, "", ("93.184.216.34" if len(asked) == 1 else "127.0.0.1", 443))]

    monkeypatch.setattr(upstream.socket, "getaddrinfo", flips)
    to = upstream.pinned(httpx2.URL("https://rebinds.example:444/x?y=z"))
    assert str(to.url) == "https://93.184.216.34:444/x?y=z"
    assert to.headers == {"Host": "rebinds.example:444"}
    assert to.extensions == {"sni_hostname": "rebinds.example"}
    assert asked == ["rebinds.example"]


def test_h7_redirects_are_not_followed(hub: Hub, admin: Viewer, receiver: Receiver) -> None:
    make(hub, admin, receiver.url)
    receiver.statuses = [307]
    new_repo(hub, admin, "admin/ink")
    send_due(hub)
    assert len(receiver.got) == 1
    assert log_of(hub)[0].error == "the receiver answers with status 307"


def test_secrets_that_no_header_carries_are_refused(hub: Hub, admin: Viewer) -> None:
    for secret in ("a\nb", "ä", " a", "x" * 300):
        with pytest.raises(BadField, match="secret"), hub.db.write() as session:
            service.create(
                session,
                admin.require_user(),
                url="https://a.example",
                watched=[],
                domains=[],
                secret=secret,
                allow_private=False,
            )


def test_a_webhook_and_its_log_are_its_owners(hub: Hub, admin: Viewer, client: TestClient) -> None:
    key = make(hub, admin, "https://a.example")
    _, eve = make_user(hub, "eve", Scope.ADMIN)
    _, writer = make_user(hub, "ada", Scope.WRITE)
    place = f"/api/settings/webhooks/{key}"
    asks: list[Callable[[dict[str, str]], httpx2.Response]] = [
        lambda headers: client.get(place, headers=headers),
        lambda headers: client.get(f"{place}/deliveries", headers=headers),
        lambda headers: client.post(f"{place}/deliveries/1/redeliver", headers=headers),
        lambda headers: client.post(f"{place}/disable", headers=headers),
        lambda headers: client.delete(place, headers=headers),
    ]
    for ask in asks:
        assert ask(bearer(eve)).status_code == 404
        assert ask(bearer(writer)).status_code == 403
    assert client.get("/api/settings/webhooks", headers=bearer(eve)).json() == []
    assert only_webhook(hub).disabled is False
