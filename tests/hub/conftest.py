"""A hub opened in this process on a real catalogue, its users, and a client of its routes."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from pydantic import SecretStr
from starlette.testclient import TestClient

from hub.app import create_app
from hub.context import Hub, open_hub
from hub.settings import Settings
from hub.users import service as users
from hub.users.models import Scope
from hub.users.service import Viewer
from tests.fixtures import server
from tests.fixtures.postgres import PostgresServer, postgres_server, postgres_url

__all__ = ["postgres_server", "postgres_url"]


@pytest.fixture(scope="session")
def first_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder after its first start; copying it is ten times faster than making it."""
    data = tmp_path_factory.mktemp("first-start") / "data"
    with open_hub(Settings(data_dir=data)):
        return data


@pytest.fixture(scope="session", autouse=True)
def database_of_servers(request: pytest.FixtureRequest) -> Iterator[None]:
    """With `--database postgresql` a hub in its own process has a database for its folder."""
    if request.config.getoption("--database") != "postgresql":
        yield
        return
    made: PostgresServer = request.getfixturevalue("postgres_server")
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        database_of = cache(lambda folder: stack.enter_context(made.fresh()))
        patch.setattr(server, "database_of", database_of)
        yield


@pytest.fixture
def hub(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    first_start: Path,
) -> Iterator[Hub]:
    """On SQLite; `both_databases` runs a test on PostgreSQL too, `--database` all others."""
    settings = Settings(data_dir=tmp_path / "data", min_free_bytes=0)
    with ExitStack() as stack:
        if getattr(request, "param", request.config.getoption("--database")) == "postgresql":
            made: PostgresServer = request.getfixturevalue("postgres_server")
            template, first_start = made.first_start(tmp_path_factory.getbasetemp())
            url = SecretStr(stack.enter_context(made.fresh(template)))
            settings = settings.model_copy(update={"database_url": url})
            # For the commands that a test gives; the test's own patches are undone with this one.
            monkeypatch.setenv("GRAFT_DATABASE_URL", url.get_secret_value())
        shutil.copytree(first_start, settings.data_dir)
        opened = stack.enter_context(open_hub(settings))
        token = (settings.data_dir / "admin.token").read_text().strip()
        yield replace(opened, admin_token=token)


both_databases = pytest.mark.parametrize("hub", ["sqlite", "postgresql"], indirect=True)
sqlite_only = pytest.mark.parametrize("hub", ["sqlite"], indirect=True)
postgresql_only = pytest.mark.parametrize("hub", ["postgresql"], indirect=True)


@pytest.fixture
def admin(hub: Hub) -> Viewer:
    assert hub.admin_token is not None
    with hub.db.read() as session:
        return users.viewer_of(session, hub.admin_token)


@pytest.fixture
def client(hub: Hub) -> Iterator[TestClient]:
    """Anonymous; `headers=bearer(hub.admin_token)` is the administrator."""
    app = create_app(hub.settings, hub=hub)
    with TestClient(app, base_url="http://127.0.0.1:8470", follow_redirects=False) as opened:
        yield opened


def bearer(token: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def make_user(hub: Hub, name: str, scope: Scope = Scope.WRITE) -> tuple[Viewer, str]:
    """A new user who acts with a token of that scope, and the token."""
    with hub.db.write() as session:
        secret = users.issue_token(session, users.create_user(session, name), "test", scope)
    with hub.db.read() as session:
        return users.viewer_of(session, secret), secret


def new_token(hub: Hub, name: str, scope: Scope = Scope.WRITE) -> tuple[Viewer, str]:
    """As `make_user`, for a user who is there."""
    with hub.db.write() as session:
        secret = users.issue_token(session, users.find_user(session, name), "another", scope)
    with hub.db.read() as session:
        return users.viewer_of(session, secret), secret
