"""Collections by the real client against a real hub, and what nobody learns from them."""

import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from os import environ
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub import Collection, HfApi
from huggingface_hub.errors import HfHubHTTPError
from starlette.testclient import TestClient

from hub.context import Hub, open_hub
from hub.errors import BadRequest, CollectionNotFound, ItemExists
from hub.repos import collections, curation
from hub.repos import service as repos
from hub.repos.models import RepoType
from hub.users import organizations
from hub.users import service as users
from hub.users.models import Role
from hub.users.service import Viewer
from tests.fixtures.catalogue import lora_bytes, publish_files
from tests.fixtures.server import RunningHub, running_hub, settings_of
from tests.hub.conftest import bearer, both_databases, make_user


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("collections")


@pytest.fixture(scope="module")
def tokens(folder: Path) -> dict[str, str]:
    """ada writes for the organisation acme, bob reads there, eve is a stranger."""
    with open_hub(settings_of(folder)) as hub:
        made = {name: make_user(hub, name)[1] for name in ("ada", "bob", "eve", "fay")}
        with hub.db.write() as session:
            boss = users.viewer_of(
                session, (hub.settings.data_dir / "admin.token").read_text().strip()
            )
            users.create_organization(session, "acme", boss.require_user())
            organizations.set_role(session, boss, "acme", "ada", Role.WRITER)
            organizations.set_role(session, boss, "acme", "bob", Role.READER)
        return made


@pytest.fixture(scope="module")
def running(folder: Path, tokens: dict[str, str]) -> Iterator[RunningHub]:
    with running_hub(folder, workers=0) as hub:
        yield hub


@pytest.fixture(scope="module")
def ada(running: RunningHub, tokens: dict[str, str]) -> HfApi:
    return HfApi(endpoint=running.url, token=tokens["ada"])


@pytest.fixture(scope="module")
def bob(running: RunningHub, tokens: dict[str, str]) -> HfApi:
    return HfApi(endpoint=running.url, token=tokens["bob"])


@pytest.fixture(scope="module")
def eve(running: RunningHub, tokens: dict[str, str]) -> HfApi:
    return HfApi(endpoint=running.url, token=tokens["eve"])


@pytest.fixture(scope="module")
def nobody(running: RunningHub) -> HfApi:
    return HfApi(endpoint=running.url, token=False)


@pytest.fixture(scope="module")
def styles(ada: HfApi) -> list[str]:
    """Repos that tests only look at: a public and a private model, a dataset."""
    ada.create_repo("ada/ink")
    ada.create_repo("ada/secret", private=True)
    ada.create_repo("ada/pictures", repo_type="dataset")
    return ["ada/ink", "ada/secret", "ada/pictures"]


def names(collection: Collection) -> list[str]:
    assert [item.position for item in collection.items] == list(range(len(collection.items)))
    return [item.item_id for item in collection.items]


def refused(status: int) -> Any:
    return pytest.raises(HfHubHTTPError, match=f"{status} ")


def test_a_collection_is_made_changed_and_deleted(running: RunningHub, ada: HfApi) -> None:
    made = ada.create_collection("Röntgen & Ink: 1", description="Two of a kind")
    words, _, key = made.slug.rpartition("-")
    assert (words, len(key)) == ("ada/rontgen-ink-1", 24)
    assert made.url == f"{running.url}/collections/{made.slug}"
    assert (made.description, made.private, made.items, made.upvotes) == (
        "Two of a kind",
        False,
        [],
        0,
    )
    assert made.owner["name"] == "ada"  # type: ignore[index]  # a mapping, as on huggingface.co
    changed = ada.update_collection_metadata(
        made.slug, title="X-rays", description="", theme="pink", private=True
    )
    assert changed.slug == f"ada/x-rays-{key}"
    assert (changed.title, changed.description, changed.theme, changed.private) == (
        "X-rays",
        None,
        "pink",
        True,
    )
    assert changed.last_updated > made.last_updated
    with refused(422):
        ada.update_collection_metadata(made.slug, theme="red")
    for slug in (made.slug, f"ADA/anything-{key}", f"ada/{key}"):
        assert ada.get_collection(slug).slug == changed.slug
    for slug in (f"eve/x-rays-{key}", f"ada/x-rays-{'0' * 24}", "ada/x-rays", "ada/x-rays-"):
        with refused(404):
            ada.get_collection(slug)
    ada.delete_collection(changed.slug)
    with refused(404):
        ada.delete_collection(changed.slug)
    ada.delete_collection(changed.slug, missing_ok=True)


def test_a_title_is_given_once_in_a_namespace(ada: HfApi, eve: HfApi) -> None:
    first = ada.create_collection("Once")
    with refused(409):
        ada.create_collection("Once")
    again = ada.create_collection("Once", description="other", exists_ok=True)
    assert (again.slug, again.description) == (first.slug, None)
    assert eve.create_collection("Once").slug != first.slug
    other = ada.create_collection("Twice")
    with refused(409):
        ada.update_collection_metadata(other.slug, title="Once")
    assert ada.get_collection(other.slug).title == "Twice"


@pytest.mark.parametrize(
    "wish",
    [
        {"title": ""},
        {"title": "x" * 61},
        {"title": " x"},
        {"title": "a\u202eb"},
        {"title": "x", "description": "x" * 151},
    ],
)
def test_what_no_collection_can_have_is_refused(ada: HfApi, wish: dict[str, str]) -> None:
    with refused(422):
        ada.create_collection(**wish)


def test_items_are_added_noted_moved_and_removed(ada: HfApi, styles: list[str]) -> None:
    slug = ada.create_collection("Items").slug
    nested = ada.create_collection("Nested").slug
    ada.add_collection_item(slug, "ada/ink", "model", note="the first")
    ada.add_collection_item(slug, "datasets/ada/pictures", "dataset")
    ada.add_collection_item(slug, nested, "collection")
    full = ada.add_collection_item(slug, "ada/ink", "model", exists_ok=True)
    assert names(full) == ["ada/ink", "ada/pictures", nested]
    assert [item.item_type for item in full.items] == ["model", "dataset", "collection"]
    assert [item.note for item in full.items] == ["the first", None, None]
    with refused(409):
        ada.add_collection_item(slug, "ADA/INK", "model")
    with refused(404):
        ada.add_collection_item(slug, "ada/ink", "dataset")
    with refused(422):
        ada.add_collection_item(slug, slug, "collection")
    with refused(422):
        ada.add_collection_item(slug, "ada/secret", "model", note="x" * 501)
    for kind in ("space", "paper", "bucket"):
        with refused(501):
            ada.add_collection_item(slug, "ada/ink", kind)  # type: ignore[arg-type]
    ink, pictures, last = (item.item_object_id for item in full.items)
    ada.update_collection_item(slug, ink, note="moved", position=1)
    assert names(ada.get_collection(slug)) == ["ada/pictures", "ada/ink", nested]
    assert ada.get_collection(slug).items[1].note == "moved"
    ada.update_collection_item(slug, last, position=0)
    ada.update_collection_item(slug, pictures, position=999, note="")
    assert names(ada.get_collection(slug)) == [nested, "ada/ink", "ada/pictures"]
    ada.delete_collection_item(slug, ink)
    with refused(404):
        ada.delete_collection_item(slug, ink)
    ada.delete_collection_item(slug, ink, missing_ok=True)
    for wrong in (ink, "x", "f" * 24):
        with refused(404):
            ada.update_collection_item(slug, wrong, note="x")
    other = ada.create_collection("Not this one").slug
    with refused(404):
        ada.delete_collection_item(other, pictures)
    ada.delete_collection(nested)
    assert names(ada.get_collection(slug)) == ["ada/pictures"]


def test_items_follow_their_repos(ada: HfApi) -> None:
    slug = ada.create_collection("Follow").slug
    for name in ("ada/goes", "ada/stays", "ada/old"):
        ada.create_repo(name)
        ada.add_collection_item(slug, name, "model")
    ada.move_repo("ada/old", "ada/new")
    ada.delete_repo("ada/goes")
    found = ada.get_collection(slug)
    assert names(found) == ["ada/stays", "ada/new"]
    ada.update_collection_item(slug, found.items[1].item_object_id, position=0)
    assert names(ada.get_collection(slug)) == ["ada/new", "ada/stays"]
    second = ada.create_collection("By the old name").slug
    assert names(ada.add_collection_item(second, "ada/old", "model")) == ["ada/new"]


def test_a_private_collection_is_for_its_owners(
    ada: HfApi, bob: HfApi, eve: HfApi, nobody: HfApi
) -> None:
    own = ada.create_collection("Mine alone", private=True).slug
    ours = ada.create_collection("Ours", namespace="acme", private=True).slug
    for stranger in (bob, eve, nobody):
        with refused(404):
            stranger.get_collection(own)
    assert bob.get_collection(ours).title == "Ours"
    for stranger in (eve, nobody):
        with refused(404):
            stranger.get_collection(ours)
        assert ours not in [found.slug for found in stranger.list_collections(owner="acme")]
    assert ours in [found.slug for found in bob.list_collections(owner="acme")]
    ada.update_collection_metadata(ours, private=False)
    assert nobody.get_collection(ours).title == "Ours"


def test_only_who_may_write_to_the_namespace_keeps_its_collections(
    ada: HfApi, bob: HfApi, eve: HfApi, nobody: HfApi, styles: list[str]
) -> None:
    slug = ada.create_collection("Kept", namespace="acme").slug
    item = ada.add_collection_item(slug, "ada/ink", "model").items[0].item_object_id
    for api, status in ((bob, 403), (eve, 403), (nobody, 401)):
        for attempt in (
            lambda api=api: api.create_collection("Theirs", namespace="acme"),
            lambda api=api: api.update_collection_metadata(slug, title="Theirs"),
            lambda api=api: api.add_collection_item(slug, "ada/pictures", "dataset"),
            lambda api=api: api.update_collection_item(slug, item, note="theirs"),
            lambda api=api: api.delete_collection_item(slug, item),
            lambda api=api: api.delete_collection(slug),
        ):
            with refused(status):
                attempt()
    kept = ada.get_collection(slug)
    assert (kept.title, names(kept), kept.items[0].note) == ("Kept", ["ada/ink"], None)


def test_a_private_repo_in_a_public_collection_is_not_told_of(
    ada: HfApi, bob: HfApi, eve: HfApi, styles: list[str]
) -> None:
    slug = ada.create_collection("Partly hidden", namespace="acme").slug
    for name, kind in (("ada/secret", "model"), ("ada/ink", "model"), ("ada/pictures", "dataset")):
        ada.add_collection_item(slug, name, kind)  # type: ignore[arg-type]
    hidden = ada.create_collection("Hidden too", private=True).slug
    ada.add_collection_item(slug, hidden, "collection")
    assert names(ada.get_collection(slug)) == ["ada/secret", "ada/ink", "ada/pictures", hidden]
    for other in (bob, eve):
        assert names(other.get_collection(slug)) == ["ada/ink", "ada/pictures"]
        assert list(other.list_collections(item="models/ada/secret")) == []
        with refused(404):
            other.add_collection_item(
                other.create_collection("Guess", exists_ok=True).slug, "ada/secret", "model"
            )
    assert slug in [found.slug for found in ada.list_collections(item="models/ada/secret")]


def test_listing_filters_orders_and_pages(
    running: RunningHub, ada: HfApi, tokens: dict[str, str], styles: list[str]
) -> None:
    fay = HfApi(endpoint=running.url, token=tokens["fay"])
    one, two, three = (fay.create_collection(f"Order {n}").slug for n in range(3))
    assert slugs(ada.list_collections(owner="FAY")) == [one, two, three]
    fay.update_collection_metadata(three, position=0)
    assert slugs(ada.list_collections(owner="fay")) == [three, one, two]
    assert fay.get_collection(two).position == 2
    for n in range(5):
        fay.create_repo(f"fay/r{n}")
        fay.add_collection_item(one, f"fay/r{n}", "model")
    fay.add_collection_item(two, "ada/pictures", "dataset")
    newest, second = fay.list_collections(sort="lastModified", limit=2)
    assert (newest.slug, names(newest)) == (two, ["ada/pictures"])
    assert (second.slug, names(second)) == (one, [f"fay/r{n}" for n in range(4)])
    assert len(fay.get_collection(one).items) == 5
    holding = fay.list_collections(owner=["fay", "nobody-here"], item="datasets/ada/pictures")
    assert slugs(holding) == [two]
    assert list(ada.list_collections(item=["papers/2311.12983", "models/ada/nothing"])) == []
    address = f"{running.url}/api/collections"
    assert [each["slug"] for each in httpx2.get(f"{address}?q=ORDER%202").json()] == [three]
    assert httpx2.get(f"{address}?q=%25").json() == []
    for owners, order in (
        ("owner=fay", [three, one, two]),
        ("owner=fay&owner=x", [two, one, three]),
    ):
        page = httpx2.get(f"{address}?{owners}&limit=2")
        rest = httpx2.get(page.links["next"]["url"])
        assert [each["slug"] for each in page.json() + rest.json()] == order
        assert "next" not in rest.links
    assert httpx2.get(f"{address}?cursor=5").status_code == 422


def slugs(found: Iterable[Collection]) -> list[str]:
    return [each.slug for each in found]


def test_the_hf_command_keeps_collections(
    running: RunningHub, ada: HfApi, styles: list[str], tmp_path: Path
) -> None:
    env = environ | {"HF_ENDPOINT": running.url, "HF_TOKEN": ada.token, "HF_HOME": str(tmp_path)}

    def hf(*command: str) -> str:
        program = str(Path(sys.executable).with_name("hf"))
        done = subprocess.run(
            [program, "collections", *command],
            check=True,
            capture_output=True,
            text=True,
            env=env,
        )
        return done.stdout

    made = re.search(r"ada/by-command-[0-9a-f]{24}", hf("create", "By command"))
    assert made is not None
    hf("add-item", made[0], "ada/ink", "model", "--note", "noted")
    assert "noted" in hf("info", made[0])
    assert made[0] in hf("ls", "--owner", "ada", "--format", "quiet")


@both_databases
def test_both_databases_keep_collections(
    hub: Hub, admin: Viewer, monkeypatch: pytest.MonkeyPatch
) -> None:
    eve, _ = make_user(hub, "eve")
    monkeypatch.setattr(curation, "MAX_ITEMS", 3)
    monkeypatch.setattr(curation, "MAX_OF_NAMESPACE", 2)

    def add(name: str) -> list[str]:
        with hub.db.write() as session:
            curation.add_repo(session, admin, kept, RepoType.MODEL, f"admin/{name}")
        return seen(admin)

    def seen(viewer: Viewer) -> list[str]:
        with hub.db.read() as session:
            found = collections.contents(session, viewer, [kept])
            return [collections.name_of(each) for each in found[kept.id or 0]]

    with hub.db.write() as session:
        made = [
            repos.create_repo(session, admin, "admin", f"r{n}", private=n == 1) for n in range(4)
        ]
        kept = curation.create(session, admin, "admin", title="Kept")
        child = curation.create(session, admin, "admin", title="Child", private=True)
    with hub.db.write() as session, pytest.raises(BadRequest, match="the most"):
        curation.create(session, admin, "admin", title="One more")
    with ThreadPoolExecutor() as pool:
        list(pool.map(add, ("r0", "r1")))
    assert sorted(seen(admin)) == ["admin/r0", "admin/r1"]
    assert seen(eve) == ["admin/r0"]
    with pytest.raises(ItemExists):
        add("r0")
    with hub.db.write() as session:
        curation.add_collection(session, admin, kept, collections.slug_of(child))
    with pytest.raises(BadRequest, match="at most 3 items"):
        add("r2")
    with hub.db.write() as session:
        (last,) = collections.contents(session, admin, [kept])[kept.id or 0][2:]
        curation.change_item(session, admin, kept, last.item.id or 0, position=0, note="x")
    assert seen(admin)[0] == collections.slug_of(child)
    assert seen(eve) == ["admin/r0"]
    with hub.db.write() as session:
        repos.delete_repo(session, admin, made[0])
        curation.change(session, admin, child, position=0)
    with hub.db.read() as session:
        listed = collections.listed(session, admin, owners=["admin"], search="k", limit=9)
        assert [each.title for each in listed] == ["Kept"]
        listed = collections.listed(session, admin, items=["models/ADMIN/r1"], limit=9)
        assert [each.title for each in listed] == ["Kept"]
        listed = collections.listed(session, admin, owners=["admin"], limit=9)
        assert [(each.title, each.position) for each in listed] == [("Child", 0), ("Kept", 1)]
    with hub.db.write() as session:
        curation.remove(session, admin, child)
    assert seen(admin) == ["admin/r1"]
    with hub.db.write() as session, pytest.raises(CollectionNotFound):
        curation.change(session, admin, child, title="Gone")


def test_a_collection_has_a_page(
    hub: Hub, admin: Viewer, client: TestClient, tmp_path: Path
) -> None:
    files = {"ink.safetensors": lora_bytes(tmp_path)}
    publish_files(hub, admin, "admin/ink", files)
    publish_files(hub, admin, "admin/withheld", files, private=True)
    publish_files(hub, admin, "admin/words", {}, type=RepoType.DATASET)
    with hub.db.write() as session:
        pack = curation.create(session, admin, "admin", title="Old", description="For <b>all")
        other = curation.create(session, admin, "admin", title="Other")
        for name in ("ink", "withheld"):
            note = "use it <i>so"
            curation.add_repo(session, admin, pack, RepoType.MODEL, f"admin/{name}", note)
        curation.add_repo(session, admin, pack, RepoType.DATASET, "admin/words")
        curation.add_collection(session, admin, pack, collections.slug_of(other))
        old = f"/collections/{collections.slug_of(pack)}"
        pack = curation.change(session, admin, pack, title="New & bold", theme="pink")
        curation.create(session, admin, "admin", title="Kept back", private=True)
        new = f"/collections/{collections.slug_of(pack)}"
    assert client.get(old).headers["Location"] == new
    mine = ["admin/ink", "admin/withheld"]
    text = client.get(new, headers={"Accept": "text/html"}).text
    for shown in (
        "New &amp; bold",
        "For &lt;b&gt;all",
        "use it &lt;i&gt;so",
        "3 items",
        'href="/admin/ink"',
        'href="/datasets/admin/words"',
        f'href="/collections/{collections.slug_of(other)}"',
    ):
        assert shown in text
    assert "withheld" not in text
    assert "4 items" in client.get(new, headers=bearer(hub.admin_token)).text
    slug = collections.slug_of(pack)
    assert f'href="/?collection={slug}"' in text
    publish_files(hub, admin, "admin/outside", files)
    for headers, inside in (({}, ["admin/ink"]), (bearer(hub.admin_token), mine)):
        answer = client.get(f"/api/adapters?collection={slug}", headers=headers).json()
        assert sorted(item["repo"] for item in answer["items"]) == inside
        assert dict(answer["facets"])["author"][0]["count"] == len(inside)
    assert "outside" not in client.get(f"/?collection={slug}").text
    unknown = client.get("/api/adapters?collection=admin/x")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "CollectionNotFound")
    of_admin = client.get("/admin").text
    assert (new in of_admin, "Kept back" in of_admin) == (True, False)
    empty = f"/collections/{collections.slug_of(other)}"
    assert "Nothing in it" in client.get(empty).text
    missing = client.get("/collections/admin/x", headers={"Accept": "text/html"})
    assert (missing.status_code, "Not here" in missing.text) == (404, True)
