"""The projection: what files at `main` say is in the catalogue once a commit is answered."""

import hashlib
import json
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from sqlmodel import Session, col, select
from starlette.testclient import TestClient

from hub.adapters import projection
from hub.adapters.models import Adapter, Card, Fact, HashAlias, Identification, Preview
from hub.adapters.service import catch_up, publish, reindex
from hub.app import create_app
from hub.context import Hub
from hub.repos import commits, refs
from hub.repos import service as repos
from hub.repos.models import Event, Repo, RepoType
from hub.repos.operations import Add, Delete
from hub.users.service import Viewer
from tests.fixtures.adapters import make_adapter
from tests.fixtures.catalogue import CARD, lora_bytes, picture, publish_files
from tests.fixtures.malformed import MALFORMED, ODD
from tests.hub.conftest import bearer, both_databases, make_user

FACETS = ("kind", "family", "algorithm", "tag", "author")
METADATA = {"modelspec.trigger_phrase": "inkish", "ss_output_name": "ink_v1"}


@pytest.fixture
def ink(tmp_path: Path) -> dict[str, bytes]:
    return {
        "ink.safetensors": lora_bytes(tmp_path, rank=4, metadata=METADATA),
        "steps/ink-000100.safetensors": lora_bytes(tmp_path, rank=8, seed=1),
        "README.md": CARD.encode(),
        "second.png": picture(colour="navy"),
        "samples/0.png": picture(80, 40, parameters="a cat\nNegative prompt: dog"),
        "samples/1.png": picture(colour="red"),
        "cut.png": picture(300, 300)[:-200],
    }


def get(client: TestClient, path: str, token: str | None = None, **query: Any) -> Any:
    headers = bearer(token) if token else {}
    answer = client.get(path, params=query, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


@both_databases
def test_a_commit_is_in_the_catalogue_when_it_is_answered(
    hub: Hub, admin: Viewer, client: TestClient, ink: dict[str, bytes]
) -> None:
    publish_files(hub, admin, "admin/ink", ink)
    found = get(client, "/api/adapters/admin/ink/ink.safetensors")
    data = ink["ink.safetensors"]
    sha256 = hashlib.sha256(data).hexdigest()
    header_end = 8 + int.from_bytes(data[:8], "little")
    assert found["hashes"] == {
        "sha256": sha256,
        "autov1": None,
        "autov2": sha256[:10],
        "autov3": hashlib.sha256(data[header_end:]).hexdigest()[:12],
        "blake3": blake3(data).hexdigest(),
        "crc32": f"{zlib.crc32(data):08x}",
    }
    assert {name: found[name] for name in ("title", "kind", "algorithm", "family", "dialect")} == {
        "title": "Ink drawings",
        "kind": "adapter",
        "algorithm": "lora",
        "family": "tiny-sd",
        "dialect": "kohya",
    }
    assert (found["rank_min"], found["rank_max"], found["size_bytes"]) == (4, 4, len(data))
    assert found["triggers"] == [
        {"word": "inkish", "source": "metadata", "confidence": 0.95},
        {"word": "ink style", "source": "card", "confidence": 0.9},
    ]
    sources = {fact["name"]: (fact["value"], fact["source"]) for fact in found["facts"]}
    assert sources["license"] == ("cc-by-4.0", "card")
    assert sources["base_model"] == ("demo/tiny-sd", "card")
    assert sources["output_name"] == ("ink_v1", "metadata")
    assert sources["ranks"] == ({"min": 4, "max": 4}, "tensors")
    assert sources["alphas"] == ({"min": 2.0, "max": 2.0}, "tensors")
    assert found["files"] == 2
    other = get(client, "/api/adapters/admin/ink/steps/ink-000100.safetensors")
    assert (other["title"], other["rank_max"]) == ("ink-000100", 8)


def test_a_configuration_is_of_the_peft_files_beside_it_alone(
    hub: Hub, admin: Viewer, client: TestClient, tmp_path: Path
) -> None:
    files = {}
    for name, dialect in (("ink", "peft"), ("bare/ink", "peft"), ("kohya", "kohya")):
        made = make_adapter(tmp_path / f"{name}.safetensors", dialect=dialect, alphas=None)
        files[f"{name}.safetensors"] = made.path.read_bytes()
    config = {"peft_type": "LORA", "lora_alpha": 6}
    files["adapter_config.json"] = json.dumps(config).encode()
    publish_files(hub, admin, "admin/ink", files)
    found = {
        path: get(client, f"/api/adapters/admin/ink/{path}.safetensors")
        for path in ("ink", "bare/ink", "kohya")
    }
    alphas = {
        path: [fact["value"] for fact in item["facts"] if fact["name"] == "alphas"]
        for path, item in found.items()
    }
    assert alphas == {"ink": [{"min": 6.0, "max": 6.0}], "bare/ink": [], "kohya": []}
    assert {item["kind"] for item in found.values()} == {"adapter"}
    assert [found["ink"]["warnings"], found["kohya"]["warnings"]] == [[], []]
    (warning,) = found["bare/ink"]["warnings"]
    assert warning["message"] == "its adapter_config.json, which holds its alphas, is missing"


def test_previews_come_in_the_cards_order_with_their_prompts(
    hub: Hub, admin: Viewer, client: TestClient, ink: dict[str, bytes]
) -> None:
    publish_files(hub, admin, "admin/ink", ink)
    found = get(client, "/api/adapters/admin/ink/ink.safetensors")["previews"]
    assert [(p["path"], p["prompt"], p["negative_prompt"]) for p in found] == [
        ("second.png", "a fox, ink style", None),
        ("samples/0.png", "a cat", "dog"),
        ("samples/1.png", None, None),
    ]
    assert (found[1]["width"], found[1]["height"]) == (80, 40)
    with hub.db.read() as session:
        cut = session.exec(select(Preview).where(Preview.path == "cut.png")).one()
        assert "damaged" in (cut.problem or "")


@both_databases
def test_malformed_files_are_shown_with_their_reason_and_fail_no_commit(
    hub: Hub, admin: Viewer, client: TestClient
) -> None:
    # The largest are the header reader's own business.
    made = ((case, case.make()) for case in MALFORMED)
    bad = [(case, content) for case, content in made if len(content) < 1_000_000]
    files = {f"bad/{n}.safetensors": content for n, (_, content) in enumerate(bad)}
    files |= {f"odd/{n}.safetensors": make() for n, make in enumerate(ODD.values())}
    publish_files(hub, admin, "admin/bad", files)
    found: dict[str, Any] = {}
    cursor = ""
    while cursor is not None:
        page = get(client, "/api/adapters", limit=200, cursor=cursor)
        found |= {item["file"]: item for item in page["items"]}
        cursor = page["next_cursor"]
    assert found.keys() == files.keys()
    for n, (case, _) in enumerate(bad):
        item = found[f"bad/{n}.safetensors"]
        assert item["kind"] == "unreadable", case.name
        assert item["problem"].startswith(f"bad/{n}.safetensors: "), case.name
        assert f"({case.reason})" in item["problem"], case.name
    for n, name in enumerate(ODD):
        item = found[f"odd/{n}.safetensors"]
        assert (item["kind"], item["problem"]) == ("other", None), name
    assert client.get("/admin/bad").status_code == 200


def test_what_leaves_main_leaves_the_catalogue(
    hub: Hub, admin: Viewer, client: TestClient, ink: dict[str, bytes]
) -> None:
    publish_files(hub, admin, "admin/ink", ink)
    gone = [Delete("ink.safetensors"), Delete("README.md")]
    publish(hub, admin, "admin", "ink", operations=gone, message="gone")
    found = get(client, "/api/adapters")
    assert [item["file"] for item in found["items"]] == ["steps/ink-000100.safetensors"]
    assert found["items"][0]["title"] == "ink"
    assert found["facets"]["tag"] == []
    assert get(client, "/api/adapters", q="brush")["total"] == 0


def test_another_branch_changes_nothing(
    hub: Hub, admin: Viewer, client: TestClient, ink: dict[str, bytes]
) -> None:
    publish_files(hub, admin, "admin/ink", ink)
    with hub.db.write() as session:
        repo = repos.get_repo(session, admin, "admin", "ink")
        refs.create_branch(session, admin, repo, "try")
    gone = [Delete("ink.safetensors")]
    publish(hub, admin, "admin", "ink", operations=gone, message="gone", branch="try")
    assert get(client, "/api/adapters")["total"] == 2


@both_databases
def test_a_deleted_repo_leaves_the_catalogue_and_its_index(
    hub: Hub, admin: Viewer, client: TestClient, ink: dict[str, bytes]
) -> None:
    publish_files(hub, admin, "admin/ink", ink)
    with hub.db.write() as session:
        repos.delete_repo(session, admin, repos.get_repo(session, admin, "admin", "ink"))
    assert get(client, "/api/adapters", q="ink")["total"] == 0
    catch_up(hub)
    with hub.db.read() as session:
        assert session.exec(select(Event).where(col(Event.done_at).is_(None))).all() == []


@both_databases
def test_what_a_crash_left_out_is_caught_up(
    hub: Hub,
    admin: Viewer,
    client: TestClient,
    ink: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def die(hub: Hub, repo_id: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hub.adapters.service.project", die)
        with pytest.raises(KeyboardInterrupt):
            publish_files(hub, admin, "admin/ink", ink)
    assert get(client, "/api/adapters")["total"] == 0
    assert catch_up(hub) == 1
    assert get(client, "/api/adapters")["total"] == 2
    assert catch_up(hub) == 0


def test_one_repo_that_cannot_be_read_holds_up_neither_commits_nor_other_repos(
    hub: Hub,
    admin: Viewer,
    client: TestClient,
    ink: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(hub: Hub, repo_id: int) -> None:
        raise ValueError("a file nobody thought of")

    with monkeypatch.context() as patch:
        patch.setattr("hub.adapters.service.project", fail)
        publish_files(hub, admin, "admin/odd", ink)
        publish_files(hub, admin, "admin/ink", ink)

    def fail_on_the_first(hub: Hub, repo_id: int) -> None:
        (fail if repo_id == 1 else projection.project)(hub, repo_id)

    with monkeypatch.context() as patch:
        patch.setattr("hub.adapters.service.project", fail_on_the_first)
        catch_up(hub)
    assert {item["repo"] for item in get(client, "/api/adapters")["items"]} == {"admin/ink"}
    assert catch_up(hub) == 1
    assert get(client, "/api/adapters")["total"] == 4


def test_pictures_of_any_shape_and_a_cache_without_room_fail_no_commit(
    hub: Hub, admin: Viewer, client: TestClient, ink: dict[str, bytes]
) -> None:
    hub.thumbs.parent.mkdir(parents=True, exist_ok=True)
    hub.thumbs.write_bytes(b"no folder can be made here")
    publish_files(hub, admin, "admin/ink", ink | {"narrow.png": picture(1, 256)})
    found = get(client, "/api/adapters/admin/ink/ink.safetensors")["previews"]
    assert "narrow.png" in [p["path"] for p in found]


def test_the_next_start_catches_up(
    hub: Hub, admin: Viewer, ink: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("hub.adapters.service.project", lambda hub, repo_id: None)
        publish_files(hub, admin, "admin/ink", ink)
    with TestClient(create_app(hub.settings, hub=hub), base_url="http://127.0.0.1:8470") as client:
        while get(client, "/api/adapters")["total"] < 2:
            time.sleep(0.02)


def everything(session: Session) -> list[list[dict[str, Any]]]:
    def rows(table: Any, *but: str) -> Iterator[dict[str, Any]]:
        for row in session.exec(select(table)).all():
            yield row.model_dump(exclude=set(but))

    tables = [
        rows(Adapter, "id", "indexed_at"),
        rows(Fact, "adapter_id"),
        *(rows(table) for table in (Card, HashAlias, Identification, Preview)),
    ]
    return [sorted(table, key=str) for table in tables]


@both_databases
def test_reindex_makes_the_same_catalogue_from_blobs_alone(
    hub: Hub, admin: Viewer, ink: dict[str, bytes], client: TestClient
) -> None:
    publish_files(hub, admin, "admin/ink", ink)
    publish_files(hub, admin, "admin/bad", {"bad.safetensors": b"\xff" * 16})
    with hub.db.read() as session:
        before = everything(session)
    with hub.db.write() as session:
        for adapter in session.exec(select(Adapter)):
            adapter.title = adapter.family = "wrong"
            session.add(adapter)
        for identification in session.exec(select(Identification)):
            identification.document = "{}"
            session.add(identification)
    assert reindex(hub) == 2
    with hub.db.read() as session:
        assert everything(session) == before
    assert get(client, "/api/adapters", q="brush")["total"] == 2


def test_known_bytes_are_not_read_again(
    hub: Hub, admin: Viewer, ink: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_files(hub, admin, "admin/ink", ink)
    read = []
    identify = projection.identify_file
    monkeypatch.setattr(
        projection, "identify_file", lambda file, **k: read.append(file.name) or identify(file, **k)
    )
    publish_files(hub, admin, "admin/ink", {"notes.txt": b"more"})
    assert read == []
    publish_files(hub, admin, "admin/ink", {"new.safetensors": ink["ink.safetensors"] + b""})
    assert read == []


def test_a_commit_that_lands_while_another_is_read_wins(
    hub: Hub, admin: Viewer, client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = lora_bytes(tmp_path, rank=2), lora_bytes(tmp_path, rank=16)
    read = projection._read
    raced = []

    def slow(hub: Hub, repo_id: int, *rest: Any) -> Any:
        reading = read(hub, repo_id, *rest)
        if not raced:
            raced.append(True)
            stored = hub.store.put([second], size=len(second))
            with hub.db.write() as session:
                repo = session.get_one(Repo, repo_id)
                operation = Add("a.safetensors", stored, lfs=False)
                commits.create(session, admin, repo, operations=[operation], message="race")
        return reading

    monkeypatch.setattr(projection, "_read", slow)
    publish_files(hub, admin, "admin/ink", {"a.safetensors": first})
    assert get(client, "/api/adapters/admin/ink/a.safetensors")["rank_max"] == 16


def test_lost_bytes_are_told_and_stop_nothing(
    hub: Hub, admin: Viewer, client: TestClient, ink: dict[str, bytes]
) -> None:
    publish_files(hub, admin, "admin/ink", ink)
    with hub.db.read() as session:
        adapter = session.exec(select(Adapter).where(Adapter.position == 0)).one()
    hub.store.delete(adapter.sha256)
    reindex(hub)
    found = get(client, "/api/adapters/admin/ink/ink.safetensors")
    assert found["problem"] == "ink.safetensors: the blob store has lost its bytes"


# Hashes


@both_databases
def test_every_kind_of_hash_in_any_case_finds_the_file(
    hub: Hub, admin: Viewer, client: TestClient, ink: dict[str, bytes]
) -> None:
    publish_files(hub, admin, "admin/ink", ink)
    hashes = get(client, "/api/adapters/admin/ink/ink.safetensors")["hashes"]
    turned = bytes.fromhex(hashes["crc32"])[::-1].hex()
    data = ink["ink.safetensors"]
    whole = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    spelled = [h for h in hashes.values() if h]
    spelled += [hashes["sha256"].upper(), f"sha256:{hashes['sha256']}", f"0x{whole}"]
    spelled += [f"blake3:{hashes['blake3']}", turned.upper(), hashes["sha256"][:8]]
    for text in spelled:
        items = get(client, f"/api/hashes/{text}")["items"]
        assert [match["item"]["file"] for match in items] == ["ink.safetensors"], text
        assert get(client, "/api/adapters", q=text)["total"] == 1, text


@pytest.mark.parametrize(
    ("text", "status", "code"),
    [
        ("f" * 64, 404, "HashNotFound"),
        ("abc", 422, "BadField"),
        ("x" * 64, 422, "BadField"),
        ("a" * 65, 422, "BadField"),
        ("a" * 101, 422, "BadField"),
        ("%25%27%22", 422, "BadField"),
    ],
)
def test_hashes_that_are_not_here(client: TestClient, text: str, status: int, code: str) -> None:
    answer = client.get(f"/api/hashes/{text}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_the_hash_of_nothing_is_no_name(hub: Hub, admin: Viewer, client: TestClient) -> None:
    publish_files(hub, admin, "admin/empty", {"e.safetensors": b"\x02" + b"\0" * 7 + b"{}"})
    assert get(client, "/api/adapters")["total"] == 1
    assert client.get(f"/api/hashes/{hashlib.sha256().hexdigest()}").status_code == 404


# Visibility


def test_private_repos_are_nowhere_for_others(
    hub: Hub, admin: Viewer, client: TestClient, ink: dict[str, bytes]
) -> None:
    maren, token = make_user(hub, "maren")
    _, stranger = make_user(hub, "stranger")
    publish_files(hub, maren, "maren/secret", ink, private=True)
    path = "/api/adapters/maren/secret/ink.safetensors"
    mine = get(client, path, token)
    thumb = mine["previews"][0]["sha256"]
    for who in (None, stranger):
        headers = bearer(who) if who else {}
        found = get(client, "/api/adapters", who)
        assert found == {
            "items": [],
            "total": 0,
            "facets": {name: [] for name in FACETS},
            "next_cursor": None,
        }
        assert get(client, "/api/adapters", who, q="inkish")["total"] == 0
        for hidden in (
            path,
            f"/api/hashes/{mine['sha256']}",
            f"/static/thumbs/{thumb}-320.webp",
            "/maren/secret",
            "/maren/secret/tree/main",
            "/maren/secret/blob/main/README.md",
            "/maren/secret/commits/main",
        ):
            assert client.get(hidden, headers=headers).status_code == 404, hidden
        assert "secret" not in client.get("/maren", headers=headers).text
        assert "secret" not in client.get("/", headers=headers).text
    assert get(client, "/api/adapters", token)["total"] == 2
    picture = client.get(f"/static/thumbs/{thumb}-320.webp", headers=bearer(token))
    assert picture.headers["Cache-Control"] == "private, max-age=31536000, immutable"
    assert get(client, "/api/adapters", hub.admin_token)["total"] == 2


def test_a_public_thumbnail_may_be_kept_for_ever(
    hub: Hub, admin: Viewer, client: TestClient
) -> None:
    content = picture()
    publish_files(hub, admin, "admin/p", {"a.png": content})
    sha256 = hashlib.sha256(content).hexdigest()
    answer = client.get(f"/static/thumbs/{sha256}-160.webp")
    assert answer.headers["Content-Type"] == "image/webp"
    assert answer.headers["Cache-Control"] == "public, max-age=31536000, immutable"
    assert client.get(f"/static/thumbs/{sha256}-161.webp").status_code == 404
    assert client.get(f"/static/thumbs/{'0' * 64}-160.webp").status_code == 404


def test_a_dataset_has_a_page_and_is_no_adapter(
    hub: Hub, admin: Viewer, client: TestClient, ink: dict[str, bytes]
) -> None:
    publish_files(hub, admin, "admin/pictures", ink, type=RepoType.DATASET)
    assert get(client, "/api/adapters")["total"] == 0
    assert client.get("/datasets/admin/pictures").status_code == 200
    assert client.get("/admin/pictures").status_code == 404
