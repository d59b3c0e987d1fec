"""The job protocol on a real catalogue with real child processes: every way an attempt can end."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError
from sqlmodel import Session, select

from hub.blobs.store import Sha256
from hub.context import Hub
from hub.errors import Forbidden, NoSpace, StoreFailed, TooMany
from hub.jobs import queue, results, service
from hub.jobs.attempt import Made, Patience
from hub.jobs.card import write_card
from hub.jobs.dispatcher import LocalDispatcher, settle
from hub.jobs.inputs import pin, resolve
from hub.jobs.models import Edge, Job, JobKind, JobState
from hub.jobs.queue import Claim, LeaseLost, Progress
from hub.jobs.schemas import JobRequest, Publish
from hub.repos import commits, refs
from hub.repos import service as repos
from hub.repos.models import Commit, Gate
from hub.repos.operations import Add
from hub.users import service as users
from hub.users.service import Viewer
from merge.recipe import Recipe
from tests.fixtures.malformed import entry, frame
from tests.fixtures.tiny_files import write_lora
from tests.hub.conftest import both_databases, make_user

pytestmark = both_databases

CHILD = Path(__file__).parents[1] / "fixtures" / "odd_child.py"
ANY_FILE = frame({"a": entry()}, bytes(16))
SOON = (0.01, 0.01)
QUICK = Patience(
    lease_s=600,
    silence_s=300,
    deadline_s=600,
    look_s=0.05,
    pauses_s=SOON,
    publish_pauses_s=SOON,
)
WAIT_S = 300.0


def make_repo(hub: Hub, viewer: Viewer, name: str, content: bytes = ANY_FILE) -> None:
    stored = hub.store.put([content])
    with hub.db.write() as session:
        repo = repos.create_repo(session, viewer, "admin", name)
        add = Add(f"{name}.safetensors", stored, lfs=False)
        commits.create(session, viewer, repo, operations=[add], message="add")


@pytest.fixture
def enqueue(hub: Hub, admin: Viewer) -> Callable[[], str]:
    """Queues a merge of admin/ink into admin/result/merged.safetensors; gives the job's id."""
    make_repo(hub, admin, "ink")

    def make(**publish: object) -> str:
        recipe = Recipe.parse({"kind": "merge", "inputs": [{"ref": "admin/ink", "strength": 0.7}]})
        with hub.db.read() as session:
            resolved = resolve(session, hub.store, admin, recipe)
        assert admin.user_id is not None
        target = {"repo": "admin/result", "path": "merged.safetensors"} | publish
        with hub.db.write() as session:
            job = service.enqueue(
                session,
                admin.user_id,
                pin(recipe, resolved),
                resolved,
                Publish.model_validate(target),
                {"output_bytes": 0, "file_bytes": 2**20, "memory_bytes": 2**30, "threads": 1},
            )
            return job.id

    return make


@contextmanager
def dispatcher(hub: Hub, how: str, patience: Patience = QUICK) -> Iterator[LocalDispatcher]:
    made = LocalDispatcher(hub, 1, command=[sys.executable, str(CHILD), how], patience=patience)
    made.start()
    try:
        yield made
    finally:
        made.stop()


def read(hub: Hub, job_id: str) -> Job:
    with hub.db.read() as session:
        return session.get_one(Job, job_id)


def wait_for(hub: Hub, job_id: str, condition: Callable[[Job], bool]) -> Job:
    pause = threading.Event()
    for _ in range(int(WAIT_S / 0.02)):
        job = read(hub, job_id)
        if condition(job):
            return job
        pause.wait(0.02)
    raise AssertionError(f"still {job.state}, {job.progress_done} done, error {job.error}")


def is_over(job: Job) -> bool:
    return job.state in ("succeeded", "failed", "cancelled")


def is_working(job: Job) -> bool:
    return job.state == "running" and job.progress_done > 0


def run(hub: Hub, how: str, job_id: str, patience: Patience = QUICK) -> Job:
    with dispatcher(hub, how, patience):
        return wait_for(hub, job_id, is_over)


def take(hub: Hub, lease_s: float = 60) -> Claim | None:
    with hub.db.write() as session:
        return queue.claim(session, lease_s)


def children_of(hub: Hub) -> list[int]:
    """Processes that were started for a job of this hub."""
    mark = str(hub.scratch).encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "environ").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue
    return found


def nothing_is_left(hub: Hub) -> bool:
    return not list(hub.scratch.iterdir()) and not children_of(hub)


def commits_of(hub: Hub, viewer: Viewer, name: str) -> list[Commit]:
    with hub.db.read() as session:
        repo = repos.get_repo(session, viewer, "admin", name)
        found, _ = commits.history(session, repo, refs.resolve(session, repo))
    return found


# Claims, leases, fences


def test_a_job_is_claimed_once(hub: Hub, enqueue: Callable[[], str]) -> None:
    job_id = enqueue()
    assert take(hub) == Claim(job_id, 1)
    assert take(hub) is None


def test_jobs_are_claimed_in_the_order_they_came(hub: Hub, enqueue: Callable[[], str]) -> None:
    ids = [enqueue() for _ in range(3)]
    claims = [take(hub) for _ in range(3)]
    assert [claim.job_id for claim in claims if claim] == ids


def test_concurrent_workers_never_get_the_same_job(hub: Hub, enqueue: Callable[[], str]) -> None:
    ids = {enqueue() for _ in range(8)}
    found: list[Claim | None] = []
    threads = [
        threading.Thread(target=lambda: found.extend(take(hub) for _ in range(3))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    got = [claim.job_id for claim in found if claim is not None]
    assert sorted(got) == sorted(ids)


def test_the_same_request_at_the_same_moment_is_one_job(
    hub: Hub, admin: Viewer, tmp_path: Path
) -> None:
    write_lora(tmp_path / "ink.safetensors", 0)
    make_repo(hub, admin, "ink", (tmp_path / "ink.safetensors").read_bytes())
    request = JobRequest.model_validate(
        {
            "recipe": {"kind": "merge", "inputs": [{"ref": "admin/ink"}]},
            "publish": {"repo": "admin/result", "path": "merged.safetensors"},
        }
    )
    found: list[str] = []
    start = threading.Barrier(4)

    def submit() -> None:
        start.wait()
        found.append(service.submit(hub, admin, (JobKind.MERGE,), request, "key").id)

    threads = [threading.Thread(target=submit) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    with hub.db.read() as session:
        assert len(session.exec(select(Job)).all()) == 1


def test_a_flood_of_jobs_of_one_user_is_refused(
    hub: Hub, admin: Viewer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "MAX_UNFINISHED", 2)
    write_lora(tmp_path / "ink.safetensors", 0)
    make_repo(hub, admin, "ink", (tmp_path / "ink.safetensors").read_bytes())
    request = JobRequest.model_validate(
        {
            "recipe": {"kind": "merge", "inputs": [{"ref": "admin/ink"}]},
            "publish": {"repo": "admin/result", "path": "merged.safetensors"},
        }
    )
    first = service.submit(hub, admin, (JobKind.MERGE,), request)
    service.submit(hub, admin, (JobKind.MERGE,), request)
    with pytest.raises(TooMany):
        service.submit(hub, admin, (JobKind.MERGE,), request)
    service.cancel(hub, admin, first.id)
    service.submit(hub, admin, (JobKind.MERGE,), request)


def test_a_lapsed_lease_passes_the_job_on_and_the_old_attempt_may_change_nothing(
    hub: Hub, enqueue: Callable[[], str]
) -> None:
    job_id = enqueue()
    old = take(hub, lease_s=-1)
    new = take(hub)
    assert (old, new) == (Claim(job_id, 1), Claim(job_id, 2))
    assert old is not None
    for change in (
        lambda s: queue.beat(s, old, Progress(1, 2, None), 60),
        lambda s: queue.extend(s, old, 60),
        lambda s: queue.is_cancel_requested(s, old),
        lambda s: queue.succeed(s, old, {}),
        lambda s: queue.fail(s, old, {}),
        lambda s: queue.crashed(s, old, "x"),
        lambda s: queue.cancelled(s, old),
        lambda s: queue.hand_back(s, old),
    ):
        with pytest.raises(LeaseLost), hub.db.write() as session:
            change(session)
    assert (read(hub, job_id).state, read(hub, job_id).fence) == ("running", 2)


def test_progress_extends_the_lease(hub: Hub, enqueue: Callable[[], str]) -> None:
    job_id = enqueue()
    claim = take(hub, lease_s=5)
    assert claim is not None
    before = read(hub, job_id).lease_until
    with hub.db.write() as session:
        queue.beat(session, claim, Progress(1, 4, 9.0), 60)
    job = read(hub, job_id)
    assert before is not None
    assert job.lease_until is not None
    assert job.lease_until > before
    assert (job.progress_done, job.progress_total, job.eta_s) == (1, 4, 9.0)


def test_a_job_whose_workers_keep_disappearing_fails_after_three_attempts(
    hub: Hub, enqueue: Callable[[], str]
) -> None:
    job_id = enqueue()
    for _ in range(queue.MAX_ATTEMPTS):
        assert take(hub, lease_s=-1) is not None
    assert take(hub) is None
    job = read(hub, job_id)
    assert job.state == "failed"
    assert job.error == {
        "code": "JobCrashed",
        "message": "the worker that ran this job disappeared; given up after 3 attempts",
        "param": None,
    }


def test_an_attempt_that_was_delivered_twice_publishes_once(
    hub: Hub, admin: Viewer, enqueue: Callable[[], str], tmp_path: Path
) -> None:
    job_id = enqueue()
    old = take(hub, lease_s=-1)
    assert old is not None
    done = run(hub, "finish", job_id)
    assert done.state == "succeeded"
    assert done.result is not None
    output = tmp_path / "late" / "output" / "merged.safetensors"
    output.parent.mkdir(parents=True)
    output.write_bytes(b"".join(hub.store.open(done.result["sha256"])))
    manifest = {
        "sha256": done.result["sha256"],
        "recipe_digest": done.recipe_digest,
        "certificate": {},
    }
    before = len(commits_of(hub, admin, "result"))
    with pytest.raises(LeaseLost):
        settle(hub, old, Made(manifest), tmp_path / "late", QUICK)
    assert read(hub, job_id).result == done.result
    assert len(commits_of(hub, admin, "result")) == before


# How attempts end


def test_a_finished_job_is_one_commit_with_its_card_and_lineage(
    hub: Hub, admin: Viewer, enqueue: Callable[[], str]
) -> None:
    job = run(hub, "finish", enqueue())
    assert (job.state, job.attempts, job.error) == ("succeeded", 1, None)
    assert (job.progress_done, job.progress_total) == (2, 2)
    assert job.result is not None
    assert job.finished_at is not None
    made, first = commits_of(hub, admin, "result")
    assert first.message == "initial commit"
    assert job.result["commit"] == made.id
    with hub.db.read() as session:
        files = {item.path: item for item in commits.entries(session, made)}
        edges = session.exec(select(Edge)).all()
        ink = repos.get_repo(session, admin, "admin", "ink")
    assert set(files) == {"merged.safetensors", "README.md"}
    assert files["merged.safetensors"].sha256 == job.result["sha256"]
    assert [
        (e.child_sha256, e.parent_repo_id, e.parent_path, e.relation, e.strength) for e in edges
    ] == [(job.result["sha256"], ink.id, "ink.safetensors", "input", 0.7)]
    assert nothing_is_left(hub)


@pytest.mark.parametrize(
    ("how", "code", "message"),
    [
        ("abort", "JobCrashed", "was ended by signal 6"),
        ("silent", "JobCrashed", "ended without a result"),
        ("lie", "JobCrashed", "the output was not whole: its SHA-256 is"),
    ],
)
def test_a_job_that_crashes_every_time_is_given_up(
    hub: Hub, enqueue: Callable[[], str], how: str, code: str, message: str
) -> None:
    job = run(hub, how, enqueue())
    assert (job.state, job.attempts) == ("failed", 3)
    assert job.error is not None
    assert job.error["code"] == code
    assert message in job.error["message"]
    assert nothing_is_left(hub)


@pytest.mark.parametrize("how", ["abort-once", "lie-once"])
def test_a_job_that_crashes_once_succeeds_in_its_second_attempt(
    hub: Hub, enqueue: Callable[[], str], how: str
) -> None:
    job = run(hub, how, enqueue())
    assert (job.state, job.attempts, job.error) == ("succeeded", 2, None)


@pytest.mark.parametrize(
    ("how", "code", "message"),
    [
        ("refuse", "NotFinite", "a.safetensors: x holds NaN"),
        ("raise", "InternalError", "the engine failed unexpectedly (ValueError: a bug in the"),
    ],
)
def test_an_error_that_would_come_again_ends_the_job_at_once(
    hub: Hub, enqueue: Callable[[], str], how: str, code: str, message: str
) -> None:
    job = run(hub, how, enqueue())
    assert (job.state, job.attempts) == ("failed", 1)
    assert job.error is not None
    assert job.error["code"] == code
    assert message in job.error["message"]
    assert nothing_is_left(hub)


def test_a_child_that_hangs_is_ended_and_tried_again(hub: Hub, enqueue: Callable[[], str]) -> None:
    patience = Patience(lease_s=600, silence_s=1, deadline_s=600, look_s=0.05)
    job = run(hub, "hang", enqueue(), patience)
    assert (job.state, job.attempts) == ("failed", 3)
    assert job.error == {
        "code": "JobCrashed",
        "message": "no progress for 1 seconds; given up after 3 attempts",
        "param": None,
    }
    assert nothing_is_left(hub)


def test_a_job_that_takes_too_long_is_ended(hub: Hub, enqueue: Callable[[], str]) -> None:
    patience = Patience(lease_s=600, silence_s=300, deadline_s=1, look_s=0.05)
    job = run(hub, "work", enqueue(), patience)
    assert (job.state, job.attempts) == ("failed", 1)
    assert job.error is not None
    assert job.error["code"] == "JobTimeout"
    assert nothing_is_left(hub)


def test_a_killed_child_is_tried_again(hub: Hub, enqueue: Callable[[], str]) -> None:
    job_id = enqueue()
    with dispatcher(hub, "work-once"):
        wait_for(hub, job_id, is_working)
        (child,) = children_of(hub)
        os.kill(child, signal.SIGKILL)
        job = wait_for(hub, job_id, is_over)
    assert (job.state, job.attempts) == ("succeeded", 2)


def test_a_worker_that_stops_hands_its_job_back(hub: Hub, enqueue: Callable[[], str]) -> None:
    job_id = enqueue()
    with dispatcher(hub, "work"):
        wait_for(hub, job_id, is_working)
    job = read(hub, job_id)
    assert (job.state, job.attempts, job.fence) == ("queued", 0, 1)
    assert nothing_is_left(hub)
    assert run(hub, "finish", job_id).attempts == 1


def test_a_start_takes_up_what_a_killed_server_left(hub: Hub, enqueue: Callable[[], str]) -> None:
    job_id = enqueue()
    # With one process the leases of its predecessor count for nothing; of several, they run out.
    claim = take(hub, lease_s=3600 if hub.db.is_sqlite else -1)
    (hub.scratch / f"job-{job_id}-1").mkdir()
    (hub.scratch / f"job-{job_id}-1" / "half").write_bytes(b"x")
    job = run(hub, "finish", job_id)
    assert claim is not None
    assert (job.state, job.attempts, job.fence) == ("succeeded", 2, 2)
    assert nothing_is_left(hub)


def test_a_full_disk_fails_the_job_and_starts_nothing(hub: Hub, enqueue: Callable[[], str]) -> None:
    job_id = enqueue()
    with hub.db.write() as session:
        job = session.get_one(Job, job_id)
        job.resources = job.resources | {"output_bytes": 2**60}
    job = run(hub, "finish", job_id)
    assert (job.state, job.attempts) == ("failed", 1)
    assert job.error is not None
    assert job.error["code"] == "NoSpace"
    assert nothing_is_left(hub)


# Cancel


def test_a_queued_job_is_cancelled_at_once(
    hub: Hub, admin: Viewer, enqueue: Callable[[], str]
) -> None:
    job_id = enqueue()
    assert service.cancel(hub, admin, job_id).state == JobState.CANCELLED
    assert take(hub) is None
    assert service.cancel(hub, admin, job_id).state == JobState.CANCELLED


def test_a_running_job_is_cancelled_and_its_process_is_gone(
    hub: Hub, admin: Viewer, enqueue: Callable[[], str]
) -> None:
    job_id = enqueue()
    with dispatcher(hub, "work"):
        wait_for(hub, job_id, is_working)
        assert service.cancel(hub, admin, job_id).state == JobState.RUNNING
        job = wait_for(hub, job_id, is_over)
        assert job.state == "cancelled"
    assert job.finished_at is not None
    assert nothing_is_left(hub)


def test_a_hanging_job_is_cancelled(hub: Hub, admin: Viewer, enqueue: Callable[[], str]) -> None:
    job_id = enqueue()
    with dispatcher(hub, "hang"):
        wait_for(hub, job_id, lambda job: job.progress_total is not None)
        service.cancel(hub, admin, job_id)
        assert wait_for(hub, job_id, is_over).state == "cancelled"
    assert nothing_is_left(hub)


def test_a_cancel_that_comes_before_the_commit_wins(
    hub: Hub, admin: Viewer, enqueue: Callable[[], str], tmp_path: Path
) -> None:
    finished = run(hub, "finish", enqueue())
    assert finished.result is not None
    job_id = enqueue()
    claim = take(hub)
    assert claim is not None
    service.cancel(hub, admin, job_id)
    output = tmp_path / "output" / "merged.safetensors"
    output.parent.mkdir()
    output.write_bytes(b"".join(hub.store.open(finished.result["sha256"])))
    manifest = {
        "sha256": finished.result["sha256"],
        "recipe_digest": finished.recipe_digest,
        "certificate": {},
    }
    before = len(commits_of(hub, admin, "result"))
    settle(hub, claim, Made(manifest), tmp_path, QUICK)
    assert read(hub, job_id).state == "cancelled"
    assert len(commits_of(hub, admin, "result")) == before


def test_jobs_of_a_disabled_user_end_whether_they_wait_or_run(
    hub: Hub, admin: Viewer, enqueue: Callable[[], str]
) -> None:
    ada, _ = make_user(hub, "ada")
    running, waiting, others = enqueue(), enqueue(), enqueue()
    with hub.db.write() as session:
        for job_id in (running, waiting):
            session.get_one(Job, job_id).requester_id = ada.user_id or 0
    with dispatcher(hub, "work"):
        wait_for(hub, running, is_working)
        with hub.db.write() as session:
            users.change_user(session, admin.require_user(), "ada", is_disabled=True)
        for job_id in (running, waiting):
            job = wait_for(hub, job_id, is_over)
            assert job.state == "cancelled"
            assert job.error == {"code": "Forbidden", "message": "ada was disabled", "param": None}
        assert job.attempts == 1
        wait_for(hub, others, is_working)


def test_a_cancelled_job_whose_worker_disappeared_is_cancelled(
    hub: Hub, admin: Viewer, enqueue: Callable[[], str]
) -> None:
    job_id = enqueue()
    take(hub, lease_s=-1)
    service.cancel(hub, admin, job_id)
    assert take(hub) is None
    assert read(hub, job_id).state == "cancelled"


# What is private stays private


@pytest.mark.parametrize("closed", [{"private": True}, {"gated": Gate.MANUAL}])
def test_the_result_of_a_private_or_gated_input_is_private(
    hub: Hub, admin: Viewer, enqueue: Callable[[], str], closed: dict[str, Any]
) -> None:
    job_id = enqueue()
    with hub.db.write() as session:
        ink = repos.get_repo(session, admin, "admin", "ink")
        repos.update_settings(session, admin, ink, **closed)
    assert run(hub, "finish", job_id).state == "succeeded"
    with hub.db.read() as session:
        assert repos.get_repo(session, admin, "admin", "result").private


@pytest.mark.parametrize("closed", [{"private": True}, {"gated": Gate.AUTO}])
def test_an_input_that_was_closed_is_not_published_into_a_public_repo(
    hub: Hub, admin: Viewer, enqueue: Callable[[], str], closed: dict[str, Any]
) -> None:
    make_repo(hub, admin, "result")
    job_id = enqueue()
    with hub.db.write() as session:
        ink = repos.get_repo(session, admin, "admin", "ink")
        repos.update_settings(session, admin, ink, **closed)
    before = len(commits_of(hub, admin, "result"))
    job = run(hub, "finish", job_id)
    assert job.state == "failed"
    assert job.error is not None
    assert job.error["code"] == Forbidden.__name__
    assert "admin/ink is not open to all" in job.error["message"]
    assert len(commits_of(hub, admin, "result")) == before


def test_two_jobs_into_one_repo_both_keep_their_files(
    hub: Hub, admin: Viewer, enqueue: Callable[..., str]
) -> None:
    one, two = enqueue(path="one.safetensors"), enqueue(path="two.safetensors")
    with dispatcher(hub, "finish"):
        assert wait_for(hub, one, is_over).state == "succeeded"
        assert wait_for(hub, two, is_over).state == "succeeded"
    with hub.db.read() as session:
        repo = repos.get_repo(session, admin, "admin", "result")
        head = refs.resolve(session, repo)
        paths = {item.path for item in commits.entries(session, head)}
        card = commits.entry(session, head, "README.md")
    assert paths == {"one.safetensors", "two.safetensors", "README.md"}
    text = b"".join(hub.store.open(Sha256(card.sha256))).decode()
    assert "one.safetensors" in text
    assert "two.safetensors" in text


@pytest.mark.parametrize("exists", [True, False])
def test_a_commit_that_comes_between_is_kept(
    hub: Hub,
    admin: Viewer,
    enqueue: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
    exists: bool,
) -> None:
    if exists:
        make_repo(hub, admin, "result")
    calls = []

    def write_card_late(*given: Any) -> str:
        calls.append(given)
        if len(calls) == 1:
            stored = hub.store.put([b"# Written meanwhile\n"])
            with hub.db.write() as session:
                repo = repos.create_repo(session, admin, "admin", "result", exist_ok=True)
                add = Add("README.md", stored, lfs=False)
                commits.create(session, admin, repo, operations=[add], message="meanwhile")
        return write_card(*given)

    monkeypatch.setattr("hub.jobs.results.write_card", write_card_late)
    assert run(hub, "finish", enqueue()).state == "succeeded"
    assert len(calls) == 2
    newest, before, *_ = commits_of(hub, admin, "result")
    assert before.message == "meanwhile"
    with hub.db.read() as session:
        card = commits.entry(session, newest, "README.md")
    text = b"".join(hub.store.open(Sha256(card.sha256))).decode()
    assert "# Written meanwhile\n" in text
    assert "merged.safetensors" in text


@pytest.mark.parametrize(("ask_fails", "attempts"), [(1, 2), (2, 1)])
def test_a_database_that_fails_for_a_moment_costs_nothing(
    hub: Hub,
    admin: Viewer,
    enqueue: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
    ask_fails: int,
    attempts: int,
) -> None:
    """At the end, and before the job's process begins (which is put off) or while it runs."""
    failures = iter([OperationalError("COMMIT", {}, Exception("connection lost")), None])
    succeed, is_cancel_requested = queue.succeed, queue.is_cancel_requested
    asked: list[Claim] = []

    def succeed_late(session: Session, claim: Claim, result: dict[str, Any]) -> None:
        failure = next(failures)
        if failure is not None:
            raise failure
        succeed(session, claim, result)

    def ask(session: Session, claim: Claim) -> bool:
        asked.append(claim)
        if len(asked) == ask_fails:
            raise OperationalError("SELECT", {}, Exception("connection lost"))
        return is_cancel_requested(session, claim)

    monkeypatch.setattr(queue, "succeed", succeed_late)
    monkeypatch.setattr(queue, "is_cancel_requested", ask)
    job = run(hub, "finish", enqueue())
    assert (job.state, job.attempts, job.faults) == ("succeeded", attempts, attempts - 1)
    assert next(failures, "none left") == "none left"
    assert len(asked) >= ask_fails
    assert len(commits_of(hub, admin, "result")) == 2


@pytest.mark.parametrize("step", ["local", "adopt", "put"])
def test_a_store_that_fails_for_a_moment_costs_nothing(
    hub: Hub,
    admin: Viewer,
    enqueue: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
    step: str,
) -> None:
    """While inputs are fetched, the output is taken in, the card is written."""
    job_id = enqueue()
    works, failures = getattr(type(hub.store), step), iter([StoreFailed("503 Slow Down")])

    def fail_once(*args: Any, **named: Any) -> Any:
        for failure in failures:
            raise failure
        return works(*args, **named)

    monkeypatch.setattr(type(hub.store), step, fail_once)
    job = run(hub, "finish", job_id)
    assert (job.state, job.error) == ("succeeded", None)
    # What was made is not made again.
    assert (job.attempts, job.faults) == ((2, 1) if step == "local" else (1, 0))
    assert next(failures, "none left") == "none left"
    assert len(commits_of(hub, admin, "result")) == 2


def test_a_store_that_stays_away_ends_the_job_with_its_reason(
    hub: Hub, enqueue: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = enqueue()

    def fail(*_: Any, **__: Any) -> Any:
        raise StoreFailed("nobody answers at the bucket")

    monkeypatch.setattr(type(hub.store), "adopt", fail)
    job = run(hub, "finish", job_id)
    assert (job.state, job.attempts, job.faults) == ("failed", 3, 3)
    message = "nobody answers at the bucket; given up after 3 attempts"
    assert job.error == {"code": "StoreFailed", "message": message, "param": None}
    assert nothing_is_left(hub)


def test_a_job_that_was_put_off_waits_while_others_go_on_and_can_be_cancelled(
    hub: Hub, admin: Viewer, enqueue: Callable[[], str]
) -> None:
    first = enqueue()

    def put_off(pause_s: float) -> None:
        claim = take(hub)
        assert claim is not None
        assert claim.job_id == first
        away = {"code": "StoreFailed", "message": "away", "param": None}
        with hub.db.write() as session:
            queue.put_off(session, claim, away, (pause_s, pause_s))

    put_off(0)
    put_off(600)
    assert (read(hub, first).state, read(hub, first).faults) == ("queued", 2)
    with hub.db.read() as session:
        assert not queue.has_work(session)
    second = enqueue()
    assert take(hub) == Claim(second, 1)
    assert take(hub) is None
    service.cancel(hub, admin, first)
    assert read(hub, first).state == "cancelled"


@pytest.mark.parametrize(
    ("step", "error", "code"),
    [
        ("local", FileNotFoundError("blob"), "EntryNotFound"),
        ("local", NoSpace("the cache is full"), "NoSpace"),
        ("adopt", NoSpace("the store is full"), "NoSpace"),
    ],
)
def test_what_no_other_attempt_mends_ends_the_job_at_once(
    hub: Hub,
    enqueue: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    error: Exception,
    code: str,
) -> None:
    job_id = enqueue()

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(type(hub.store), step, fail)
    job = run(hub, "finish", job_id)
    assert (job.state, job.attempts) == ("failed", 1)
    assert job.error is not None
    assert job.error["code"] == code
    assert nothing_is_left(hub)


def test_output_name_is_the_last_part_of_the_path(hub: Hub, enqueue: Callable[..., str]) -> None:
    job = read(hub, enqueue(path="styles/both.safetensors"))
    assert results.output_name(job) == "both.safetensors"
