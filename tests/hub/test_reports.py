"""Reports over HTTP: the real engine in its own process, and every way in which one can end."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import safetensors.numpy
from starlette.testclient import TestClient

from hub.app import create_app
from hub.context import Hub
from hub.errors import Busy, TooLarge
from hub.jobs.inputs import Resolved, pin, resolve
from hub.reports.pool import Bounds, Pool, ReportFailed, Task
from hub.users.service import Viewer
from merge.formats.writer import write_file
from merge.recipe import Recipe
from merge.reports.measure import measure
from tests.fixtures.catalogue import publish_files
from tests.fixtures.server import RunningHub, running_hub
from tests.fixtures.tiny_files import write_lora
from tests.hub.conftest import bearer, make_user
from tests.hub.test_jobs_api import Person, make_data

ODD = Path(__file__).parents[1] / "fixtures" / "odd_reporter.py"
WAIT_S = 300.0
BOTH = {
    "kind": "merge",
    "inputs": [{"ref": "ada/ink", "strength": 0.7}, {"ref": "ada/robot", "strength": -0.5}],
    "rank": {"fixed": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reports")


@pytest.fixture(scope="module")
def ada(folder: Path) -> Iterator[Person]:
    """On a hub with the public ada/ink, ada/robot and ada/broken, and the private ada/secret."""
    tokens = make_data(folder)
    with running_hub(folder) as hub:
        person = Person(hub, tokens["ada"])
        for seed, name in enumerate(("ink", "robot", "secret")):
            write_lora(folder / name / f"{name}.safetensors", seed, rank=seed + 2)
            person.upload(folder / name, f"ada/{name}", private=name == "secret")
        write_lora(folder / "broken" / "broken.safetensors", 3)
        tensors = safetensors.numpy.load_file(folder / "broken" / "broken.safetensors")
        next(iter(tensors.values())).fill(np.nan)
        write_file(folder / "broken" / "broken.safetensors", tensors, {})
        person.upload(folder / "broken", "ada/broken")
        yield person


def ask(hub: RunningHub, recipe: Any, **headers: str) -> httpx2.Response:
    body = {"recipe": recipe}
    return httpx2.post(f"{hub.url}/api/reports", json=body, headers=headers, timeout=WAIT_S)


def test_anybody_gets_the_report_of_public_adapters(ada: Person, folder: Path) -> None:
    answer = ask(ada.hub, BOTH)
    assert answer.status_code == 200, answer.text
    report = answer.json()
    files = {f"ada/{name}": folder / name / f"{name}.safetensors" for name in ("ink", "robot")}
    expected = json.loads(json.dumps(measure(Recipe.parse(BOTH), files).to_json()))
    for field in ("total", "components", "blocks", "ranks", "leaks", "modules"):
        assert report[field] == expected[field]
    assert [one["strength"] for one in report["inputs"]] == [0.7, -0.5]
    job = ada.post(
        "/api/merges", {"recipe": BOTH, "publish": {"repo": "ada/x", "path": "x.safetensors"}}
    )
    assert report["recipe_digest"] == job.json()["recipe_digest"]
    assert ask(ada.hub, BOTH).content == answer.content


def test_nothing_is_written(ada: Person) -> None:
    before = ada.get("/api/jobs").json()
    recipe = BOTH | {"rank": {"fixed": 1}}
    assert ask(ada.hub, recipe).status_code == 200
    assert ada.get("/api/jobs").json() == before
    digest = ask(ada.hub, recipe).json()["recipe_digest"]
    assert ada.get(f"/api/recipes/{digest}").status_code == 404


def test_a_private_adapter_is_measured_for_those_who_may_read_it(ada: Person) -> None:
    secret = {"kind": "merge", "inputs": [{"ref": "ada/secret"}]}
    absent = {"kind": "merge", "inputs": [{"ref": "ada/absent"}]}
    assert ask(ada.hub, secret, **ada.auth).status_code == 200
    refused, missing = ask(ada.hub, secret), ask(ada.hub, absent)
    assert (refused.status_code, missing.status_code) == (422, 422)
    assert refused.text.replace("secret", "absent") == missing.text


@pytest.mark.parametrize(
    ("recipe", "code", "param"),
    [
        ({"kind": "merge", "inputs": []}, "BadRecipe", "inputs"),
        ({"kind": "merge", "inputs": [{"ref": "ada/no"}]}, "BadRecipe", "inputs[0].ref"),
        ({"kind": "merge", "inputs": [{"ref": "ada/ink"}] * 33}, "BadRecipe", "inputs"),
        (
            {"kind": "merge", "inputs": [{"ref": "ada/ink", "leave_out": ["*"]}]},
            "BadRecipe",
            "inputs",
        ),
        (
            {
                "kind": "extract",
                "base": {"ref": "ada/ink"},
                "tuned": {"ref": "ada/ink"},
                "rank": {"fixed": 1},
            },
            "BadRecipe",
            "kind",
        ),
        (
            {"kind": "merge", "inputs": [{"ref": "ada/ink", "blocks": {"*.x": 1.0}}]},
            "BadRecipe",
            None,
        ),
    ],
)
def test_what_is_impossible_names_the_field(
    ada: Person, recipe: Any, code: str, param: str | None
) -> None:
    answer = ask(ada.hub, recipe)
    assert answer.status_code == 422, answer.text
    error = answer.json()["error"]
    assert error["code"] == code
    assert param is None or error["param"] == param


def test_what_only_the_tensors_tell_is_the_engines_own_refusal(ada: Person) -> None:
    answer = ask(ada.hub, {"kind": "merge", "inputs": [{"ref": "ada/broken"}]})
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["code"] == "NotFinite"
    assert ask(ada.hub, BOTH).status_code == 200


def test_the_web_process_never_loads_torch(ada: Person) -> None:
    assert ask(ada.hub, BOTH).status_code == 200
    assert "libtorch" not in Path(f"/proc/{ada.hub.process.pid}/maps").read_text()


# The pool, with processes that go wrong


class Submits:
    """The first call makes a pool of one process that goes wrong as it says; all queue in it."""

    def __init__(self, hub: Hub, recipe: Recipe, resolved: Sequence[Resolved]) -> None:
        self._hub, self._wanted = hub, (recipe, resolved)
        self._pool: Pool | None = None

    def __call__(self, how: str, **bounds: Any) -> Task:
        if self._pool is None:
            command = [sys.executable, str(ODD), how]
            self._pool = Pool(self._hub, Bounds(workers=1, **bounds), command)
        return self._pool.submit(*self._wanted)

    def stop(self) -> None:
        if self._pool is not None:
            self._pool.stop()


@pytest.fixture
def submit(hub: Hub, admin: Viewer, tmp_path: Path) -> Iterator[Submits]:
    write_lora(tmp_path / "ink.safetensors", 0)
    publish_files(
        hub, admin, "admin/ink", {"ink.safetensors": (tmp_path / "ink.safetensors").read_bytes()}
    )
    recipe = Recipe.parse({"kind": "merge", "inputs": [{"ref": "admin/ink"}]})
    with hub.db.read() as session:
        resolved = resolve(session, hub.store, admin, recipe)
    recipe = pin(recipe, resolved)
    submits = Submits(hub, recipe, resolved)
    yield submits
    submits.stop()


def pid_of(task: Task) -> int:
    return int(task.future.result(WAIT_S)["report"]["pid"])


def is_gone(process: int) -> bool:
    end = time.monotonic() + WAIT_S
    while Path(f"/proc/{process}").exists() and time.monotonic() < end:
        time.sleep(0.01)
    return not Path(f"/proc/{process}").exists()


def test_one_process_makes_many_reports_and_ends_when_nobody_asks(
    submit: Submits, hub: Hub
) -> None:
    first = pid_of(submit("answers", idle_s=0.5))
    assert pid_of(submit("answers")) == first
    assert is_gone(first)
    assert pid_of(submit("answers")) != first


def test_a_process_is_replaced_after_its_share_of_reports(submit: Submits) -> None:
    pids = [pid_of(submit("answers", reports=2)) for _ in range(3)]
    assert pids[0] == pids[1] != pids[2]


def test_a_process_that_dies_is_replaced(submit: Submits) -> None:
    first = pid_of(submit("dies later"))
    with pytest.raises(ReportFailed, match="no more reports"):
        pid_of(submit("dies later"))
    assert pid_of(submit("dies later")) != first


def test_a_report_that_takes_too_long_is_ended(submit: Submits) -> None:
    first = pid_of(submit("hangs later", limit_s=1.0))
    with pytest.raises(TooLarge, match="more than the 1 seconds"):
        pid_of(submit("hangs later"))
    assert is_gone(first)


def test_whoever_goes_away_takes_the_process_along(submit: Submits) -> None:
    first = pid_of(submit("hangs later"))
    task = submit("hangs later")
    task.gone.set()
    with pytest.raises(Busy):
        pid_of(task)
    assert is_gone(first)


def test_a_short_queue_and_then_a_refusal(submit: Submits) -> None:
    tasks = [submit("hangs", waiting=1), submit("hangs")]
    with pytest.raises(Busy, match="try again"):
        submit("hangs")
    tasks[1].future.cancel()
    tasks.append(submit("hangs"))
    for task in tasks:
        task.gone.set()


def test_the_end_of_the_pool_is_the_end_of_its_processes(submit: Submits, hub: Hub) -> None:
    first = pid_of(submit("hangs later"))
    task = submit("hangs later")
    submit.stop()
    assert is_gone(first)
    with pytest.raises(Busy):
        pid_of(task)
    assert not list(hub.scratch.glob("report-*"))


def test_a_busy_hub_says_when_to_come_back(hub: Hub, admin: Viewer, tmp_path: Path) -> None:
    write_lora(tmp_path / "ink.safetensors", 0)
    publish_files(
        hub, admin, "admin/ink", {"ink.safetensors": (tmp_path / "ink.safetensors").read_bytes()}
    )
    app = create_app(hub.settings, hub=hub)
    body = {"recipe": {"kind": "merge", "inputs": [{"ref": "admin/ink"}]}}
    with TestClient(app, base_url="http://127.0.0.1:8470") as client:
        app.state.reports.pool = Pool(
            hub, Bounds(workers=1, waiting=0), [sys.executable, str(ODD), "hangs"]
        )
        with ThreadPoolExecutor(2) as callers:
            asked = [callers.submit(client.post, "/api/reports", json=body) for _ in range(2)]
            # Whoever comes second is answered; the other one waits for a child that never answers.
            answer = next(as_completed(asked)).result()
            app.state.stopping.set()
    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "2"
    assert answer.json()["error"]["code"] == "Busy"
    assert not list(hub.scratch.glob("report-*"))


def test_a_caller_who_hangs_up_is_not_worked_for(ada: Person, folder: Path) -> None:
    """Two callers with no patience do not stop the one who waits."""
    recipe = BOTH | {"rank": {"energy": 0.5}}
    for _ in range(2):
        with pytest.raises(httpx2.TimeoutException):
            httpx2.post(f"{ada.hub.url}/api/reports", json={"recipe": recipe}, timeout=0.02)
    assert ask(ada.hub, recipe).status_code == 200


def test_a_reading_token_is_enough(hub: Hub, admin: Viewer, client: TestClient) -> None:
    """Nothing is written: what is refused is the recipe, not the caller."""
    _, secret = make_user(hub, "eve")
    body = {"recipe": {"kind": "merge", "inputs": [{"ref": "admin/no"}]}}
    assert client.post("/api/reports", json=body, headers=bearer(secret)).status_code == 422
    assert client.post("/api/reports", json=body).status_code == 422
