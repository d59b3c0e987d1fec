"""`graft admin fsck`: each promise is broken once by hand and found, with the file it concerns."""

import json
import os
import sqlite3
import time
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import event
from sqlalchemy.engine.interfaces import DBAPIConnection
from typer.testing import CliRunner

from cli.__main__ import app
from cli.console import CommandError
from hub.adapters.service import publish
from hub.context import Hub
from hub.repos import service as repos
from hub.repos.operations import Add
from hub.upkeep.findings import Finding, Severity
from hub.upkeep.fsck import fsck, is_sound
from hub.users.service import Viewer
from tests.fixtures.postgres import PostgresServer
from tests.hub.conftest import both_databases, postgresql_only


@pytest.fixture
def ink(hub: Hub, admin: Viewer) -> str:
    """A repo of one small file; its digest."""
    with hub.db.write() as session:
        repos.create_repo(session, admin, "admin", "ink")
    stored = hub.store.put([b"ink"])
    publish(
        hub, admin, "admin", "ink", operations=[Add("ink.txt", stored, lfs=False)], message="ink"
    )
    return stored.sha256


def by_hand(hub: Hub, statement: str, *values: object) -> None:
    """What no part of the hub would do: the catalogue's keys do not hold here."""
    if hub.settings.database_url is not None:
        with psycopg.connect(hub.settings.database_url.get_secret_value()) as server:
            server.execute("SET session_replication_role = replica")
            assert server.execute(statement.replace("?", "%s").encode(), values).rowcount > 0
        return
    with sqlite3.connect(hub.settings.data_dir / "hub.sqlite3") as connection:
        assert connection.execute(statement, values).rowcount > 0


def blob_file(hub: Hub, sha256: str) -> Path:
    return hub.settings.data_dir / "store" / "blobs" / sha256[:2] / sha256[2:4] / sha256


def codes(found: list[Finding]) -> list[str]:
    return [finding.code for finding in found]


@both_databases
def test_a_hub_in_use_is_sound(hub: Hub, ink: str) -> None:
    assert fsck(hub, full=True) == []


def test_missing_bytes_are_named_with_their_file(hub: Hub, ink: str) -> None:
    blob_file(hub, ink).unlink()
    (found,) = fsck(hub)
    assert (found.code, found.promise, found.severity) == ("lost-blob", "I2", "error")
    assert found.what == f"the bytes of {ink} (admin/ink:ink.txt) are missing"
    assert not is_sound([found])


def test_a_short_blob_is_found_by_its_length(hub: Hub, ink: str) -> None:
    blob_file(hub, ink).chmod(0o600)
    blob_file(hub, ink).write_bytes(b"in")
    (found,) = fsck(hub)
    assert (found.code, found.what[:23]) == ("short-blob", "2 of the 3 bytes of " + ink[:3])


def test_damaged_bytes_of_the_right_length_are_found_by_a_full_check(hub: Hub, ink: str) -> None:
    blob_file(hub, ink).chmod(0o600)
    blob_file(hub, ink).write_bytes(b"ank")
    assert fsck(hub) == []
    assert codes(fsck(hub, full=True)) == ["damaged-blob"]


def test_bytes_without_a_row_are_noted_once_they_are_old(hub: Hub, ink: str) -> None:
    orphan = hub.store.put([b"orphan"])
    assert fsck(hub) == []
    then = time.time() - 3 * 24 * 3600
    os.utime(blob_file(hub, orphan.sha256), (then, then))
    (found,) = fsck(hub)
    assert (found.code, found.severity) == ("orphan-blobs", Severity.NOTE)
    assert is_sound([found])


BROKEN = {
    "entry-size": "UPDATE commit_entry SET size = 4",
    "broken-chain": 'DELETE FROM "commit" WHERE parent_id IS NULL',
    "wrong-head": 'UPDATE repo SET head = (SELECT parent_id FROM "commit"'
    " WHERE parent_id IS NOT NULL)",
    "foreign-head": "UPDATE ref SET repo_id = 99",
    "foreign-key": "DELETE FROM blob",
    "usage": "UPDATE quota SET used_bytes = 2",
    "condemned-in-use": "UPDATE blob SET state = 'condemned'",
    "audit": "INSERT INTO audit (at, action, subject, previous, hash)"
    " SELECT at, action, subject, hash, 'forged' FROM audit WHERE subject = 'admin/ink'",
    "stale-projection": "UPDATE card SET commit_id = 'an older one'",
    "not-projected": "UPDATE event SET done_at = NULL",
}


@both_databases
@pytest.mark.parametrize("code", BROKEN)
def test_a_catalogue_that_was_changed_by_hand_is_found(hub: Hub, ink: str, code: str) -> None:
    by_hand(hub, BROKEN[code])
    assert code in codes(fsck(hub))


@postgresql_only
def test_a_check_may_take_longer_than_a_session_may_idle(hub: Hub, ink: str) -> None:
    """Reading a large store takes hours, and the server ends idle transactions long before."""
    blob_file(hub, ink).chmod(0o600)
    blob_file(hub, ink).write_bytes(b"ank")

    @event.listens_for(hub.db.writer, "checkout")
    def hurry(connection: DBAPIConnection, *_: object) -> None:
        connection.cursor().execute("SET idle_in_transaction_session_timeout = 100")
        connection.commit()

    def wait(done: int, total: int) -> None:
        time.sleep(0.3)

    assert codes(fsck(hub, full=True, report=wait)) == ["damaged-blob"]


def test_an_adapter_that_main_does_not_have_is_found(hub: Hub, ink: str) -> None:
    by_hand(
        hub,
        "INSERT INTO adapter (repo_id, path, position, sha256, config_sha256, size, title, kind,"
        " parameters, profile, indexed_at) SELECT id, 'gone.safetensors', 0, ?, '', 3, 'Gone',"
        " 'adapter', 0, '', created_at FROM repo",
        ink,
    )
    assert codes(fsck(hub)) == ["stale-adapter"]


def test_a_job_that_ended_without_a_result_is_found(hub: Hub) -> None:
    moment = "2026-01-01 00:00:00.000000"
    by_hand(hub, "INSERT INTO recipe VALUES ('d', '{}', ?)", moment)
    columns = "id, kind, state, requester_id, request, request_digest, recipe_digest, resources"
    rest = "fence, attempts, cancel_requested, sequence, progress_done, created_at"
    values = "?, 'merge', ?, 1, '{}', '', 'd', '{}', 1, 1, false, 0, 0, ?"
    by_hand(
        hub, f"INSERT INTO job ({columns}, {rest}) VALUES ({values})", "j1", "succeeded", moment
    )
    assert codes(fsck(hub)) == ["job-end", "job-result"]


@both_databases
def test_the_command_checks_beside_a_running_hub_and_changes_nothing(hub: Hub, ink: str) -> None:
    data = ["--data", str(hub.settings.data_dir)]
    done = CliRunner().invoke(app, ["admin", "fsck", *data])
    assert (done.exit_code, done.stdout) == (0, "Every row has its bytes.\n")
    blob_file(hub, ink).unlink()
    failed = CliRunner().invoke(app, ["admin", "fsck", "--full", "--json", *data])
    assert failed.exit_code == 1
    answer = json.loads(failed.stdout)
    assert [finding["code"] for finding in answer["findings"]] == ["lost-blob"]
    assert answer["sound"] is False


def test_a_folder_without_a_hub_is_refused(tmp_path: Path) -> None:
    failed = CliRunner().invoke(app, ["admin", "fsck", "--data", str(tmp_path)])
    assert failed.exit_code == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command",
    [("fsck", "--full", "--accept"), ("gc", "--delete"), ("token", "ada"), ("reindex",)],
    ids=" ".join,
)
def test_upkeep_of_an_empty_database_makes_no_hub_in_it(
    tmp_path: Path,
    postgres_server: PostgresServer,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
) -> None:
    with postgres_server.fresh() as url:
        monkeypatch.setenv("GRAFT_DATABASE_URL", url)
        result = CliRunner().invoke(app, ["admin", *command, "--data", str(tmp_path / "data")])
        assert isinstance(result.exception, CommandError)
        assert str(result.exception) == "the database is empty: there is no hub in it"
        query = "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"
        assert postgres_server.execute(query, url) == [(0,)]
    assert not (tmp_path / "data").exists()
