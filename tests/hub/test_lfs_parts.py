"""Large LFS objects in parts: unmodified clients through real sockets, and what the ledger refuses."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from sqlmodel import select
from starlette.testclient import TestClient

from hub.blobs.store import Sha256
from hub.context import Hub
from hub.db import now
from hub.repos import holds
from hub.repos import service as repos
from hub.repos.models import Blob, Hold
from hub.repos.uploads import Upload, UploadPart
from hub.upkeep.sweep import sweep
from hub.users import service as users
from hub.users.service import Viewer
from tests.fixtures.s3 import serve_s3
from tests.fixtures.server import RunningHub, running_hub
from tests.hub.conftest import bearer, both_databases, make_user

KiB = 2**10
PART_BYTES = 256 * KiB
CONTENT = os.urandom(4 * PART_BYTES + 99)
OID = hashlib.sha256(CONTENT).hexdigest()
SMALL = {"max_regular_bytes": KiB, "lfs_part_bytes": PART_BYTES, "min_free_bytes": 0}
PART_ROUTE = "/{namespace}/{name}.git/info/lfs/objects/{oid}/parts/{number}"


# Real clients, real sockets


def http(method: str, address: str, **options: Any) -> httpx2.Response:
    return httpx2.request(method, address, timeout=60, **options)


THROUGH_US = pytest.param("S3", marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=["files", THROUGH_US, "S3 that clients reach"])
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningHub]:
    folder = tmp_path_factory.mktemp("hub")
    if request.param == "files":
        with running_hub(folder, **SMALL) as hub:
            yield hub
        return
    with (
        serve_s3(tmp_path_factory.mktemp("s3")) as server,
        pytest.MonkeyPatch.context() as environment,
    ):
        server.make_bucket("bucket")
        server.use(environment)
        settings: dict[str, Any] = {**SMALL, "s3_bucket": "bucket"}
        if request.param != "S3":
            settings["s3_public_endpoint"] = server.endpoint
        with running_hub(folder, **settings) as hub:
            yield hub


_CLIENT = """
import sys
from pathlib import Path
from huggingface_hub import HfApi, constants
assert constants.HF_HUB_DISABLE_XET
api = HfApi()
api.create_repo("admin/large", exist_ok=True)
api.upload_folder(repo_id="admin/large", folder_path=sys.argv[1])
for file in Path(sys.argv[1]).iterdir():
    got = api.hf_hub_download("admin/large", file.name)
    assert Path(got).read_bytes() == file.read_bytes(), file.name
"""


def test_huggingface_hub_sends_a_large_file_in_parts(running: RunningHub, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "large.safetensors").write_bytes(CONTENT)
    (folder / "small.safetensors").write_bytes(CONTENT[: 2 * KiB])
    (folder / "config.json").write_text("{}")
    environment = os.environ | {"HF_ENDPOINT": running.url, "HF_TOKEN": running.admin_token}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _CLIENT, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert_download(running)
    assert parts_through(running) == (0 if is_direct(running) else 6)


def assert_download(hub: RunningHub) -> None:
    """Whole and in part; rclone's own answers to ranges would not do."""
    address = f"{hub.url}/admin/large/resolve/main/large.safetensors"
    head = http("HEAD", address)
    assert (head.status_code, head.headers["Content-Length"]) == (200, str(len(CONTENT)))
    whole = http("GET", address)
    assert whole.content == CONTENT
    assert whole.headers["X-Linked-ETag"] == head.headers["ETag"] == f'"{OID}"'
    part = http("GET", address, headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, CONTENT[10:20])
    assert http("GET", f"{hub.url}/admin/large.git/info/lfs/objects/{OID}").content == CONTENT


def is_direct(hub: RunningHub) -> bool:
    return urlsplit(first_part(ask(hub, OID[::-1]))).netloc != urlsplit(hub.url).netloc


def parts_through(hub: RunningHub) -> int:
    """How many parts the hub itself has taken."""
    lines = http("GET", f"{hub.url}/metrics", headers=hub.auth).text.splitlines()
    return sum(
        int(line.split()[-1])
        for line in lines
        if f'graft_requests_total{{route="{PART_ROUTE}",method="PUT",status="200"}}' in line
    )


def ask(hub: RunningHub, oid: str = OID, size: int = len(CONTENT)) -> dict[str, Any]:
    http("POST", f"{hub.url}/api/repos/create", json={"name": "large"}, headers=hub.auth)
    body = {"operation": "upload", "transfers": ["basic", "multipart"]}
    answer = http(
        "POST",
        f"{hub.url}/admin/large.git/info/lfs/objects/batch",
        json={**body, "objects": [{"oid": oid, "size": size}]},
        headers=hub.auth,
    )
    assert answer.json()["transfer"] == "multipart"
    found: dict[str, Any] = answer.json()["objects"][0]["actions"]
    return found


def first_part(actions: dict[str, Any]) -> str:
    return str(actions["upload"]["header"]["00001"])


def test_git_lfs_sends_a_large_file_through_huggingface_hubs_agent(
    running: RunningHub, tmp_path: Path
) -> None:
    """The agent's side of git-lfs' custom transfer protocol, as git-lfs speaks it."""
    content = CONTENT[::-1]
    oid = hashlib.sha256(content).hexdigest()
    (tmp_path / "file").write_bytes(content)
    actions = ask(running, oid, len(content))
    action = {**actions["upload"]}
    messages = [
        {"event": "init", "operation": "upload", "remote": "origin"},
        {
            "event": "upload",
            "oid": oid,
            "size": len(content),
            "path": str(tmp_path / "file"),
            "action": action,
        },
        {"event": "terminate"},
    ]
    done = subprocess.run(
        [str(Path(sys.executable).with_name("hf")), "lfs-multipart-upload"],
        input="".join(json.dumps(message) + "\n" for message in messages),
        env=os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": running.url},
        capture_output=True,
        text=True,
        check=False,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [a for a in answers if a.get("error")] == [], done.stderr
    assert {"event": "complete", "oid": oid} in answers
    body = {"oid": oid, "size": len(content)}
    verified = http("POST", actions["verify"]["href"], json=body, headers=running.auth)
    assert verified.status_code == 200


def test_a_part_that_is_too_long_is_refused_wherever_it_goes(running: RunningHub) -> None:
    actions = ask(running, "ab" * 32)
    try:
        sent = http("PUT", first_part(actions), content=bytes(PART_BYTES + 1))
    except httpx2.TransportError:
        pass  # The answer came before the bytes, and the end of the connection before the answer.
    else:
        assert sent.status_code in (400, 403)
    sent = http("PUT", first_part(actions), content=bytes(PART_BYTES))
    assert sent.status_code == 200
    assert sent.headers["ETag"]


def test_an_upload_goes_on_after_the_hub_was_killed(tmp_path: Path) -> None:
    with running_hub(tmp_path, **SMALL) as hub:
        first = ask(hub)
        answer = http("PUT", first_part(first), content=CONTENT[:PART_BYTES])
        hub.kill()
    with running_hub(tmp_path, **SMALL) as hub:
        actions = ask(hub)
        here = http("GET", actions["upload"]["href"]).json()
        assert here["parts"] == [{"partNumber": 1, "etag": answer.headers["ETag"]}]
        told = list(here["parts"])
        for number in (2, 3, 4, 5):
            part = CONTENT[(number - 1) * PART_BYTES : number * PART_BYTES]
            sent = http("PUT", actions["upload"]["header"][f"{number:05}"], content=part)
            told.append({"partNumber": number, "etag": sent.headers["ETag"]})
        body = {"oid": OID, "parts": told}
        for _ in range(2):  # as after a lost answer
            assert http("POST", actions["upload"]["href"], json=body).status_code == 200
        body = {"oid": OID, "size": len(CONTENT)}
        verified = http("POST", actions["verify"]["href"], json=body, headers=hub.auth)
        assert verified.status_code == 200


# The ledger


Begin = Callable[..., dict[str, Any]]


@pytest.fixture
def hub(hub: Hub) -> Hub:
    return replace(hub, settings=hub.settings.model_copy(update={"lfs_part_bytes": PART_BYTES}))


@pytest.fixture
def begin(hub: Hub, admin: Viewer, client: TestClient) -> Begin:
    """The batch's answer for an object in `admin/large`."""
    with hub.db.write() as session:
        repos.create_repo(session, admin, "admin", "large", exist_ok=True)

    def begin(token: str | None = hub.admin_token, **changes: Any) -> dict[str, Any]:
        body = {"operation": "upload", "transfers": ["basic", "multipart"], **changes}
        body.setdefault("objects", [{"oid": OID, "size": len(CONTENT)}])
        path = "/admin/large.git/info/lfs/objects/batch"
        answer: dict[str, Any] = client.post(path, json=body, headers=bearer(token)).json()
        return answer

    return begin


def actions_of(answer: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = answer["objects"][0]["actions"]["upload"]
    return found


def send_all(client: TestClient, action: dict[str, Any], content: bytes = CONTENT) -> Any:
    """The parts' entries of the request that finishes."""
    told = []
    for number in range(1, len(action["header"])):
        part = content[(number - 1) * PART_BYTES : number * PART_BYTES]
        sent = client.put(action["header"][f"{number:05}"], content=part)
        assert sent.status_code == 200, sent.text
        told.append({"partNumber": number, "etag": sent.headers["ETag"]})
    return told


@both_databases
def test_parts_become_an_object_its_sender_may_commit(
    hub: Hub, admin: Viewer, client: TestClient, begin: Begin
) -> None:
    action = actions_of(begin())
    body = {"oid": OID, "parts": send_all(client, action)}
    assert client.post(action["href"], json=body).status_code == 200
    with hub.db.read() as session:
        stored = holds.known(session, admin, Sha256(OID))
        assert stored is not None
        assert stored.size == len(CONTENT)
        assert stored.git_oid is not None
    assert b"".join(hub.store.open(Sha256(OID))) == CONTENT
    assert "actions" not in begin()["objects"][0]


def test_a_client_that_knows_no_parts_gets_none(begin: Begin) -> None:
    answer = begin(transfers=["basic"])
    assert answer["transfer"] == "basic"
    assert "header" not in actions_of(answer)
    assert begin(transfers=["basic", "multipart"])["transfer"] == "multipart"


def test_a_batch_has_one_transfer(begin: Begin) -> None:
    small = {"oid": "0" * 64, "size": 5}
    assert begin(objects=[small])["transfer"] == "basic"
    answer = begin(objects=[small, {"oid": OID, "size": len(CONTENT)}])
    assert answer["transfer"] == "multipart"
    headers = [item["actions"]["upload"]["header"] for item in answer["objects"]]
    assert [len(header) - 1 for header in headers] == [1, 5]


def test_the_same_object_goes_on_for_its_sender_and_begins_anew_for_others(
    hub: Hub, client: TestClient, begin: Begin
) -> None:
    other, token = make_user(hub, "ada")
    first = begin()
    client.put(actions_of(first)["header"]["00001"], content=CONTENT[:PART_BYTES])
    shown = client.get(actions_of(begin())["href"]).json()
    assert [part["partNumber"] for part in shown["parts"]] == [1]
    with hub.db.read() as session:
        assert len(session.exec(select(Upload)).all()) == 1
    with hub.db.write() as session:
        repos.create_repo(session, other, "ada", "large")
    body = {"operation": "upload", "transfers": ["multipart"]}
    answer = client.post(
        "/ada/large.git/info/lfs/objects/batch",
        json={**body, "objects": [{"oid": OID, "size": len(CONTENT)}]},
        headers=bearer(token),
    ).json()
    assert client.get(actions_of(answer)["href"]).json()["parts"] == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda told: told[:-1], "names each of them once"),
        (lambda told: [*told[:-1], told[0]], "names each of them once"),
        (lambda told: [*told[:-1], {"partNumber": 5, "etag": "x"}], "part 5 did not arrive"),
    ],
)
def test_an_upload_without_all_its_parts_is_not_finished(
    client: TestClient, begin: Begin, change: Callable[[Any], Any], reason: str
) -> None:
    action = actions_of(begin())
    told = send_all(client, action)
    answer = client.post(action["href"], json={"oid": OID, "parts": change(told)})
    assert answer.status_code == 422
    assert reason in answer.json()["error"]
    body = {"oid": OID, "parts": told}
    assert client.post(action["href"], json=body).status_code == 200


def test_knowing_a_digest_and_finishing_without_bytes_proves_nothing(
    hub: Hub, client: TestClient, begin: Begin
) -> None:
    hub.store.put([CONTENT])  # another one's, private
    action = actions_of(begin())
    told = [{"partNumber": n, "etag": f'"{n}"'} for n in range(1, 6)]
    answer = client.post(action["href"], json={"oid": OID, "parts": told})
    assert answer.status_code == 422
    with hub.db.read() as session:
        assert session.exec(select(Hold)).all() == []
        # Not all blobs: the hub writes manifests of the repo meanwhile.
        assert session.get(Blob, OID) is None


def test_other_bytes_than_the_digest_says_are_refused_and_forgotten(
    hub: Hub, client: TestClient, begin: Begin
) -> None:
    action = actions_of(begin())
    told = send_all(client, action, CONTENT[::-1])
    answer = client.post(action["href"], json={"oid": OID, "parts": told})
    assert answer.status_code == 422
    assert "send them again" in answer.json()["error"]
    with hub.db.read() as session:
        assert session.exec(select(Upload)).all() == []
        assert session.exec(select(UploadPart)).all() == []
    assert hub.store.size(Sha256(OID)) is None
    assert client.post(action["href"], json={"oid": OID, "parts": told}).status_code == 404


@pytest.mark.parametrize(
    ("number", "content", "status"),
    [
        ("00001", CONTENT[: PART_BYTES - 1], 400),
        ("00001", CONTENT[: PART_BYTES + 1], 400),
        ("00005", CONTENT[:PART_BYTES], 400),
        ("00006", b"", 422),
        ("00000", b"", 422),
    ],
)
def test_a_part_has_the_size_that_follows_from_its_number(
    client: TestClient, begin: Begin, number: str, content: bytes, status: int
) -> None:
    header = actions_of(begin())["header"]
    address = header["00001"].replace("/parts/1?", f"/parts/{int(number)}?")
    assert client.put(address, content=content).status_code == status


def test_a_part_without_a_length_is_counted(client: TestClient, begin: Begin) -> None:
    address = actions_of(begin())["header"]["00001"]
    for content in (CONTENT[: PART_BYTES - 1], CONTENT[: PART_BYTES + 1]):
        sent = client.put(address, content=iter([content]))
        assert sent.status_code == 422
        assert f"{PART_BYTES} bytes of this part arrived" in sent.json()["error"]


def test_an_address_is_good_for_its_own_object_only(client: TestClient, begin: Begin) -> None:
    mine = actions_of(begin())["header"]["00001"]
    assert client.put(mine.replace(OID, "0" * 64), content=b"").status_code == 401
    assert client.put(mine[:-1] + ("A" if mine[-1] != "A" else "B"), content=b"").status_code == 401
    basic = actions_of(begin(transfers=["basic"]))["href"]
    signature = basic.partition("signature=")[2]
    assert client.put(f"{mine.partition('=')[0]}={signature}", content=b"").status_code == 401


def test_a_revoked_token_sends_no_part_more(hub: Hub, client: TestClient, begin: Begin) -> None:
    address = actions_of(begin())["header"]["00001"]
    with hub.db.write() as session:
        viewer = users.viewer_of(session, hub.admin_token or "")
        assert viewer.token_id is not None
        users.revoke_token(session, viewer.require_user(), viewer.token_id)
    assert client.put(address, content=CONTENT[:PART_BYTES]).status_code == 401


def test_what_is_never_finished_is_dropped_with_its_time(
    hub: Hub, client: TestClient, begin: Begin
) -> None:
    action = actions_of(begin())
    told = send_all(client, action)
    folder = hub.settings.data_dir / "store" / "parts"
    assert sweep(hub)["uploads in parts"] == 0
    assert len(list(folder.iterdir())) == 1
    with hub.db.write() as session:
        session.exec(select(Upload)).one().expires_at = now() - timedelta(seconds=1)
    assert client.post(action["href"], json={"oid": OID, "parts": told}).status_code == 404
    assert client.put(action["header"]["00001"], content=b"").status_code == 404
    assert sweep(hub)["uploads in parts"] == 1
    assert list(folder.iterdir()) == []
    with hub.db.read() as session:
        assert session.exec(select(Upload)).all() == []
        assert session.exec(select(UploadPart)).all() == []
