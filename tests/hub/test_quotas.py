"""Quotas: what counts, what is refused, and that two commits at once cannot both pass."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError
from sqlmodel import Session, select
from starlette.testclient import TestClient
from typer.testing import CliRunner

from cli.__main__ import app as cli
from hub.adapters.service import publish
from hub.app import create_app
from hub.context import Hub
from hub.errors import QuotaExceeded
from hub.limits import quotas
from hub.limits.models import UNLIMITED, Quota
from hub.repos import refs
from hub.repos import service as repos
from hub.repos.operations import Add, Delete
from hub.users.service import Viewer
from tests.fixtures.server import running_hub
from tests.hub.conftest import bearer, both_databases, make_user


def put(hub: Hub, viewer: Viewer, repo: str, path: str, content: bytes) -> None:
    namespace, name = repo.split("/")
    with hub.db.write() as session:
        repos.create_repo(session, viewer, namespace, name, exist_ok=True)
    operations = [Add(path, hub.store.put([content]), lfs=False)]
    publish(hub, viewer, namespace, name, operations=operations, message="m")


def limit(hub: Hub, key: str, limit_bytes: int | None) -> None:
    with hub.db.write() as session:
        quotas.set_limit(session, None, key, limit_bytes)


def used(hub: Hub, key: str) -> int:
    with hub.db.read() as session:
        counted = quotas.count(session, key)
        row = session.exec(select(Quota.used_bytes).where(Quota.key == key)).one()
        assert row >= counted
        return counted


@both_databases
def test_each_blob_of_a_namespace_counts_once(hub: Hub, admin: Viewer) -> None:
    put(hub, admin, "admin/a", "x", b"x" * 100)
    put(hub, admin, "admin/b", "y", b"x" * 100)
    put(hub, admin, "admin/b", "z", b"z" * 10)
    assert used(hub, "admin") == 110
    operations = [Delete("z")]
    publish(hub, admin, "admin", "b", operations=operations, message="old commits keep it")
    assert used(hub, "admin") == 110


@both_databases
def test_a_commit_beyond_the_quota_is_refused_and_changes_nothing(hub: Hub, admin: Viewer) -> None:
    ada, _ = make_user(hub, "ada")
    limit(hub, "ada", 100)
    put(hub, ada, "ada/a", "x", b"x" * 60)
    with pytest.raises(QuotaExceeded, match="ada may keep 100 bytes on this hub and would keep 1"):
        put(hub, ada, "ada/a", "y", b"y" * 60)
    assert used(hub, "ada") == 60
    put(hub, ada, "ada/a", "copy", b"x" * 60)
    put(hub, ada, "ada/a", "y", b"y" * 40)
    limit(hub, "ada", UNLIMITED)
    put(hub, ada, "ada/a", "z", b"z" * 600)
    limit(hub, "ada", 0)
    with hub.db.write() as session:
        repo = repos.get_repo(session, ada, "ada", "a")
        assert refs.resolve(session, repo).message == "m"
        refs.create_branch(session, ada, repo, "other")


@both_databases
def test_what_was_deleted_is_free_again(hub: Hub, admin: Viewer) -> None:
    limit(hub, "admin", 100)
    put(hub, admin, "admin/a", "x", b"x" * 90)
    with hub.db.write() as session:
        repos.delete_repo(session, admin, repos.get_repo(session, admin, "admin", "a"))
    put(hub, admin, "admin/b", "y", b"y" * 90)
    assert used(hub, "admin") == 90


@both_databases
def test_two_commits_that_fit_alone_do_not_both_pass(hub: Hub, admin: Viewer) -> None:
    limit(hub, "admin", 100)
    for name in ("a", "b", "c", "d"):
        put(hub, admin, f"admin/{name}", "start", b"s")

    def one(name: str) -> bool:
        try:
            put(hub, admin, f"admin/{name}", "x", name.encode() * 60)
        except QuotaExceeded:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(one, "abcd")) == 1
    assert used(hub, "admin") == 61


def test_a_repo_is_not_moved_into_a_full_namespace(hub: Hub, admin: Viewer) -> None:
    make_user(hub, "ada")
    limit(hub, "ada", 50)
    put(hub, admin, "admin/a", "x", b"x" * 60)

    def move(session: Session) -> None:
        repo = repos.get_repo(session, admin, "admin", "a")
        repos.move_repo(session, admin, repo, "ada", "a")

    with pytest.raises(QuotaExceeded), hub.db.write() as session:
        move(session)
    limit(hub, "ada", 60)
    with hub.db.write() as session:
        move(session)
    assert (used(hub, "ada"), used(hub, "admin")) == (60, 0)


def test_administrators_set_quotas_and_members_see_them(hub: Hub, client: TestClient) -> None:
    _, token = make_user(hub, "ada")
    admin, ada = bearer(hub.admin_token), bearer(token)
    answer = client.put("/api/quotas/Ada", json={"limit_bytes": 10}, headers=admin)
    expected = {"namespace": "ada", "used_bytes": 0, "limit_bytes": 10, "is_default": False}
    assert answer.json() == expected
    assert client.get("/api/quotas/ada", headers=ada).json() == expected
    assert client.get("/api/quotas", headers=admin).json() == [expected]
    for value, shown in (("unlimited", None), (None, None)):
        answer = client.put("/api/quotas/ada", json={"limit_bytes": value}, headers=admin)
        assert answer.json()["limit_bytes"] == shown
    assert client.put("/api/quotas/ada", json={"limit_bytes": 1}, headers=ada).status_code == 403
    assert client.get("/api/quotas", headers=ada).status_code == 403
    assert client.get("/api/quotas/admin", headers=ada).status_code == 404
    assert client.get("/api/quotas/ada").status_code == 401
    for wrong in (-1, 2**63, "much", 1.5):
        body = {"limit_bytes": wrong}
        assert client.put("/api/quotas/ada", json=body, headers=admin).status_code == 422
    assert client.put("/api/quotas/nobody", json={"limit_bytes": 1}, headers=admin).is_error


@pytest.mark.parametrize("way", ["lfs", "xet"])
def test_clients_say_that_the_quota_is_used_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Before any byte is sent; what is refused later hf_xet tells in words of its own."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", way == "lfs")
    with running_hub(tmp_path, quota_bytes=1000, max_regular_bytes=100) as hub:
        api = HfApi(endpoint=hub.url, token=hub.admin_token)
        api.create_repo("admin/a")
        api.upload_file(path_or_fileobj=b"x" * 90, path_in_repo="x", repo_id="admin/a")
        for size in (5000, 950):
            with pytest.raises(HfHubHTTPError, match=r"admin may keep 1,000 bytes") as refused:
                api.upload_file(path_or_fileobj=b"y" * size, path_in_repo="y", repo_id="admin/a")
            assert refused.value.response.status_code == 507
            assert "/preupload/" in str(refused.value)
        assert api.list_repo_files("admin/a") == ["x"]


@both_databases
def test_a_preupload_refuses_only_what_cannot_be_here(
    hub: Hub, admin: Viewer, client: TestClient
) -> None:
    put(hub, admin, "admin/a", "x", b"x" * 90)
    put(hub, admin, "admin/a", ".gitignore", b"*.tmp\n")
    limit(hub, "admin", 200)

    def preupload(*files: tuple[str, int]) -> int:
        told = [{"path": path, "size": size} for path, size in files]
        address, headers = "/api/models/admin/a/preupload/main", bearer(hub.admin_token)
        return client.post(address, json={"files": told}, headers=headers).status_code

    assert preupload(("y", 105)) == 507
    assert preupload(("y", 104)) == 200
    # Perhaps they are one content, or the one that is here, under many names.
    assert preupload(("y", 104), ("z", 104)) == 200
    assert preupload(*((f"{n}", 90) for n in range(5))) == 200
    assert preupload(("y.tmp", 500)) == 200
    assert preupload(("y", 100), ("z", 101)) == 507


# Bytes without a commit


class Impatient:
    """A user who sends and does not commit, to a hub where that may be 10,000 bytes."""

    def __init__(self, client: TestClient, token: str) -> None:
        self.client, self.headers = client, bearer(token)
        made = client.post("/api/repos/create", json={"name": "a"}, headers=self.headers)
        self.repo = made.json()["name"]

    def batch(self, *contents: bytes, transfers: tuple[str, ...] = ("basic",)) -> Any:
        named = [{"oid": sha(content), "size": len(content)} for content in contents]
        body = {"operation": "upload", "transfers": transfers, "objects": named}
        address = f"/{self.repo}.git/info/lfs/objects/batch"
        return self.client.post(address, json=body, headers=self.headers)

    def put(self, answer: Any, *contents: bytes) -> list[int]:
        objects = answer.json()["objects"]
        links = {o["oid"]: o["actions"]["upload"]["href"] for o in objects if "actions" in o}
        return [self.client.put(links[sha(c)], content=c).status_code for c in contents]

    def commit(self, *lines: dict[str, Any], parent: str | None = None) -> int:
        header = {"summary": "m"} | ({"parentCommit": parent} if parent else {})
        body = "\n".join(map(json.dumps, ({"key": "header", "value": header}, *lines)))
        address = f"/api/models/{self.repo}/commit/main"
        return self.client.post(address, content=body, headers=self.headers).status_code


def large(content: bytes) -> dict[str, Any]:
    return {"key": "lfsFile", "value": {"path": sha(content), "oid": sha(content)}}


def small(content: bytes) -> dict[str, Any]:
    value = {"path": "x", "content": content.decode(), "encoding": "utf-8"}
    return {"key": "file", "value": value}


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def ada(hub: Hub) -> Iterator[Impatient]:
    changes = {"pending_bytes": 10_000, "lfs_part_bytes": 3000}
    bounded = replace(hub, settings=hub.settings.model_copy(update=changes))
    app = create_app(bounded.settings, hub=bounded)
    with TestClient(app, base_url="http://127.0.0.1:8470") as client:
        yield Impatient(client, make_user(hub, "ada")[1])


@both_databases
def test_what_is_sent_and_not_committed_is_bounded_however_it_comes(ada: Impatient) -> None:
    one, two, three = b"1" * 2500, b"2" * 2500, b"3" * 9000
    first = ada.batch(one)
    assert ada.batch(three, two).status_code == 507
    # Addresses are promises of nothing: what comes counts.
    others = [ada.batch(content) for content in (two, three)]
    assert ada.put(first, one) == [200]
    assert ada.put(others[1], three) == [507]
    assert ada.put(others[0], two) == [200]
    assert ada.batch(three).json()["error"].startswith("ada has sent 5,000 bytes that no commit")
    assert ada.put(first, one) == [200]  # again, which is nothing new
    # In parts it counts from its beginning, once.
    parts = b"4" * 4000
    for _ in range(2):
        assert ada.batch(parts, transfers=("basic", "multipart")).status_code == 200
    assert ada.batch(b"5" * 1001).status_code == 507
    assert ada.commit(large(one), large(two)) == 200
    assert ada.batch(b"5" * 5000).status_code == 200


@both_databases
def test_small_files_of_commits_that_fail_count_too(ada: Impatient) -> None:
    nowhere = "0" * 40
    assert ada.commit(small(b"a" * 6000), parent=nowhere) == 412
    assert ada.commit(small(b"b" * 6000), large(b"never sent")) == 400
    assert ada.commit(small(b"c" * 6000)) == 507
    assert ada.batch(b"d").status_code == 507


def test_the_command_shows_and_sets(hub: Hub, admin: Viewer, tmp_path: Path) -> None:
    put(hub, admin, "admin/a", "x", b"x" * 2000)
    data = str(hub.settings.data_dir)
    shown = CliRunner().invoke(cli, ["admin", "quota", "--data", data])
    assert "admin" in shown.output
    assert "2.0 kB" in shown.output
    assert "unlimited (default)" in shown.output
    answer = CliRunner().invoke(cli, ["admin", "quota", "--set", "1GB", "--data", data])
    assert answer.exit_code != 0
    hub.db.close()
    for text, expected in (("1GB", 10**9), ("1.5GiB", 3 * 2**29), ("7", 7), ("unlimited", None)):
        command = ["admin", "quota", "admin", "--set", text, "--data", data, "--json"]
        answer = CliRunner().invoke(cli, command)
        assert f'"limit_bytes": {"null" if expected is None else expected}' in answer.output
    answer = CliRunner().invoke(cli, ["admin", "quota", "nobody", "--set", "1GB", "--data", data])
    assert "there is no user or organisation 'nobody'" in str(answer.exception)
