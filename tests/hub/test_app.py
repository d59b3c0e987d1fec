"""The joined application: policies, headers, limits, sessions, what it imports."""

import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from anyio import to_thread
from fastapi import APIRouter, Request
from fastapi.routing import iter_route_contexts
from sqlalchemy import text
from sqlmodel import select
from starlette.testclient import TestClient

from hub import app as app_module
from hub.app import create_app, mutating_routes, policies_of
from hub.blobs.files import FileBlobStore
from hub.context import Hub
from hub.db import READERS
from hub.deps import (
    SESSION_COOKIE,
    Open,
    ReadSession,
    ViewerDep,
    WriterDep,
    WriteSession,
    public_url,
    session_cookie,
    writer,
)
from hub.repos import service as repos
from hub.settings import Settings
from hub.users import service as users
from hub.users.models import Namespace, Scope, Token, User
from hub.users.names import RESERVED
from hub.users.service import Viewer
from tests.fixtures.server import running_hub
from tests.hub.conftest import bearer, make_user, sqlite_only

ROOT = Path(__file__).parents[2]
HOST = "http://127.0.0.1:8470"
APP = create_app(Settings())

# Everything a request without a write token may call with a method that usually changes something.
OPEN_ROUTES = {
    "POST /login",
    "POST /logout",
    "POST /signup",
    "POST /invite",
    "POST /login/oidc/name",
    "POST /settings/theme",
    "POST /api/validate-yaml",
    "POST /api/reports",
    "POST /api/{kind:repos}/{namespace}/{name}/paths-info/{revision}",
    "POST /{namespace}/{name}.git/info/lfs/objects/batch",
    "POST /{kind:repos}/{namespace}/{name}.git/info/lfs/objects/batch",
    "PUT /{namespace}/{name}.git/info/lfs/objects/{oid}",
    "PUT /{kind:repos}/{namespace}/{name}.git/info/lfs/objects/{oid}",
    "PUT /{namespace}/{name}.git/info/lfs/objects/{oid}/parts/{number}",
    "PUT /{kind:repos}/{namespace}/{name}.git/info/lfs/objects/{oid}/parts/{number}",
    "POST /{namespace}/{name}.git/info/lfs/objects/{oid}/parts",
    "POST /{kind:repos}/{namespace}/{name}.git/info/lfs/objects/{oid}/parts",
    "* /api/{path:path}",
    "POST /xet/{cache}/v1/xorbs/{prefix}/{xorb}",
    "POST /xet/{cache}/v1/shards",
    "POST /xet/{cache}/shards",
    "* /xet/{cache}/{path:path}",
    # Repos without a namespace: the answer is always that there is none.
    "* /api/{kind:repos}/{name}",
    "* /api/{kind:repos}/{name}/{what:of_repo}",
    "* /api/{kind:repos}/{name}/{what:of_repo}/{rest:path}",
}


def name_of(route: object) -> str:
    changing = set(route.methods) - app_module.SAFE_METHODS  # type: ignore[attr-defined]
    return f"{'*' if len(changing) > 1 else changing.pop()} {route.path}"  # type: ignore[attr-defined]


def writer_routes() -> Iterator[tuple[str, str]]:
    for route in mutating_routes(APP):
        if writer in policies_of(route):
            for method in sorted((route.methods or set()) - app_module.SAFE_METHODS):
                yield method, route.path or ""


def filled(path: str) -> str:
    samples = {"kind": "models", "namespace": "admin", "name": "ink", "revision": "main"}
    return re.sub(r"\{(\w+)[^}]*\}", lambda m: samples.get(m[1], "x"), path)


# Policies


def test_only_these_routes_are_open() -> None:
    found = {name_of(r) for r in mutating_routes(APP) if writer not in policies_of(r)}
    assert found == OPEN_ROUTES


@pytest.mark.parametrize(("method", "path"), sorted(writer_routes()))
def test_a_route_that_changes_something_refuses_readers_and_strangers(
    hub: Hub, admin: Viewer, client: TestClient, method: str, path: str
) -> None:
    with hub.db.write() as session:
        repos.create_repo(session, admin, "admin", "ink")
    _, read_token = make_user(hub, "ada", Scope.READ)
    assert client.request(method, filled(path)).status_code == 401
    assert client.request(method, filled(path), headers=bearer(read_token)).status_code == 403
    assert client.request(method, filled(path), headers=bearer("graft_x")).status_code == 401


def test_a_route_without_a_policy_keeps_the_hub_from_starting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    careless = APIRouter()

    @careless.post("/api/careless")
    def careless_route() -> None: ...

    monkeypatch.setattr(app_module, "ROUTERS", (careless,))
    with pytest.raises(AssertionError, match=r"/api/careless names no policy"):
        create_app(Settings())


def test_no_namespace_can_hide_a_page_of_the_hub() -> None:
    first = {(r.path or "").split("/")[1] for r in iter_route_contexts(APP.routes)}
    fixed = {segment for segment in first if segment and "{" not in segment}
    kinds = {"models", "datasets", "spaces"}  # {kind:repos}
    assert fixed | kinds <= RESERVED


# What an answer carries


def test_every_answer_carries_the_security_headers(client: TestClient) -> None:
    for path in ("/healthz", "/nowhere/at/all", "/api/nothing", "/metrics"):
        headers = client.get(path).headers
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cache-Control"] == "private, no-store"
        assert re.fullmatch(r"[0-9a-f]{32}", headers["X-Request-Id"])


@pytest.mark.parametrize("header", ["X-Request-Id", "X-Amzn-Trace-Id"])
def test_the_callers_request_id_comes_back_unless_it_is_odd(
    client: TestClient, header: str
) -> None:
    assert client.get("/healthz", headers={header: "a-1.b"}).headers["X-Request-Id"] == "a-1.b"
    assert client.get("/healthz", headers={header: "a b<"}).headers["X-Request-Id"] != "a b<"


def test_another_host_name_is_not_answered(hub: Hub, client: TestClient) -> None:
    assert client.get("/healthz", headers={"Host": "evil.example"}).status_code == 400
    assert client.get("/healthz", headers={"Host": "localhost:1"}).status_code == 200
    settings = hub.settings.model_copy(
        update={"public_url": "https://hub.example/", "allowed_hosts": ("other.example",)}
    )
    with TestClient(create_app(settings, hub=hub)) as configured:
        for host, status in {"hub.example": 200, "other.example": 200, "evil.example": 400}.items():
            assert configured.get("/healthz", headers={"Host": host}).status_code == status


def test_a_compressed_body_is_refused(client: TestClient) -> None:
    response = client.post("/api/validate-yaml", headers={"Content-Encoding": "gzip"}, content=b"x")
    assert response.status_code == 415


def test_metrics_are_for_administrators(hub: Hub, client: TestClient) -> None:
    _, token = make_user(hub, "ada")
    assert client.get("/metrics").status_code == 401
    assert client.get("/metrics", headers=bearer(token)).status_code == 403
    answer = client.get("/metrics", headers=bearer(hub.admin_token)).text
    assert 'graft_requests_total{route="/metrics",method="GET",status="401"} 1\n' in answer


# With routes of our own on the joined application


@pytest.fixture
def probe(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    router = APIRouter(prefix="/api/probe")

    @router.post("/commit-fails", status_code=201, dependencies=[Open])
    def commit_fails(session: WriteSession) -> dict[str, bool]:
        session.execute(text("PRAGMA defer_foreign_keys = ON"))
        session.add(Token(user_id=999, name="x", hash="x", scope="read"))
        session.flush()
        return {"created": True}

    @router.post("/raises", dependencies=[Open])
    def raises(session: WriteSession) -> None:
        users.create_user(session, "ada")
        raise RuntimeError("a bug with a secret in it")

    @router.get("/reads")
    def reads(session: ReadSession) -> None:
        session.add(Namespace(key="x"))
        session.flush()

    @router.post("/body", dependencies=[Open])
    async def body(request: Request) -> int:
        return len(await request.body())

    @router.get("/url")
    def url(request: Request) -> str:
        return public_url(request)

    @router.api_route("/whoami", methods=["GET", "POST"], dependencies=[Open])
    def whoami(viewer: ViewerDep) -> str | None:
        return viewer.user.name if viewer.user else None

    @router.post("/write")
    def write(viewer: WriterDep) -> None: ...

    monkeypatch.setattr(app_module, "ROUTERS", (router,))
    settings = hub.settings.model_copy(update={"max_body_bytes": 1000})
    app = create_app(settings, hub=hub)
    with TestClient(app, base_url=HOST, raise_server_exceptions=False) as client:
        yield client


def test_who_asks_takes_a_thread_only_where_the_database_is_waited_for(
    hub: Hub, probe: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To go to one and back takes longer than to say who asks."""
    called: list[str] = []
    run_sync = to_thread.run_sync

    async def noted(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        function = getattr(call, "func", call)  # Starlette wraps it in a partial.
        if function.__module__ == "hub.deps":
            called.append(function.__name__)
        return await run_sync(call, *args, **options)

    monkeypatch.setattr(to_thread, "run_sync", noted)
    _, token = make_user(hub, "ada")
    assert probe.get("/api/probe/whoami").json() is None
    assert called == []
    assert probe.get("/api/probe/whoami", headers=bearer(token)).json() == "ada"
    assert called == ([] if hub.db.is_sqlite else ["viewer"])


@sqlite_only
def test_readers_take_turns_and_whoever_may_wait_for_the_writer_passes_them(
    probe: TestClient,
) -> None:
    app: Any = probe.app
    reading, release = threading.Semaphore(0), threading.Event()

    @app.api_route("/api/probe/hold", methods=["GET", "POST"])
    def hold(request: Request, session: ReadSession) -> None:
        if request.method == "GET":
            reading.release()
            assert release.wait(30)

    with ThreadPoolExecutor(READERS + 1) as threads:
        answers = [threads.submit(probe.get, "/api/probe/hold") for _ in range(READERS + 1)]
        assert all(reading.acquire(timeout=30) for _ in range(READERS))
        assert probe.post("/api/probe/hold").status_code == 200
        assert not reading.acquire(blocking=False)
        release.set()
        assert {answer.result().status_code for answer in answers} == {200}


def test_a_commit_that_fails_is_a_500_and_not_a_201(hub: Hub, probe: TestClient) -> None:
    response = probe.post("/api/probe/commit-fails")
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "InternalError"
    with hub.db.write() as session:
        assert [token.name for token in session.exec(select(Token))] == ["first start"]


def test_an_exception_rolls_back_and_tells_the_client_nothing(hub: Hub, probe: TestClient) -> None:
    response = probe.post("/api/probe/raises")
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    with hub.db.read() as session:
        assert [user.name for user in session.exec(select(User))] == ["admin"]


@sqlite_only
def test_a_catalogue_that_cannot_grow_is_a_507(hub: Hub, client: TestClient) -> None:
    with hub.db.writer.connect() as connection:
        pages = connection.execute(text("PRAGMA page_count")).scalar()
        connection.execute(text(f"PRAGMA max_page_count = {pages}"))
    for n in range(200):
        body = {"name": f"user-{n}"}
        answer = client.post("/api/users", json=body, headers=bearer(hub.admin_token))
        if answer.status_code != 201:
            break
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, "NoSpace")
    with hub.db.read() as session:
        assert len(session.exec(select(User)).all()) == n + 1


def test_an_upload_to_a_full_disk_is_a_507_and_leaves_nothing(hub: Hub) -> None:
    settings = hub.settings.model_copy(update={"min_free_bytes": 2**60})
    store = FileBlobStore(hub.settings.data_dir / "store", min_free_bytes=2**60)
    full = Hub(settings, hub.db, store, hub.signer, hub.downloads)
    lines = (
        b'{"key": "header", "value": {"summary": "first"}}\n'
        b'{"key": "file", "value": {"path": "a", "content": "aGVsbG8=", "encoding": "base64"}}\n'
    )
    with TestClient(create_app(settings, hub=full), base_url=HOST) as client:
        admin = bearer(hub.admin_token)
        assert client.post("/api/repos/create", json={"name": "ink"}, headers=admin).is_success
        commit = "/api/models/admin/ink/commit/main"
        answer = client.post(commit, content=lines, headers=admin)
        assert answer.status_code == 507
        assert "disk is full" in answer.headers["X-Error-Message"]
        assert client.get("/readyz").status_code == 503
        assert client.get("/api/models/admin/ink").json()["siblings"] == []
    assert not [p for p in (hub.settings.data_dir / "store" / "tmp").iterdir()]


def test_a_reading_route_cannot_write(probe: TestClient) -> None:
    assert probe.get("/api/probe/reads").status_code == 500


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_above_the_limit_is_a_413(probe: TestClient, chunked: bool) -> None:
    def body(size: int) -> bytes | Iterator[bytes]:
        return iter([bytes(size)]) if chunked else bytes(size)

    assert probe.post("/api/probe/body", content=body(1000)).json() == 1000
    response = probe.post("/api/probe/body", content=body(1001))
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "TooLarge"


def test_links_name_the_public_address(hub: Hub, probe: TestClient) -> None:
    assert probe.get("/api/probe/url").json() == HOST
    settings = hub.settings.model_copy(update={"public_url": "https://hub.example/"})
    configured = Hub(settings, hub.db, hub.store, hub.signer, hub.downloads)
    with TestClient(create_app(settings, hub=configured), base_url=HOST) as client:
        assert client.get("/api/probe/url").json() == "https://hub.example"


# The cookie of the page


def test_a_session_lives_as_long_as_its_token(hub: Hub, probe: TestClient) -> None:
    viewer, _ = make_user(hub, "ada")
    probe.cookies.set(SESSION_COOKIE, session_cookie(hub, viewer))
    assert probe.get("/api/probe/whoami").json() == "ada"
    assert viewer.user is not None
    assert viewer.token_id is not None
    with hub.db.write() as session:
        users.revoke_token(session, viewer.user, viewer.token_id)
    assert probe.get("/api/probe/whoami").json() is None


@pytest.mark.parametrize("cookie", ["", "x", "eyJhIjoxfQ.x.y"])
def test_a_forged_cookie_is_nobody(hub: Hub, probe: TestClient, cookie: str) -> None:
    probe.cookies.set(SESSION_COOKIE, cookie)
    assert probe.get("/api/probe/whoami").json() is None
    probe.cookies.set(SESSION_COOKIE, hub.signer.sign("lfs-upload", 1))
    assert probe.get("/api/probe/whoami").json() is None


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (HOST, 200),
        ("http://evil.example", 403),
        ("null", 403),
        ("http://127.0.0.1", 403),
        (None, 403),
    ],
)
def test_a_cookie_acts_only_for_pages_of_this_hub(
    hub: Hub, admin: Viewer, probe: TestClient, origin: str | None, status: int
) -> None:
    probe.cookies.set(SESSION_COOKIE, session_cookie(hub, admin))
    headers = {} if origin is None else {"Origin": origin}
    assert probe.post("/api/probe/write", headers=headers).status_code == status


@pytest.mark.parametrize("header", ["Basic YTpi", "Bearer", "Bearer graft_x", "graft_x"])
def test_a_bad_authorization_is_not_anonymous(probe: TestClient, header: str) -> None:
    response = probe.get("/api/probe/whoami", headers={"Authorization": header})
    assert response.status_code == 401


# The process


def test_the_web_process_never_imports_torch() -> None:
    code = """
import sys
from hub.app import create_app
from hub.settings import Settings
import hub.demo, cli.serve
create_app(Settings())
heavy = {"torch", "transformers", "diffusers", "peft", "safetensors.torch"}
print(sorted(heavy & set(sys.modules)))
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


def test_more_writers_than_threads_all_get_their_turn(tmp_path: Path) -> None:
    # Starlette has 40 threads: waiting writers must not keep the one that writes from ending.
    with running_hub(tmp_path) as hub, httpx2.Client(limits=httpx2.Limits()) as client:

        def create(n: int) -> int:
            body = {"name": f"r{n}"}
            url = f"{hub.url}/api/repos/create"
            return client.post(url, json=body, headers=hub.auth, timeout=120).status_code

        with ThreadPoolExecutor(80) as pool:
            assert set(pool.map(create, range(120))) == {200}
