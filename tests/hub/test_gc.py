"""Collecting: nothing that is referred to ever goes, and nothing goes in a hurry."""

import contextlib
import hashlib
import json
import os
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from sqlmodel import col, select
from starlette.testclient import TestClient
from typer.testing import CliRunner

from cli.__main__ import app
from hub.adapters.service import publish
from hub.audit import Audit, broken_link
from hub.blobs.store import Sha256, Stored
from hub.context import Hub, StoreIdentity
from hub.db import now
from hub.errors import Busy, RepoNotFound
from hub.repos import commits, holds, refs
from hub.repos import service as repos
from hub.repos.models import Blob, BlobState, Hold
from hub.repos.operations import Add
from hub.settings import Settings
from hub.upkeep import gc, last_backup
from hub.upkeep.fsck import fsck, is_sound
from hub.upkeep.gc import GcRefused, Plan
from hub.upkeep.sweep import sweep
from hub.users.service import Viewer
from tests.hub.conftest import bearer, both_databases

INK = b"ink" * 1000
DIGEST = Sha256(hashlib.sha256(INK).hexdigest())
ALL = 10_000


def days(n: float) -> datetime:
    """So many days from now."""
    return now() + timedelta(days=n)


def hold(hub: Hub, admin: Viewer, until: datetime) -> None:
    assert admin.user_id is not None
    with hub.db.write() as session:
        session.add(Hold(sha256=DIGEST, user_id=admin.user_id, expires_at=until))


def commit(hub: Hub, admin: Viewer, name: str, *files: Stored) -> None:
    with hub.db.write() as session:
        repos.create_repo(session, admin, "admin", name, exist_ok=True)
    adds = [Add(f"{file.sha256}.bin", file, lfs=False) for file in files]
    publish(hub, admin, "admin", name, operations=adds, message="files")


def delete_repo(hub: Hub, admin: Viewer, name: str) -> None:
    with hub.db.write() as session:
        repos.delete_repo(session, admin, repos.get_repo(session, admin, "admin", name))


def collect(hub: Hub, moment: datetime) -> Plan:
    planned = gc.plan(hub, moment)
    return gc.collect(hub, planned, confirm=ALL, without_backup=True, moment=moment)


def state(hub: Hub, sha256: str = DIGEST) -> str | None:
    with hub.db.read() as session:
        blob = session.get(Blob, sha256)
        return None if blob is None else blob.state


@pytest.fixture
def unused(hub: Hub, admin: Viewer) -> Stored:
    """The only blob that nothing refers to: its repo was deleted."""
    commit(hub, admin, "kept", hub.store.put([b"kept"]))
    stored = hub.store.put([INK])
    commit(hub, admin, "ink", stored)
    delete_repo(hub, admin, "ink")
    return stored


@pytest.fixture
def condemned(hub: Hub, unused: Stored) -> Stored:
    collect(hub, days(8))
    assert state(hub) == BlobState.CONDEMNED
    return unused


@both_databases
def test_what_a_squash_hides_goes_once_it_is_deleted_from_the_history(
    hub: Hub, admin: Viewer, client: TestClient
) -> None:
    """The way of docs/operations.md: squash, delete the files that no branch or tag has, collect."""
    with hub.db.write() as session:
        repos.create_repo(session, admin, "admin", "ink")
    for content in (INK, b"newer"):
        add = Add("ink.safetensors", hub.store.put([content]), lfs=True)
        publish(hub, admin, "admin", "ink", operations=[add], message="a version")
    address, headers = "/api/models/admin/ink", bearer(hub.admin_token)
    made = client.post(f"{address}/super-squash/main", json={}, headers=headers).json()
    assert collect(hub, days(8)).n == 0
    files = client.get(f"{address}/lfs-files", headers=headers).json()
    (old,) = [file["fileOid"] for file in files if file["ref"] is None]
    body = {"deletions": {"sha": [old], "rewriteHistory": True}}
    assert client.post(f"{address}/lfs-files/batch", json=body, headers=headers).is_success
    assert client.get(address).json()["sha"] == made["commitOid"]
    assert old == DIGEST
    assert list(collect(hub, days(8)).condemn.sizes) == [old]
    assert list(collect(hub, days(9.1)).delete.sizes) == [old]
    assert client.get("/admin/ink/resolve/main/ink.safetensors").content == b"newer"
    assert is_sound(fsck(hub, full=True))


@both_databases
def test_a_blob_goes_in_two_phases_and_its_row_last(hub: Hub, unused: Stored) -> None:
    assert collect(hub, days(6)).n == 0
    assert list(collect(hub, days(8)).condemn.sizes) == [DIGEST]
    assert (state(hub), hub.store.size(DIGEST)) == (BlobState.CONDEMNED, len(INK))
    assert collect(hub, days(8.9)).n == 0
    assert list(collect(hub, days(9.1)).delete.sizes) == [DIGEST]
    assert (state(hub), hub.store.size(DIGEST)) == (BlobState.DELETING, None)
    with hub.db.write() as session:
        session.get_one(Blob, DIGEST).condemned_at = days(-1.1)
    assert sweep(hub)["rows of collected blobs"] == 1
    assert state(hub) is None
    with hub.db.read() as session:
        log = session.exec(select(Audit.action).where(col(Audit.subject).startswith(DIGEST))).all()
        assert sorted(log) == ["blob.condemn", "blob.delete"]
        assert broken_link(session) is None
    assert is_sound(fsck(hub, full=True))


def test_local_bytes_lie_in_the_trash_for_a_day(hub: Hub, condemned: Stored) -> None:
    collect(hub, days(10))
    trash = hub.settings.data_dir / "store" / "trash"
    assert [path.name for path in trash.iterdir()] == [DIGEST]
    hub.store.sweep(0)
    assert (trash / DIGEST).read_bytes() == INK


@both_databases
def test_what_is_referred_to_is_never_a_candidate(hub: Hub, admin: Viewer) -> None:
    sent, stored = hub.store.put([b"sent"]), hub.store.put([INK])
    commit(hub, admin, "ink", stored)
    with hub.db.write() as session:
        holds.hold(session, admin, sent)
    assert gc.plan(hub, days(100)).n == 0


def test_the_inputs_of_a_waiting_job_are_kept(hub: Hub, admin: Viewer, unused: Stored) -> None:
    from hub.jobs.models import Job, Recipe

    with hub.db.write() as session:
        session.add(Recipe(digest="d", canonical="{}", created_at=now()))
        session.flush()
        request = {"inputs": [{"ref": "a/b", "files": {"x.safetensors": DIGEST}}]}
        session.add(
            Job(
                id="j",
                kind="merge",
                requester_id=1,
                request=request,
                recipe_digest="d",
                resources={},
                created_at=now(),
            )
        )
    assert gc.plan(hub, days(100)).n == 0
    with hub.db.write() as session:
        job = session.get_one(Job, "j")
        job.state, job.finished_at = "cancelled", now()
    assert gc.plan(hub, days(100)).n == 1


@both_databases
def test_a_commit_takes_a_condemned_blob_back(hub: Hub, admin: Viewer, condemned: Stored) -> None:
    commit(hub, admin, "again", condemned)
    assert state(hub) == BlobState.PRESENT
    assert collect(hub, days(100)).n == 0
    assert hub.store.size(DIGEST) == len(INK)


def test_an_answer_that_bytes_are_here_takes_them_back_and_holds_them(
    client: TestClient, hub: Hub, admin: Viewer, condemned: Stored
) -> None:
    hold(hub, admin, days(0.1))
    url = "/admin/kept.git/info/lfs/objects/batch"
    body = {"operation": "upload", "objects": [{"oid": DIGEST, "size": len(INK)}]}
    answer = client.post(url, json=body, headers=bearer(hub.admin_token)).json()
    assert "actions" not in answer["objects"][0]
    assert state(hub) == BlobState.PRESENT
    with hub.db.read() as session:
        assert session.exec(select(Hold)).one().expires_at > days(1.9)


def test_bytes_that_are_gone_are_asked_for_again(
    client: TestClient, hub: Hub, admin: Viewer, condemned: Stored
) -> None:
    collect(hub, days(10))
    hold(hub, admin, days(1))
    url = "/admin/kept.git/info/lfs/objects/batch"
    body = {"operation": "upload", "objects": [{"oid": DIGEST, "size": len(INK)}]}
    answer = client.post(url, json=body, headers=bearer(hub.admin_token)).json()
    assert "upload" in answer["objects"][0]["actions"]


@both_databases
def test_a_commit_of_collected_bytes_is_refused_until_they_are_sent_again(
    hub: Hub, admin: Viewer, condemned: Stored
) -> None:
    collect(hub, days(10))
    with pytest.raises(Busy, match="send the file again"):
        commit(hub, admin, "again", condemned)
    assert state(hub) == BlobState.DELETING
    commit(hub, admin, "again", hub.store.put([INK]))
    assert state(hub) == BlobState.PRESENT
    assert is_sound(fsck(hub, full=True))


def test_a_reference_that_nobody_told_of_keeps_the_bytes(
    hub: Hub, admin: Viewer, condemned: Stored
) -> None:
    planned = gc.plan(hub, days(10))
    assert len(planned.delete) == 1
    hold(hub, admin, days(20))
    done = gc.collect(hub, planned, confirm=ALL, without_backup=True, moment=days(10))
    assert (done.n, state(hub), hub.store.size(DIGEST)) == (0, BlobState.PRESENT, len(INK))


def test_what_is_referred_to_since_the_plan_is_not_condemned(
    hub: Hub, admin: Viewer, unused: Stored
) -> None:
    planned = gc.plan(hub, days(8))
    hold(hub, admin, days(20))
    done = gc.collect(hub, planned, confirm=ALL, without_backup=True, moment=days(8))
    assert (done.n, state(hub)) == (0, BlobState.PRESENT)


@both_databases
def test_bytes_without_a_row_go_the_same_way(hub: Hub, admin: Viewer) -> None:
    commit(hub, admin, "kept", hub.store.put([b"kept"]))
    hub.store.put([INK])
    assert gc.plan(hub, days(6)).n == 0
    assert list(collect(hub, days(8)).orphans.sizes) == [DIGEST]
    assert state(hub) == BlobState.CONDEMNED
    assert list(collect(hub, days(10)).delete.sizes) == [DIGEST]
    assert hub.store.size(DIGEST) is None


@both_databases
def test_an_upload_adopts_bytes_without_a_row(hub: Hub, admin: Viewer) -> None:
    commit(hub, admin, "kept", hub.store.put([b"kept"]))
    stored = hub.store.put([INK])
    planned = gc.plan(hub, days(8))
    commit(hub, admin, "ink", stored)
    done = gc.collect(hub, planned, confirm=ALL, without_backup=True, moment=days(8))
    assert (done.n, state(hub)) == (0, BlobState.PRESENT)


def test_an_interrupted_deletion_is_finished(hub: Hub, condemned: Stored) -> None:
    with hub.db.write() as session:
        session.get_one(Blob, DIGEST).state = BlobState.DELETING
    assert list(collect(hub, now()).unfinished.sizes) == [DIGEST]
    assert hub.store.size(DIGEST) is None


# Brakes


def refused(hub: Hub, confirm: int | None = ALL) -> str:
    planned = gc.plan(hub, days(8))
    reason = gc.brake(hub, planned, confirm=confirm)
    assert reason is not None
    with pytest.raises(GcRefused):
        gc.collect(hub, planned, confirm=confirm, moment=days(8))
    assert state(hub) == BlobState.PRESENT
    return reason


def backed_up(hub: Hub, at: datetime | None = None) -> None:
    last_backup.remember(hub.settings, at or now(), Path("/backup"))


def test_more_than_a_tenth_needs_its_number(hub: Hub, admin: Viewer, unused: Stored) -> None:
    backed_up(hub)
    for n in range(3):
        commit(hub, admin, "kept", hub.store.put([b"%d" % n]))
    reason = "1 of 5 blobs would go, more than 10% or 10,000; say --confirm 1 if that is right"
    assert refused(hub, None) == reason
    assert gc.brake(hub, gc.plan(hub, days(8)), confirm=1) is None


def test_a_tenth_needs_no_confirmation(hub: Hub, admin: Viewer, unused: Stored) -> None:
    backed_up(hub)
    commit(hub, admin, "kept", *(hub.store.put([b"%d" % n]) for n in range(8)))
    assert gc.brake(hub, gc.plan(hub, days(8))) is None


def test_a_catalogue_without_repos_collects_nothing(
    hub: Hub, admin: Viewer, unused: Stored
) -> None:
    backed_up(hub)
    delete_repo(hub, admin, "kept")
    assert "no repos at all" in refused(hub)


def test_another_store_collects_nothing(hub: Hub, unused: Stored) -> None:
    backed_up(hub)
    with hub.db.write() as session:
        session.exec(select(StoreIdentity)).one().store_id = "another"
    assert "describes blob store another" in refused(hub)


def test_a_restored_hub_collects_nothing_before_a_check(hub: Hub, unused: Stored) -> None:
    backed_up(hub)
    with hub.db.write() as session:
        session.exec(select(StoreIdentity)).one().unchecked = "restored"
    assert "fsck --full --accept" in refused(hub)
    command = ["admin", "fsck", "--full", "--accept", "--data", str(hub.settings.data_dir)]
    hub.db.close()
    assert CliRunner().invoke(app, command).exit_code == 0


@pytest.mark.parametrize(("age", "said"), [(None, "there is no backup"), (8, "the last backup")])
def test_without_a_recent_backup_nothing_is_collected(
    hub: Hub, unused: Stored, age: int | None, said: str
) -> None:
    if age is not None:
        backed_up(hub, days(-age))
    assert said in refused(hub)
    assert gc.brake(hub, gc.plan(hub, days(8)), confirm=ALL, without_backup=True) is None


def test_a_listing_that_breaks_collects_nothing(
    hub: Hub, unused: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = hub.store.inventory

    def breaking() -> Iterator[tuple[Sha256, int, datetime]]:
        yield next(iter(whole()))
        raise OSError("the listing broke")

    monkeypatch.setattr(hub.store, "inventory", breaking)
    with pytest.raises(OSError, match="broke"):
        collect(hub, days(8))
    assert state(hub) == BlobState.PRESENT


@both_databases
def test_the_command_is_a_dry_run_unless_told_otherwise(
    hub: Hub, admin: Viewer, unused: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub.db.write() as session:
        session.get_one(Blob, DIGEST).created_at = days(-9)
        then = days(-9).timestamp()
    path = hub.store.path(DIGEST)
    assert path is not None
    os.utime(path, (then, then))
    hub.db.close()
    command = ["admin", "gc", "--data", str(hub.settings.data_dir)]
    dry = CliRunner().invoke(app, [*command, "--json"])
    answer = json.loads(dry.stdout)
    assert (answer["done"], answer["condemn"]["sha256"]) == (False, [DIGEST])
    refusal = CliRunner().invoke(app, [*command, "--delete"])
    assert refusal.exit_code == 1
    done = CliRunner().invoke(app, [*command, "--delete", "--confirm", "1", "--without-backup"])
    assert done.stdout == "1 blobs of 3,000 bytes condemned\n"
    again = CliRunner().invoke(app, [*command, "--json"])
    assert json.loads(again.stdout)["n"] == 0
    idle = CliRunner().invoke(app, [*command, "--delete", "--without-backup"])
    assert idle.stdout == "There is nothing to collect.\n"


# Together with writers


@both_databases
def test_commits_beside_collections_without_any_grace_lose_nothing(hub: Hub, admin: Viewer) -> None:
    """Every blob is condemned and deleted as soon as nothing refers to it, as often as possible."""
    contents = [b"%d" % n * 50 for n in range(6)]
    kept: dict[str, bytes] = {}
    stop = threading.Event()
    settings = hub.settings.model_copy(update={"gc_grace_days": 0, "gc_condemned_hours": 0})
    hasty = replace(hub, settings=Settings.model_construct(**settings.model_dump()))

    def write(seed: int) -> None:
        rng = random.Random(seed)
        for n in range(20):
            name, content = f"r{seed}-{n}", rng.choice(contents)
            try:
                commit(hub, admin, name, hub.store.put([content]))
            except Busy:
                continue
            if rng.random() < 0.6:
                delete_repo(hub, admin, name)
            else:
                kept[name] = content

    def sweep_up() -> None:
        while not stop.is_set():
            with contextlib.suppress(GcRefused):
                collect(hasty, days(1 / 86400))

    with ThreadPoolExecutor(4) as pool:
        sweeper = pool.submit(sweep_up)
        writers = [pool.submit(write, n) for n in range(3)]
        try:
            for writer in writers:
                writer.result()
        finally:
            stop.set()
        sweeper.result()
    assert len(kept) > 10
    with hub.db.read() as session:
        for name, content in kept.items():
            try:
                repo = repos.get_repo(session, admin, "admin", name)
            except RepoNotFound:
                continue  # Its commit was refused: the bytes were just collected.
            (entry,) = commits.entries(session, refs.resolve(session, repo))
            assert b"".join(hub.store.open(Sha256(entry.sha256))) == content
    assert is_sound(fsck(hub, full=True))
