"""What people do on the pages of a repo beside reading it: talk, propose, merge, let in, move."""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from html import unescape
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from hub.adapters.service import publish
from hub.app import create_app
from hub.context import Hub
from hub.repos import pulls, refs
from hub.repos import service as repos
from hub.repos.operations import Add, Delete
from hub.users.service import Viewer
from hub.web import proposal
from tests.fixtures.catalogue import lora_bytes, publish_files
from tests.hub.conftest import make_user, new_token

HOST = "http://127.0.0.1:8470"
HTML = {"Accept": "text/html,*/*"}
INK = "/admin/ink"


class Person:
    """Somebody with a browser that sends what forms send."""

    def __init__(self, client: TestClient, token: str | None) -> None:
        self._client = client
        if token is not None:
            assert client.post("/login", data={"token": token}).status_code == 303

    def see(self, path: str, status: int = 200) -> str:
        answer = self._client.get(path, headers=HTML)
        assert answer.status_code == status, (path, answer.text)
        return unescape(answer.text)

    def send(self, path: str, code: int = 303, origin: str = HOST, /, **fields: str) -> str:
        """Where the form leads, or the page that refuses it."""
        headers = HTML | ({"Origin": origin} if origin else {})
        answer = self._client.post(path, data=fields, headers=headers)
        assert answer.status_code == code, (path, answer.text)
        return answer.headers["Location"] if code == 303 else unescape(answer.text)


class People:
    """Each with cookies of their own: the owner, a stranger who has an account, and nobody."""

    def __init__(self, hub: Hub, stack: ExitStack) -> None:
        app = create_app(hub.settings, hub=hub)
        clients = [TestClient(app, base_url=HOST, follow_redirects=False) for _ in range(3)]
        # It starts the hub for all three.
        stack.enter_context(clients[0])
        self.nobody = Person(clients[0], None)
        self.owner = Person(clients[1], hub.admin_token)
        self.eve = Person(clients[2], make_user(hub, "eve")[1])


@pytest.fixture
def people(hub: Hub, admin: Viewer, tmp_path: Path) -> Iterator[People]:
    files = {"ink.safetensors": lora_bytes(tmp_path, rank=4), "old.txt": b"old", "a.txt": b"one"}
    publish_files(hub, admin, "admin/ink", files)
    with ExitStack() as stack:
        yield People(hub, stack)


def propose(hub: Hub, who: Viewer, **files: bytes | None) -> int:
    """The number of a new pull request with these files; None removes one."""
    with hub.db.write() as session:
        repo = repos.get_repo(session, who, "admin", "ink")
        number = pulls.propose(session, who, repo, "Rank 8").num
    operations: list[Add | Delete] = []
    for name, content in files.items():
        path = name.replace("_", ".")
        if content is None:
            operations.append(Delete(path))
        else:
            operations.append(Add(path, hub.store.put([content], size=len(content)), lfs=False))
    branch = f"refs/pr/{number}"
    publish(hub, who, "admin", "ink", branch=branch, operations=operations, message="Train longer")
    return number


# Discussions


def test_a_discussion_from_its_first_word_to_its_last(people: People) -> None:
    eve = people.eve
    assert f'action="{INK}/discussions/new"' in eve.see(f"{INK}/discussions/new")
    text = (
        "**dark** <script>alert(1)</script> [x](javascript:alert(1)) ![p](https://a.example/p.png)"
    )
    place = eve.send(f"{INK}/discussions/new", title="Too dark", text=text)
    assert place == f"{INK}/discussions/1"
    page = people.nobody.see(place)
    assert "<strong>dark</strong>" in page
    assert "<script>alert" not in page.replace("&lt;", "<").split('<div class="prose">')[0]
    assert not re.search(r'(href="javascript|src="https://a\.example)', page)
    comment = eve.send(f"{place}/comment", text="line one\r\nline two")
    number = int(comment.partition("#")[2], 16)
    assert f'id="{number:024x}"' in eve.see(place)
    eve.send(f"{place}/comments/{number}/edit", text="better")
    assert "better" in (page := eve.see(place))
    assert "line one" not in page
    eve.send(f"{place}/comments/{number}/hide")
    assert "This comment was hidden" in (page := eve.see(place))
    assert "better" not in page
    eve.send(f"{place}/title", title="Much too dark")
    assert "Too dark</q> to <q>Much too dark" in eve.see(place)
    assert "Much too dark" in people.nobody.see(f"{INK}/discussions")
    eve.send(f"{place}/status", status="closed", text="my mistake")
    assert "my mistake" in (page := people.nobody.see(place))
    assert "closed this" in page
    assert "Much too dark" not in people.nobody.see(f"{INK}/discussions")
    assert "Much too dark" in people.nobody.see(f"{INK}/discussions?status=closed")
    people.owner.send(f"{place}/status", status="open", text="")
    assert "opened this again" in people.nobody.see(place)


def test_a_form_that_is_refused_keeps_what_was_typed(people: People) -> None:
    page = people.eve.send(f"{INK}/discussions/new", 422, title=" ", text="all my words")
    assert "A title has 1 to 300 characters." in page
    assert "all my words</textarea>" in page
    people.eve.send(f"{INK}/discussions/new", title="x")
    long = "w" * 70_000
    page = people.eve.send(f"{INK}/discussions/1/comment", 422, text=long)
    assert "A comment has 1 to 65536 characters." in page
    assert f"{long}</textarea>" in page
    people.eve.see(f"{INK}/discussions/99", 404)


def test_forms_of_other_sites_and_of_strangers_change_nothing(people: People) -> None:
    people.eve.send(f"{INK}/discussions/new", title="x")
    place = f"{INK}/discussions/1"
    before = people.owner.see(place)
    for origin in ("", "http://evil.example"):
        people.owner.send(f"{place}/comment", 403, origin, text="not mine")
        people.owner.send(f"{place}/status", 403, origin, status="closed")
    people.nobody.send(f"{place}/comment", 401, text="x")
    people.nobody.see(f"{INK}/discussions/new", 401)
    people.owner.send(f"{INK}/discussions/new", title="The owner's")
    refused = people.eve.send(f"{INK}/discussions/2/status", 403, status="closed")
    assert "Eve may not change this in admin/ink." in refused
    page = people.owner.see(place)
    assert page.split("What happened")[1] == before.split("What happened")[1]
    # A page offers nobody what would be refused.
    page = people.eve.see(f"{INK}/discussions/2")
    assert f'{INK}/discussions/2/comment"' in page
    assert f"{INK}/discussions/2/status" not in page
    assert "<form" not in people.nobody.see(place).split('id="main"')[1]


# Pull requests


def test_a_pull_request_says_what_it_changes_and_is_merged(
    hub: Hub, people: People, tmp_path: Path
) -> None:
    eve, _ = new_token(hub, "eve")
    adapter = lora_bytes(tmp_path, rank=8)
    number = propose(hub, eve, ink_safetensors=adapter, old_txt=None, new_txt=b"new")
    place = f"{INK}/discussions/{number}"
    page = people.eve.see(place)
    assert re.findall(r'<span class="badge \w+">(\w+)</span>', page) == [
        "changed",
        "added",
        "removed",
    ]
    assert re.search(r"Rank</span> <del>4</del> → 8", page)
    assert "Merge into main" not in page
    assert "new" in people.eve.see(f"{INK}/blob/refs/pr/{number}/new.txt")
    people.eve.send(f"{place}/merge", 403)
    assert ">4</dd>" in people.nobody.see(INK)
    assert "Merge into main" in people.owner.see(place)
    people.owner.send(f"{place}/merge")
    page = people.owner.see(place)
    assert "merged this" in page
    assert "Merged into" in page
    assert ">8</dd>" in people.nobody.see(INK)
    assert "Rank 8 (#1)" in people.nobody.see(f"{INK}/commits/main")


def test_a_conflict_names_the_file_and_merges_nothing(
    hub: Hub, admin: Viewer, people: People
) -> None:
    number = propose(hub, admin, a_txt=b"two")
    publish_files(hub, admin, "admin/ink", {"a.txt": b"three"})
    place = f"{INK}/discussions/{number}"
    page = people.owner.see(place)
    assert "<code>a.txt</code> was changed in <code>main</code> too" in page
    assert "Merge into main" not in page
    refused = people.owner.send(f"{place}/merge", 409)
    assert "a.txt was changed in main too." in refused
    assert "three" in people.nobody.see(f"{INK}/blob/main/a.txt")


def test_headers_are_read_once_and_only_so_many(
    hub: Hub, people: People, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eve, _ = new_token(hub, "eve")
    propose(hub, eve, ink_safetensors=lora_bytes(tmp_path, rank=8))
    said = re.compile(r"Rank</span> <del>4</del> → 8")
    assert said.search(people.nobody.see(f"{INK}/discussions/1"))
    monkeypatch.delattr(proposal, "identify_file")
    assert said.search(people.nobody.see(f"{INK}/discussions/1"))
    monkeypatch.setattr(proposal, "MAX_HEADER_BYTES", 0)
    page = people.nobody.see(f"{INK}/discussions/1")
    assert "ink.safetensors</a>" in page
    assert "<del>" not in page


def test_a_pull_request_whose_branch_is_gone_can_still_be_read(
    hub: Hub, admin: Viewer, people: People
) -> None:
    with hub.db.write() as session:
        repo = repos.get_repo(session, admin, "admin", "ink")
        refs.create_branch(session, admin, repo, "side")
        pulls.propose(session, admin, repo, "Late", branch="side")
        refs.delete_branch(session, admin, repo, "side")
    page = people.owner.see(f"{INK}/discussions/1")
    assert "The branch <code>side</code> is gone" in page
    assert "Merge into" not in page


# Settings and access


def test_a_gate_is_set_asked_through_and_opened(people: People) -> None:
    owner, eve = people.owner, people.eve
    assert "/access" not in owner.see(INK)
    owner.see(f"{INK}/access", 400)
    owner.send(f"{INK}/settings", visibility="public", gate="manual")
    assert 'value="manual" checked' in owner.see(f"{INK}/settings?saved=1")
    page = eve.see(INK)
    assert "Ask for access" in page
    for place in (INK, f"{INK}/tree/main", f"{INK}/blob/main/a.txt"):
        assert "download=true" not in eve.see(place)
        assert "download=true" in owner.see(place)
    eve.send(f"{INK}/ask-access")
    assert "have not answered yet" in eve.see(INK)
    page = owner.see(f"{INK}/access")
    asked = re.findall(r'name="request_id" value="(\d+)"', page)[0]
    assert 'Access<span class="n">1</span>' in page
    eve.see(f"{INK}/access", 403)
    eve.send(f"{INK}/access", 403, request_id=asked, state="accepted")
    owner.send(f"{INK}/access", 403, "http://evil.example", request_id=asked, state="accepted")
    owner.send(f"{INK}/access", request_id=asked, state="rejected", reason="Say who you are.")
    assert "Say who you are." in eve.see(INK)
    again = owner.send(f"{INK}/access", 404, request_id=asked, state="rejected")
    assert "is rejected already" in again
    owner.send(f"{INK}/access", request_id=asked, state="pending")
    assert "have not answered yet" in eve.see(INK)
    owner.send(f"{INK}/access", request_id=asked, state="accepted")
    assert "download=true" in eve.see(INK)
    assert "has access to admin/ink already" in owner.send(f"{INK}/access/grant", 400, user="eve")
    assert "zoe" in owner.send(f"{INK}/access/grant", 404, user="zoe")


def test_a_repo_is_hidden_renamed_and_deleted_by_its_name(people: People) -> None:
    owner, eve = people.owner, people.eve
    eve.see(f"{INK}/settings", 403)
    people.nobody.see(f"{INK}/settings", 401)
    eve.send(f"{INK}/settings/delete", 403, confirm="admin/ink")
    assert "admin alone" in owner.see(f"{INK}/settings")
    owner.send(f"{INK}/settings", visibility="private", gate="open")
    eve.see(INK, 404)
    owner.send(f"{INK}/settings", visibility="public", gate="open")
    refused = owner.send(f"{INK}/settings/move", 422, to_namespace="nobody", to_name="ink")
    assert "There is no user or organisation" in refused
    place = owner.send(f"{INK}/settings/move", to_namespace="admin", to_name="brush")
    assert place == "/admin/brush/settings?saved=1"
    owner.see(place)
    place = "/admin/brush/settings/delete"
    assert "Nothing was deleted" in owner.send(place, 422, confirm="admin/ink")
    owner.send(place, 403, "", confirm="admin/brush")
    eve.see("/admin/brush")
    assert owner.send(place, confirm="admin/brush") == "/admin"
    owner.see("/admin/brush", 404)
