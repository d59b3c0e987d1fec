"""Several server processes and workers on one PostgreSQL catalogue and one bucket."""

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError
from sqlalchemy import delete, text, update
from sqlmodel import Session, col, select

from hub.blobs.store import Sha256
from hub.context import Hub, open_hub
from hub.db import now
from hub.demo import seed
from hub.errors import Conflict
from hub.hf.lfs_parts import drop_expired
from hub.jobs.models import Job
from hub.repos import access, commits, discussions, likes, pulls, refs, uploads
from hub.repos import service as repos
from hub.repos.downloads import Downloads
from hub.repos.models import Discussion, DiscussionStatus, Gate, Hold, Repo
from hub.settings import Settings
from hub.upkeep import gc
from hub.upkeep.fsck import fsck, is_sound
from hub.users.service import Viewer
from hub.webhooks.models import Delivery
from tests.fixtures.postgres import PostgresServer
from tests.fixtures.s3 import serve_s3
from tests.fixtures.server import RunningHub, settings_of, start_hub
from tests.fixtures.tiny_files import write_lora
from tests.hub.conftest import postgresql_only
from tests.hub.test_webhooks import WATCHED, receiving

T = TypeVar("T")
Step = Callable[[Session, Repo], object]
N = 8
WAIT_S = 300


def at_once(step: Callable[[int], T], n: int = N) -> list[T]:
    """What `step(0)` to `step(n - 1)` answer, which begin at the same moment."""
    together = threading.Barrier(n)

    def begin(number: int) -> T:
        together.wait()
        return step(number)

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(begin, range(n)))


# What every server does by itself, at the same moment as the others


def new_repo(hub: Hub, viewer: Viewer, name: str) -> int:
    with hub.db.write() as session:
        return repos.create_repo(session, viewer, "admin", name).id or 0


@postgresql_only
def test_servers_that_count_downloads_never_wait_for_each_other(hub: Hub, admin: Viewer) -> None:
    first, second = new_repo(hub, admin, "a"), new_repo(hub, admin, "b")
    counted = Downloads()
    with hub.db.read() as session:
        counted.count(session.get_one(Repo, second))
        counted.count(session.get_one(Repo, first))
    one_more = update(Repo).values(downloads=col(Repo.downloads) + 1)
    with ThreadPoolExecutor(1) as pool:
        with hub.db.write() as another:
            another.execute(one_more.where(col(Repo.id) == first))
            flush = pool.submit(counted.flush, hub.db)
            while not somebody_waits(hub):
                time.sleep(0.01)
            another.execute(one_more.where(col(Repo.id) == second))
        flush.result()
    with hub.db.read() as session:
        assert [repo.downloads for repo in session.exec(select(Repo))] == [2, 2]


def somebody_waits(hub: Hub) -> bool:
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    with hub.db.read() as session:
        return bool(session.scalar(text(f"{waiting} AND wait_event_type = 'Lock'")))


@postgresql_only
def test_the_second_of_two_who_do_the_same_thing_sees_what_the_first_has_done(
    hub: Hub, admin: Viewer
) -> None:
    new_repo(hub, admin, "a")
    numbers = []
    with hub.db.write() as session:
        repo = repos.get_repo(session, admin, "admin", "a")
        repos.update_settings(session, admin, repo, gated=Gate.AUTO)
        numbers = [pulls.propose(session, admin, repo, f"Pull {n}").num for n in range(3)]

    def on(number: int, step: Callable[[Session, Discussion], object]) -> Step:
        return lambda session, repo: step(session, discussions.get(session, repo, number))

    def after(first: Step, second: Step) -> BaseException | None:
        def begin_second() -> None:
            with hub.db.write() as another:
                second(another, repo)

        with ThreadPoolExecutor(1) as pool:
            with hub.db.write() as session:
                first(session, repo)
                late = pool.submit(begin_second)
                while not somebody_waits(hub) and not late.done():
                    time.sleep(0.01)
            return late.exception()

    def merge(session: Session, found: Discussion) -> object:
        return pulls.merge(session, admin, repo, found)

    def close(session: Session, found: Discussion) -> object:
        return discussions.set_status(session, admin, repo, found, DiscussionStatus.CLOSED)

    for number, (first, second) in zip(
        numbers, ((merge, merge), (merge, close), (close, merge)), strict=True
    ):
        assert isinstance(after(on(number, first), on(number, second)), Conflict)
    for step in (likes.like, likes.unlike, access.ask):

        def do(session: Session, repo: Repo, step: Callable[..., object] = step) -> object:
            return step(session, admin, repo)

        assert after(do, do) is None
    with hub.db.read() as session:
        talks = discussions.listed(session, repo).discussions
        assert [found.status for found, _ in talks] == ["closed", "merged", "merged"]


@postgresql_only
def test_the_demo_catalogue_is_made_once(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "ink"
    folder.mkdir()
    (folder / "README.md").write_bytes(b"# Ink\n")
    at_once(lambda _: seed(hub, {"demo/ink": folder}))
    with hub.db.read() as session:
        (repo,) = session.exec(select(Repo))
        history, _ = commits.history(session, repo, refs.resolve(session, repo))
    assert [commit.message for commit in history] == ["Demo catalogue", "initial commit"]


@postgresql_only
def test_parts_that_nobody_finishes_are_dropped_by_one_server(hub: Hub, admin: Viewer) -> None:
    repo_id = new_repo(hub, admin, "a")
    with hub.db.write() as session:
        repo = session.get_one(Repo, repo_id)
        for number in range(20):
            made = uploads.begin(
                session, admin, repo, sha256=Sha256("0" * 64), size=number, part_bytes=1,
                handle=hub.store.parts.begin(), is_direct=False,
            )  # fmt: skip
            made.expires_at = now() - timedelta(days=1)
    assert sum(at_once(lambda _: drop_expired(hub))) == 20


# Real processes


@dataclass(frozen=True)
class Site:
    """Two servers, and their catalogue and bucket opened in the test's own process as a third."""

    servers: tuple[RunningHub, RunningHub]
    token: str
    hub: Hub
    environment: dict[str, str]

    @property
    def auth(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def api(self, n: int) -> HfApi:
        return HfApi(endpoint=self.servers[n % 2].url, token=self.token)

    def get(self, n: int, path: str) -> httpx2.Response:
        return httpx2.get(self.servers[n % 2].url + path, headers=self.auth, timeout=WAIT_S)


@pytest.fixture(scope="module")
def site(
    postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """Each with a folder of its own, as on two machines."""
    folder = tmp_path_factory.mktemp("servers")
    (folder / "s3").mkdir()
    with ExitStack() as stack:
        environment = stack.enter_context(pytest.MonkeyPatch.context())
        bucket = stack.enter_context(serve_s3(folder / "s3"))
        bucket.make_bucket("hub")
        bucket.use(environment)
        settings = {
            "database_url": stack.enter_context(postgres_server.fresh()),
            "s3_bucket": "hub",
            "secret_key": "the same on every server of a hub",
            "webhook_private": "true",
        }

        def start(n: int) -> RunningHub:
            server = start_hub(folder / f"{n}", **settings, workers=n)
            stack.callback(server.stop)
            return server

        first, second = start(0), start(1)
        third = stack.enter_context(open_hub(settings_of(folder / "third", **settings)))
        told = {f"GRAFT_{name.upper()}": value for name, value in settings.items()}
        yield Site((first, second), first.admin_token, third, dict(os.environ) | told)


def test_they_have_one_administrator_and_one_store(site: Site) -> None:
    assert [bool(server.admin_token) for server in site.servers] == [True, False]
    for n in range(2):
        assert site.get(n, "/readyz").status_code == 200
        assert site.get(n, "/api/whoami-v2").json()["name"] == "admin"


def test_a_browser_that_signed_in_at_one_is_known_to_all(site: Site) -> None:
    first, second = site.servers
    html = {"Accept": "text/html"}
    with httpx2.Client(headers=html, timeout=WAIT_S) as browser:
        assert browser.post(first.url + "/login", data={"token": site.token}).status_code == 303
        (cookie,) = browser.cookies.jar
        known = httpx2.get(
            second.url + "/settings",
            headers=html | {"Cookie": f"{cookie.name}={cookie.value}"},
            timeout=WAIT_S,
        )
    assert known.status_code == 200


def test_a_name_is_given_to_one(site: Site) -> None:
    def take(n: int) -> int:
        url = site.servers[n % 2].url + "/api/repos/create"
        answer = httpx2.post(url, json={"name": "taken"}, headers=site.auth, timeout=WAIT_S)
        return answer.status_code

    assert sorted(at_once(take)) == [200] + [409] * (N - 1)


def test_commits_to_one_branch_by_both_are_all_kept(site: Site) -> None:
    site.api(0).create_repo("admin/branch")

    def commit(n: int) -> str:
        add = CommitOperationAdd(f"{n}.txt", b"%d" % n)
        made = site.api(n).create_commit("admin/branch", [add], commit_message=f"{n}")
        return made.oid

    made = at_once(commit)
    history = [commit.commit_id for commit in site.api(1).list_repo_commits("admin/branch")]
    assert sorted(history[:-1]) == sorted(made)
    for n in range(N):
        # The bytes went to the bucket through the other server.
        assert site.get(n + 1, f"/admin/branch/resolve/main/{n}.txt").content == b"%d" % n


def test_every_event_is_delivered_once(site: Site) -> None:
    with receiving() as receiver:
        hook = site.api(0).create_webhook(url=receiver.url, watched=WATCHED)
        at_once(lambda n: site.api(n).create_repo(f"admin/told{n}"))
        receiver.wait(N)
        until = time.monotonic() + WAIT_S
        while states(site) != {"delivered"}:
            assert time.monotonic() < until
            time.sleep(0.02)
        site.api(1).delete_webhook(hook.id)
    told = [payload.repo.name for payload in receiver.payloads()]
    assert sorted(told) == [f"admin/told{n}" for n in range(N)]


def states(site: Site) -> set[str]:
    with site.hub.db.read() as session:
        return {delivery.state for delivery in session.exec(select(Delivery))}


@contextmanager
def worker(site: Site, folder: Path) -> Iterator[None]:
    """`graft worker` on a machine of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", "worker"],
        cwd=Path(__file__).parents[2],
        env=site.environment | {"GRAFT_DATA_DIR": str(folder)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "Taking jobs, 1 at a time.\n"
        yield
    finally:
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 0


def test_jobs_are_done_once_by_a_server_and_a_worker(site: Site, tmp_path: Path) -> None:
    write_lora(tmp_path / "ink" / "ink.safetensors", 0)
    site.api(0).create_repo("admin/ink")
    site.api(0).upload_folder(repo_id="admin/ink", folder_path=tmp_path / "ink")

    def merge(n: int) -> str:
        recipe = {"kind": "merge", "inputs": [{"ref": "admin/ink", "strength": 0.5}]}
        publish = {"repo": f"admin/merged{n}", "path": "merged.safetensors"}
        accepted = httpx2.post(
            site.servers[0].url + "/api/merges",
            json={"recipe": recipe, "publish": publish},
            headers=site.auth,
            timeout=WAIT_S,
        )
        assert accepted.status_code == 202, accepted.text
        return str(accepted.json()["id"])

    with worker(site, tmp_path / "worker"):
        jobs = at_once(merge, 3)
        until = time.monotonic() + WAIT_S
        for n, job_id in enumerate(jobs):
            while (job := site.get(n, f"/api/jobs/{job_id}").json())["state"] != "succeeded":
                assert job["error"] is None
                assert time.monotonic() < until
                time.sleep(0.02)
    with site.hub.db.read() as session:
        assert [session.get_one(Job, job_id).fence for job_id in jobs] == [1, 1, 1]
    assert list((tmp_path / "worker" / "store" / "cache" / "kept").iterdir()), (
        "the worker had no job"
    )
    for n in range(3):
        # The first commit, and the result's.
        assert len(site.api(n).list_repo_commits(f"admin/merged{n}")) == 2


def test_a_collection_beside_commits_through_both_loses_nothing(site: Site) -> None:
    """What nothing refers to goes as soon as possible, while the same bytes come again."""
    settings = site.hub.settings.model_copy(update={"gc_grace_days": 0, "gc_condemned_hours": 0})
    hasty = replace(site.hub, settings=Settings.model_construct(**settings.model_dump()))
    stop = threading.Event()
    kept: dict[str, bytes] = {}
    site.api(0).create_repo("admin/kept")  # Without any repo nothing is collected.

    def commit(n: int) -> None:
        api = site.api(n)
        for turn in range(6):
            name, content = f"admin/kept{n}-{turn}", b"%d %d" % (n // 2, turn // 2) * 50
            api.create_repo(name)
            add = CommitOperationAdd("a.txt", content)
            try:
                api.create_commit(name, [add], commit_message="m")
            except HfHubHTTPError as error:
                if error.response.status_code != 503:
                    raise
                continue  # These bytes were just being collected.
            if turn % 2 == 0:
                api.delete_repo(name)
            else:
                kept[name] = content

    def collect() -> set[str]:
        gone: set[str] = set()
        while not stop.is_set():
            with site.hub.db.write() as session:
                session.execute(delete(Hold))  # As if two days had passed.
            moment = now() + timedelta(seconds=1)
            planned = gc.plan(hasty, moment)
            done = gc.collect(hasty, planned, confirm=10_000, without_backup=True, moment=moment)
            gone |= done.condemn.sizes.keys() | done.delete.sizes.keys()
        return gone

    with ThreadPoolExecutor(1) as pool:
        collecting = pool.submit(collect)
        try:
            at_once(commit, 4)
        finally:
            stop.set()
        gone = collecting.result()
    assert gone & {hashlib.sha256(content).hexdigest() for content in kept.values()}
    for n, (name, content) in enumerate(kept.items()):
        assert site.get(n, f"/{name}/resolve/main/a.txt").content == content
    assert is_sound(fsck(site.hub, full=True))
