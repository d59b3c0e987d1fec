"""Search over the API: words, facets, order, pages; and queries that try to be something else."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlmodel import select
from starlette.testclient import TestClient

from hub.adapters.search import Sort
from hub.context import Hub
from hub.repos.models import Repo
from hub.users.service import Viewer
from tests.fixtures.catalogue import lora_bytes, publish_files
from tests.hub.conftest import both_databases, make_user

MADE = (
    # name, family, rank, tags, downloads, text
    ("admin/ink-fox", "tiny-sd", 4, "[style, fox, lora, 'template:sd-lora']", 5, "# Ink fox\n\nBrush lines."),
    ("admin/oil-fox", "tiny-sd", 8, "[style, oil]", 50, "# Oil fox\n\nThick paint, not ink."),
    ("maren/robot", "sd15", 16, "[concept]", 9, "# Robot\n\nA tin robot. Größe, naïve_name"),
    ("maren/sky", "sd15", 32, "[style, sky]", 7, "# Sky\n\nClouds."),
)  # fmt: skip


@pytest.fixture
def catalogue(hub: Hub, admin: Viewer, tmp_path: Path) -> Hub:
    make_user(hub, "maren")
    for n, (name, family, rank, tags, downloads, text) in enumerate(MADE):
        files = {
            "a.safetensors": lora_bytes(tmp_path, family=family, rank=rank, seed=n),
            "README.md": f"---\ntags: {tags}\n---\n{text}\n".encode(),
        }
        publish_files(hub, admin, name, files)
        with hub.db.write() as session:
            repo = session.exec(select(Repo).where(Repo.key == name)).one()
            repo.downloads = downloads
            session.add(repo)
    return hub


def names(client: TestClient, **query: Any) -> list[str]:
    answer = client.get("/api/adapters", params=query)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["total"] == len(found["items"])
    return [item["repo"] for item in found["items"]]


@both_databases
def test_words_filters_and_orders(catalogue: Hub, client: TestClient) -> None:
    everything = ["maren/sky", "maren/robot", "admin/oil-fox", "admin/ink-fox"]
    assert names(client) == everything
    # The one that is called so before the one that only mentions it.
    assert names(client, q="ink") == ["admin/ink-fox", "admin/oil-fox"]
    assert names(client, q="FOX bru") == ["admin/ink-fox"]
    assert names(client, q="große") == [] if catalogue.db.is_sqlite is False else ["maren/robot"]
    assert names(client, q="name") == ["maren/robot"]
    assert names(client, q="nothing") == []
    assert names(client, q="…") == []
    assert names(client, q="   ") == everything
    assert sorted(names(client, tag="style")) == ["admin/ink-fox", "admin/oil-fox", "maren/sky"]
    assert names(client, tag=["style", "FOX"]) == ["admin/ink-fox"]
    assert sorted(names(client, tag="style", not_tag="fox")) == ["admin/oil-fox", "maren/sky"]
    assert names(client, author="MAREN") == ["maren/sky", "maren/robot"]
    assert names(client, family="sd15", rank_min=17) == ["maren/sky"]
    assert names(client, rank_max=8, sort="name") == ["admin/ink-fox", "admin/oil-fox"]
    assert len(names(client, family=["sd15", "tiny-sd"])) == 4
    assert names(client, algorithm="loha") == []
    assert names(client, kind="checkpoint") == []
    assert names(client, rank_min="", rank_max="", author="", sort="", cursor="") == everything
    assert names(client, sort="downloads") == [
        "admin/oil-fox",
        "maren/robot",
        "maren/sky",
        "admin/ink-fox",
    ]
    assert names(client, sort="size")[0] == "maren/sky"


@both_databases
def test_facets_count_what_choosing_them_would_give(catalogue: Hub, client: TestClient) -> None:
    def facets(**query: Any) -> dict[str, dict[str, int]]:
        found = client.get("/api/adapters", params=query).json()["facets"]
        return {name: {v["value"]: v["count"] for v in values} for name, values in found.items()}

    assert facets() == {
        "kind": {"adapter": 4},
        "family": {"sd15": 2, "tiny-sd": 2},
        "algorithm": {"lora": 4},
        "tag": {"style": 3, "concept": 1, "fox": 1, "oil": 1, "sky": 1},
        "author": {"admin": 2, "maren": 2},
    }
    # A family chosen leaves the other one on offer; a tag chosen narrows the tags.
    assert facets(family="sd15")["family"] == {"sd15": 2, "tiny-sd": 2}
    assert facets(family="sd15")["author"] == {"maren": 2}
    assert facets(tag="fox")["tag"] == {"fox": 1, "style": 1}
    assert facets(q="ink")["family"] == {"tiny-sd": 2}
    for name, values in facets().items():
        for value, count in values.items():
            assert len(names(client, **{name: value})) == count


@both_databases
def test_pages_follow_each_other_without_gap_or_repeat(catalogue: Hub, client: TestClient) -> None:
    for sort in (*Sort, None):
        query = {"q": "a", "limit": 1} | ({"sort": sort} if sort else {})
        whole = client.get("/api/adapters", params=query | {"limit": 50}).json()
        assert whole["total"] == 4
        seen, cursor = [], None
        for _ in range(4):
            page = client.get("/api/adapters", params=query | {"cursor": cursor or ""}).json()
            seen += page["items"]
            cursor = page["next_cursor"]
        assert cursor is None
        assert seen == whole["items"], sort


TITLES = ("Ärger", "ärmel", "Éclat", "Zebra", "zinc", "Ωmega", "İstanbul", "straße", "STRASSE")


@both_databases
def test_pages_by_name_have_every_title_of_every_alphabet(
    hub: Hub, admin: Viewer, client: TestClient, tmp_path: Path
) -> None:
    for n, title in enumerate(TITLES):
        files = {
            "a.safetensors": lora_bytes(tmp_path, seed=n),
            "README.md": f"# {title}\n".encode(),
        }
        publish_files(hub, admin, f"admin/r{n}", files)
    whole = client.get("/api/adapters", params={"sort": "name"}).json()["items"]
    assert {item["title"] for item in whole} == set(TITLES)
    seen, cursor = [], ""
    while cursor is not None and len(seen) <= len(TITLES):
        page = client.get("/api/adapters", params={"sort": "name", "limit": 1, "cursor": cursor})
        seen += page.json()["items"]
        cursor = page.json()["next_cursor"]
    assert [item["title"] for item in seen] == [item["title"] for item in whole]


def test_one_item_per_repo_on_request(
    hub: Hub, admin: Viewer, client: TestClient, tmp_path: Path
) -> None:
    small, large = lora_bytes(tmp_path, rank=2), lora_bytes(tmp_path, rank=32)
    files = {"a.safetensors": small, "b.safetensors": large}
    publish_files(hub, admin, "admin/two", files)
    assert names(client) == ["admin/two", "admin/two"]
    answer = client.get("/api/adapters", params={"by_repo": True}).json()
    assert [item["file"] for item in answer["items"]] == ["a.safetensors"]
    assert answer["facets"]["kind"] == [{"value": "adapter", "count": 1}]
    answer = client.get("/api/adapters", params={"by_repo": True, "rank_min": 8}).json()
    assert [item["file"] for item in answer["items"]] == ["b.safetensors"]


NASTY = [
    '"', "'", "*", "%", "_", "\\", "NEAR(a b)", "name:ink", "a AND b", "NOT", "-ink", "a^2", "(", ")",
    "ink*", 'a" OR "b', "'; DROP TABLE adapter;--", "\0", "a\0b", ".", "{a b}: c", "+ink", "'a':*&b",
    "a & !b", "<->", "ink" * 300, " ".join("ink" for _ in range(200)), "\u202e", "\U0001f98a", "é̀́" * 50,
]  # fmt: skip


@both_databases
def test_no_query_is_an_operator_or_an_error(catalogue: Hub, client: TestClient) -> None:
    for text in NASTY:
        for name in ("q", "tag", "not_tag", "family", "author"):
            answer = client.get("/api/adapters", params={name: text})
            expected = (400,) if "\0" in text else (200, 422)
            assert answer.status_code in expected, (name, text, answer.text)
    assert names(client, q="name:ink") == []
    assert names(client, q="ink AND fox") == []


def test_random_queries_never_fail(catalogue: Hub, client: TestClient) -> None:
    @settings(
        max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
    )
    @given(st.text(max_size=60))
    def check(text: str) -> None:
        expected = 400 if "\0" in text else 200
        assert client.get("/api/adapters", params={"q": text}).status_code == expected

    check()


@pytest.mark.parametrize(
    "query",
    [
        {"cursor": "x"},
        {"cursor": "W10"},
        {"cursor": "WyJ1cGRhdGVkIiwgInllc3RlcmRheSIsIDFd"},
        {"cursor": "WyJuYW1lIiwgMSwgMV0"},
        {"cursor": "é"},
        {"cursor": "WyJ1cGRhdGVkIiwgIjIwMjQtMDEtMDEiLCAxXQ"},
        {"sort": "id; DROP TABLE adapter"},
        {"limit": 0},
        {"limit": 201},
        {"rank_min": 0},
        {"rank_min": 2**40},
        {"tag": ["t"] * 40},
    ],
)
def test_wrong_parameters_are_refused_by_name(client: TestClient, query: dict[str, Any]) -> None:
    answer = client.get("/api/adapters", params=query)
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["param"] == next(iter(query))
