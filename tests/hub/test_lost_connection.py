"""The connection to PostgreSQL breaks at the worst moment: while COMMIT is under way."""

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy.engine import make_url
from sqlmodel import func, select
from starlette.testclient import TestClient

from hub import app as app_module
from hub import outcome
from hub.adapters.service import catch_up
from hub.app import create_app
from hub.audit import broken_link
from hub.context import Hub, open_hub
from hub.repos import commits, refs
from hub.repos import service as repos
from hub.repos.models import Commit
from hub.settings import Settings
from hub.users import service as users
from hub.users.models import User
from hub.users.service import ANONYMOUS
from tests.fixtures.cutting_proxy import Cut, CuttingProxy, cutting_proxy
from tests.fixtures.postgres import PostgresServer
from tests.hub.conftest import bearer


@pytest.fixture
def proxy(postgres_server: PostgresServer) -> Iterator[CuttingProxy]:
    folder = make_url(postgres_server.url).query["host"]
    assert isinstance(folder, str)
    with cutting_proxy(Path(folder)) as proxy:
        yield proxy


@pytest.fixture
def hub(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    postgres_server: PostgresServer,
    proxy: CuttingProxy,
) -> Iterator[Hub]:
    template, data = postgres_server.first_start(tmp_path_factory.getbasetemp())
    shutil.copytree(data, tmp_path / "data")
    with postgres_server.fresh(template) as url:
        parsed = make_url(url)
        through = f"postgresql://postgres@127.0.0.1:{proxy.port}/{parsed.database}"
        settings = Settings(data_dir=tmp_path / "data", database_url=SecretStr(through))
        with open_hub(settings) as opened:
            yield opened
            proxy.is_away = False


@pytest.fixture
def client(hub: Hub) -> Iterator[TestClient]:
    token = (hub.settings.data_dir / "admin.token").read_text().strip()
    with hub.db.write() as session:
        repos.create_repo(session, users.viewer_of(session, token), "admin", "ink")
    catch_up(hub)  # Else the server begins with it, and that is a COMMIT too.
    app = create_app(hub.settings.model_copy(update={"workers": 0}), hub=hub)
    with TestClient(app, base_url="http://127.0.0.1", headers=bearer(token)) as opened:
        yield opened


def test_a_server_outlives_a_database_that_is_away_while_it_counts(
    hub: Hub,
    proxy: CuttingProxy,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rounds = threading.Semaphore(0)
    monkeypatch.setattr(app_module, "COUNTS_EVERY_S", 0.05)
    monkeypatch.setattr(hub.downloads, "flush", lambda database: rounds.release())
    with TestClient(create_app(hub.settings, hub=hub), base_url="http://127.0.0.1") as client:
        proxy.is_away = True
        while rounds.acquire(blocking=False):
            pass
        hub.uses.note(1)
        for _ in range(3):  # The third begins after one that could not write.
            assert rounds.acquire(timeout=60)
        assert client.get("/healthz").status_code == 200
    # A line each time, as there are many while it is away.
    (counts, *_) = (r for r in caplog.records if "does not take counts" in r.getMessage())
    assert counts.exc_info is None
    assert "\n" not in counts.getMessage()


MARK = "the one whose COMMIT is cut"


def commit_body(content: bytes) -> bytes:
    encoded = {"path": "a", "content": base64.b64encode(content).decode(), "encoding": "base64"}
    lines = [
        {"key": "header", "value": {"summary": MARK}},
        {"key": "file", "value": encoded},
    ]
    return "\n".join(json.dumps(line) for line in lines).encode()


def history(hub: Hub) -> list[str]:
    with hub.db.read() as session:
        repo = repos.get_repo(session, ANONYMOUS, "admin", "ink")
        found, _ = commits.history(session, repo, refs.resolve(session, repo))
        assert broken_link(session) is None
        assert session.exec(select(func.count()).select_from(Commit)).one() == len(found)
    return [commit.id for commit in found]


def test_a_commit_whose_answer_was_lost_is_found_by_its_transaction(
    hub: Hub, client: TestClient, proxy: CuttingProxy
) -> None:
    proxy.arm(Cut.AFTER, MARK.encode())
    answer = client.post("/api/models/admin/ink/commit/main", content=commit_body(b"1"))
    assert proxy.cuts == 1
    assert answer.status_code == 200
    assert answer.json()["commitOid"] == history(hub)[0]
    assert len(history(hub)) == 2


@pytest.mark.parametrize("cut", [Cut.BEFORE, Cut.HOLE])
def test_a_commit_that_never_arrived_is_refused_and_can_be_repeated(
    hub: Hub, client: TestClient, proxy: CuttingProxy, cut: Cut, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcome, "_PATIENCE_S", 0.2)
    before = history(hub)
    proxy.arm(cut, MARK.encode())
    refused = client.post("/api/models/admin/ink/commit/main", content=commit_body(b"1"))
    assert proxy.cuts == 1
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "2")
    assert "nothing was changed" in refused.json()["error"]
    assert history(hub) == before
    again = client.post("/api/models/admin/ink/commit/main", content=commit_body(b"1"))
    assert again.status_code == 200
    assert history(hub) == [again.json()["commitOid"], *before]


def test_a_database_that_comes_back_is_asked_then(
    hub: Hub, client: TestClient, proxy: CuttingProxy
) -> None:
    proxy.arm(Cut.AFTER, MARK.encode(), away=True)
    timer = threading.Timer(1, lambda: setattr(proxy, "is_away", False))
    timer.start()
    answer = client.post("/api/models/admin/ink/commit/main", content=commit_body(b"1"))
    timer.join()
    assert answer.json()["commitOid"] == history(hub)[0]


def test_a_database_that_stays_away_leaves_the_outcome_unknown_and_says_so(
    hub: Hub, client: TestClient, proxy: CuttingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcome, "LOOK_FOR_S", 0.5)
    proxy.arm(Cut.AFTER, MARK.encode(), away=True)
    answer = client.post("/api/models/admin/ink/commit/main", content=commit_body(b"1"))
    proxy.is_away = False
    assert answer.status_code == 504
    assert "look before you repeat it" in answer.json()["error"]
    assert len(history(hub)) == 2


def test_what_other_routes_save_is_found_too(
    hub: Hub, client: TestClient, proxy: CuttingProxy
) -> None:
    proxy.arm(Cut.AFTER, b"ada")
    assert client.post("/api/users", json={"name": "ada"}).status_code == 201
    assert proxy.cuts == 1
    with hub.db.read() as session:
        assert sorted(session.exec(select(User.name))) == ["ada", "admin"]


def test_a_database_that_is_away_is_a_503_and_its_return_is_noticed(
    client: TestClient, proxy: CuttingProxy
) -> None:
    proxy.is_away = True
    refused = client.get("/api/models/admin/ink")
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "2")
    proxy.is_away = False
    assert client.get("/api/models/admin/ink").status_code == 200
