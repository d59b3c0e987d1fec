"""What people do with collections and likes in a browser that runs no script."""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
from starlette.testclient import TestClient

from hub.app import create_app
from hub.context import open_hub
from hub.users import organizations
from hub.users import service as users
from hub.users.models import Role
from tests.fixtures.catalogue import publish_files
from tests.fixtures.server import settings_of
from tests.hub.conftest import make_user
from tests.hub.test_repo_forms import HOST, Person


@dataclass
class People:
    """ada writes for acme, bob reads there, eve is a stranger with an account."""

    ada: Person
    bob: Person
    eve: Person
    nobody: Person


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Iterator[People]:
    settings = settings_of(tmp_path_factory.mktemp("forms"))
    with ExitStack() as stack:
        hub = stack.enter_context(open_hub(settings))
        viewers, tokens = {}, {}
        for name in ("ada", "bob", "eve"):
            viewers[name], tokens[name] = make_user(hub, name)
        with hub.db.write() as session:
            token = (settings.data_dir / "admin.token").read_text().strip()
            boss = users.viewer_of(session, token)
            users.create_organization(session, "acme", boss.require_user())
            organizations.set_role(session, boss, "acme", "ada", Role.WRITER)
            organizations.set_role(session, boss, "acme", "bob", Role.READER)
        for repo in ("ada/ink", "ada/brush", "ada/secret"):
            publish_files(hub, viewers["ada"], repo, {"a.txt": b"a"}, private=repo == "ada/secret")
        publish_files(hub, viewers["ada"], "ada/faces", {"a.txt": b"a"}, type="dataset")
        app = create_app(settings, hub=hub)
        clients = [TestClient(app, base_url=HOST, follow_redirects=False) for _ in range(4)]
        # It starts the hub for all four.
        stack.enter_context(clients[0])
        known = [tokens["ada"], tokens["bob"], tokens["eve"], None]
        yield People(*(Person(client, token) for client, token in zip(clients, known, strict=True)))


def make(person: Person, title: str, namespace: str = "ada", **more: str) -> str:
    return person.send("/collections/new", namespace=namespace, title=title, **more)


def items_of(page: str) -> list[str]:
    """The names on the page that edits a collection, in order."""
    return re.findall(r'<a class="link" href="[^"]*">([^<]*)</a><span class="badge">', page)


def item_id(page: str, name: str) -> str:
    found = re.search(rf'id="item-(\d+)"(?:(?!id="item-).)*>{name}</a>', page, re.DOTALL)
    assert found is not None, name
    return found[1]


def test_a_collection_is_made_changed_and_deleted(people: People) -> None:
    ada = people.ada
    assert 'href="/collections/new?namespace=acme"' in ada.see("/acme")
    assert '<option value="acme" selected>' in ada.see("/collections/new?namespace=acme")
    place = make(ada, " Inks ", "acme", description="Two of a kind", visibility="private")
    assert re.fullmatch(r"/collections/acme/inks-[0-9a-f]{24}", place)
    assert "Two of a kind" in people.bob.see(place)
    people.eve.see(place, 404)
    assert f'href="{place}/edit"' in ada.see(place)
    assert 'value="private" checked' in ada.see(f"{place}/edit")
    wish = {"title": "All inks", "description": "", "visibility": "public", "colour": "green"}
    moved = ada.send(f"{place}/edit", **wish)
    assert moved.startswith("/collections/acme/all-inks-")
    page = people.nobody.see(moved)
    assert "Two of a kind" not in page
    assert 'class="page collection green"' in page
    refused = ada.send(f"{moved}/delete", 422, confirm="Inks")
    assert "Nothing was deleted: type All inks to delete it." in refused
    people.nobody.see(moved)
    assert ada.send(f"{moved}/delete", confirm="All inks") == "/acme"
    ada.see(moved, 404)


def test_items_are_noted_moved_and_removed(people: People) -> None:
    ada = people.ada
    place = make(ada, "Order", item="/ada/ink")
    slug = place.removeprefix("/collections/")
    for repo in ("/ada/brush", "/datasets/ada/faces"):
        assert f'value="{slug}"' in ada.see(repo)
        assert ada.send(f"{repo}/collect", collection=slug) == repo
        assert f'value="{slug}"' not in ada.see(repo)
        assert ada.send(f"{repo}/collect", collection=slug) == repo
    page = ada.see(f"{place}/edit")
    assert items_of(page) == ["ada/ink", "ada/brush", "ada/faces"]
    ink, faces = item_id(page, "ada/ink"), item_id(page, "ada/faces")
    where = ada.send(f"{place}/items/{faces}/up", note="kept too")
    assert where == f"{place}/edit#item-{faces}"
    ada.send(f"{place}/items/{ink}/down", note="")
    page = ada.see(f"{place}/edit")
    assert items_of(page) == ["ada/faces", "ada/ink", "ada/brush"]
    for number, turn in ((faces, "up"), (item_id(page, "ada/brush"), "down")):
        ada.send(f"{place}/items/{number}/{turn}", note="at its end")
    page = ada.see(f"{place}/edit")
    assert items_of(page) == ["ada/faces", "ada/ink", "ada/brush"]
    ada.send(f"{place}/items/{ink}/save", note="one\r\ntwo")
    assert "one\ntwo</p>" in people.nobody.see(place)
    ada.send(f"{place}/items/{faces}/remove", note="")
    assert items_of(ada.see(f"{place}/edit")) == ["ada/ink", "ada/brush"]
    assert "no such item" in ada.send(f"{place}/items/{faces}/up", 404)


def test_a_refused_form_keeps_what_was_typed(people: People) -> None:
    ada = people.ada
    place = make(ada, "Typed", item="/ada/ink")
    again = ada.send(
        "/collections/new", 409, namespace="ada", title="Typed", description="my words"
    )
    assert "There is a collection of that title already." in again
    assert 'value="my words"' in again
    gone = ada.send("/collections/new", 404, namespace="ada", title="Without", item="/ada/gone")
    assert "Repository not found." in gone
    assert "Without" not in ada.see("/ada")
    fields = {"title": "x" * 61, "description": "my words", "visibility": "private"}
    page = ada.send(f"{place}/edit", 422, **fields)
    assert "A title has 1 to 60 printable characters." in page
    assert 'value="my words"' in page
    assert 'value="private" checked' in page
    number = item_id(ada.see(f"{place}/edit"), "ada/ink")
    page = ada.send(f"{place}/items/{number}/save", 422, note="n" * 501)
    assert "A note has at most 500 characters." in page
    assert "n" * 501 + "</textarea>" in page


def test_forms_of_other_sites_and_of_strangers_change_nothing(people: People) -> None:
    place = make(people.ada, "Closed", "acme", item="/ada/ink")
    before = people.ada.see(f"{place}/edit")
    number = item_id(before, "ada/ink")
    forms: list[tuple[str, dict[str, str]]] = [
        ("/collections/new", {"namespace": "acme", "title": "Foreign"}),
        (f"{place}/edit", {"title": "Foreign", "visibility": "private"}),
        (f"{place}/items/{number}/remove", {}),
        (f"{place}/delete", {"confirm": "Closed"}),
        ("/ada/brush/collect", {"collection": place.removeprefix("/collections/")}),
    ]
    for path, fields in forms:
        for origin in ("", "http://evil.example"):
            people.ada.send(path, 403, origin, **fields)
        for person in (people.bob, people.eve):
            person.send(path, 403, **fields)
        people.nobody.send(path, 401, **fields)
    assert people.ada.see(f"{place}/edit") == before
    assert "Foreign" not in people.ada.see("/acme")
    # A page offers nobody what would be refused.
    for person in (people.bob, people.eve, people.nobody):
        person.see(f"{place}/edit", 401 if person is people.nobody else 403)
        assert f"{place}/edit" not in person.see(place)
        assert "/collections/new" not in person.see("/acme")
    assert "/collect" not in people.nobody.see("/ada/ink").split('id="main"')[1]
    # Nor does it say what somebody may not see.
    people.eve.send("/ada/secret/like", 404)
    hidden = make(people.eve, "Hers", "eve").removeprefix("/collections/")
    people.eve.send("/ada/secret/collect", 404, collection=hidden)


def test_a_repo_is_liked_once_and_not_any_more(people: People) -> None:
    ada, eve, nobody = people.ada, people.eve, people.nobody
    assert 'action="/ada/ink/like"' not in nobody.see("/ada/ink")
    for person in (ada, eve, eve):
        assert person.send("/ada/ink/like", liked="true") == "/ada/ink"
    assert "2 likes" in nobody.see("/ada/ink")
    assert 'name="liked" value="false"' in eve.see("/ada/ink")
    eve.send("/ada/ink/like", 403, "http://evil.example", liked="false")
    nobody.send("/ada/ink/like", 401)
    assert "2 likes" in nobody.see("/ada/ink")
    eve.send("/ada/ink/like", liked="false")
    assert 'name="liked" value="true"' in eve.see("/ada/ink")
    assert "1 like<" in nobody.see("/ada/ink")
    eve.send("/datasets/ada/faces/like")
    assert "1 like<" in nobody.see("/datasets/ada/faces")
