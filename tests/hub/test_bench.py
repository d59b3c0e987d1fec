"""The bench as a browser without script gets it: forms, addresses, refusals, and the job it starts."""

from html import unescape
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pytest
from sqlmodel import select
from starlette.testclient import TestClient

from hub.context import Hub
from hub.jobs.models import Job
from hub.users.service import Viewer
from merge.recipe import Recipe
from tests.fixtures.catalogue import lora_bytes, publish_files
from tests.hub.conftest import bearer, make_user

HTML = {"Accept": "text/html,*/*"}
BOTH = "/bench?add=admin/ink=0.7&add=admin/robot:robot.safetensors=-0.5"


@pytest.fixture(autouse=True)
def adapters(hub: Hub, admin: Viewer, tmp_path: Path) -> None:
    for seed, name in enumerate(("ink", "robot")):
        content = lora_bytes(tmp_path, seed=seed, rank=4)
        files = {f"{name}.safetensors": content, "README.md": f"# The {name}\n".encode()}
        publish_files(hub, admin, f"admin/{name}", files)
    publish_files(hub, admin, "admin/own", {"own.safetensors": content}, private=True)


def visit(client: TestClient, path: str, token: str | None = None) -> str:
    answer = client.get(path, headers=HTML | (bearer(token) if token else {}))
    assert answer.status_code == 200, answer.text
    return unescape(answer.text)


def test_an_empty_bench_says_what_to_do(client: TestClient) -> None:
    text = visit(client, "/bench")
    assert "Nothing on the bench yet" in text
    assert 'value="admin/ink:ink.safetensors"' in text
    assert "admin/own" not in text


def test_an_address_shows_the_bench_to_anybody(client: TestClient) -> None:
    text = visit(client, BOTH + "&method=ties&with.density=0.4&rank=shared:8")
    for words in ("The ink", "The robot", 'value="0.7"', 'value="-0.5"', 'value="0.4"'):
        assert words in text
    assert '<option value="ties" selected>' in text
    assert "Sign in to merge" in text
    assert 'formaction="/bench/merge"' not in text


def test_without_script_the_report_comes_with_the_page(client: TestClient) -> None:
    text = visit(client, BOTH + "&report=1")
    assert "Energy by block" in text
    assert "unet mid_block" in text
    assert "How alike they are" in text
    assert '/bench?add=admin/ink=0.7&add=admin/robot:robot.safetensors=-0.5&rank=fixed:2"' in text


def test_the_report_alone_brings_its_address_and_what_people_copy(client: TestClient) -> None:
    answer = client.get(BOTH.replace("/bench", "/bench/report") + "&rank=energy:0.9")
    assert answer.status_code == 200
    assert answer.headers["HX-Replace-Url"] == BOTH + "&rank=energy:0.9"
    assert "<lora:ink:0.7> <lora:robot:-0.5>" in unescape(answer.text)
    assert 'hx-swap-oob="true"' in answer.text
    assert "energy: 0.9" in answer.text


def test_a_refused_report_says_why_in_its_place(client: TestClient) -> None:
    for path, words in (
        ("/bench/report?add=admin/no=1", "admin/no: Repository not found"),
        ("/bench/report?add=admin/own=1", "admin/own: Repository not found"),
        ("/bench/report?add=admin/ink=much", "admin/ink, strength: Input should be"),
        ("/bench/report?add=admin/ink=1&rank=fixed:0", "Rank: Input should be"),
        ("/bench/report?add=admin/ink=1&method=svc&with.floor=7", "Floor: Input should be"),
        ("/bench/report?add=admin/ink=1&base=admin/no", "Base: Repository not found"),
        ("/bench/report?add=admin/ink=1&add=admin/robot=-1&method=slerp", "slerp"),
    ):
        text = visit(client, path)
        assert "Energy by block" not in text
        assert words in text


def test_a_private_adapter_is_shown_to_those_who_may_read_it(client: TestClient, hub: Hub) -> None:
    assert "not in the catalogue" in visit(client, "/bench?add=admin/own=1")
    assert "not in the catalogue" not in visit(client, "/bench?add=admin/own=1", hub.admin_token)


def test_what_a_form_sends_becomes_an_address(client: TestClient) -> None:
    sent = "ref=admin/ink&strength=0.7&text=&ref=admin/robot:robot.safetensors&strength=-0.5"
    answer = client.get(f"/bench?{sent}&text=&method=linear&rank=exact&add=&base=&repo=&path=")
    assert (answer.status_code, answer.headers["Location"]) == (303, BOTH)
    more = client.get(f"/bench?{sent}&add=admin/own&method=linear&rank=fixed&amount=8&drop=0")
    assert more.headers["Location"] == (
        "/bench?add=admin/robot:robot.safetensors=-0.5&add=admin/own=1&rank=fixed:8"
    )


def test_the_bench_is_remembered_until_it_is_cleared(client: TestClient) -> None:
    first = client.get("/bench/add?ref=admin/ink:ink.safetensors")
    assert first.headers["Location"] == "/bench?add=admin/ink:ink.safetensors=1"
    quiet = client.get("/bench/add?ref=admin/robot", headers={"HX-Request": "true"})
    assert (quiet.status_code, quiet.text) == (204, "")
    assert quiet.headers["HX-Trigger"] == '{"said": "On the bench with 1 more"}'
    both = "/bench?add=admin/ink:ink.safetensors=1&add=admin/robot=1"
    assert client.get("/bench").headers["Location"] == both
    assert "Nothing on the bench yet" in visit(client, "/bench?clear=1")
    assert "Nothing on the bench yet" in visit(client, "/bench")


def test_the_field_for_one_more_offers_what_fits(client: TestClient) -> None:
    offered = visit(client, "/bench/adapters?add=rob&family=tiny-sd")
    assert "admin/robot:robot.safetensors" in offered
    assert "admin/ink" not in offered
    assert visit(client, "/bench/adapters?add=rob&family=sdxl").strip() == ""


def test_merge_starts_the_job_that_the_bench_describes(client: TestClient, hub: Hub) -> None:
    form = dict(parse_qsl("method=linear&rank=fixed&amount=3&rank_was=fixed&dialect=diffusers"))
    rows = {"ref": ["admin/ink", "admin/robot"], "strength": ["0.7", "-0.5"], "text": ["", ""]}
    answer = client.post("/bench/merge", data=form | rows, headers=HTML | bearer(hub.admin_token))
    assert answer.status_code == 303, answer.text
    with hub.db.read() as session:
        job = session.get_one(Job, urlsplit(answer.headers["Location"]).path.rpartition("/")[2])
    recipe = Recipe.load(job.request["recipe"])
    assert [(one.ref, one.strength) for one in recipe.inputs] == [
        ("admin/ink", 0.7),
        ("admin/robot", -0.5),
    ]
    assert (recipe.rank.fixed, recipe.output.dialect) == (3, "diffusers")
    publish = job.request["publish"]
    assert (publish["repo"], publish["path"]) == ("admin/ink-robot", "ink-robot.safetensors")


def test_a_refused_merge_leaves_the_bench_as_it_was(client: TestClient, hub: Hub) -> None:
    form = {"ref": ["admin/ink"], "strength": ["0.7"], "repo": "nobody/x", "method": "linear"}
    answer = client.post("/bench/merge", data=form, headers=HTML | bearer(hub.admin_token))
    assert answer.status_code == 422
    assert 'role="alert"' in answer.text
    assert "there is no user or organisation 'nobody': take admin/…" in unescape(answer.text)
    assert 'value="nobody/x"' in answer.text
    assert 'value="0.7"' in answer.text


def test_merging_takes_the_right_to_write(client: TestClient, hub: Hub) -> None:
    form = {"ref": ["admin/ink"], "strength": ["1"], "repo": "admin/x"}
    assert client.post("/bench/merge", data=form, headers=HTML).status_code == 401
    _, token = make_user(hub, "eve")
    refused = client.post("/bench/merge", data=form, headers=HTML | bearer(token))
    assert refused.status_code == 403
    assert "eve may not write to admin" in refused.text
    assert 'value="admin/x"' in refused.text
    with hub.db.read() as session:
        assert session.exec(select(Job)).all() == []
