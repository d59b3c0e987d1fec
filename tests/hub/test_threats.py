"""Attacks of docs/security.md that no other test makes, through the routes of a hub."""

import ast
import io
import itertools
import json
import os
import pickle
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi.routing import iter_route_contexts
from PIL import Image
from starlette.testclient import TestClient

from hub.adapters.pictures import BadPicture, make_thumbnail, read_facts
from hub.app import create_app
from hub.context import Hub
from hub.jobs.inputs import MAX_INPUTS
from hub.settings import Settings
from hub.users.models import Scope
from hub.users.service import Viewer
from merge.errors import BadFile
from merge.formats.reader import TensorFile
from tests.fixtures.catalogue import lora_bytes, picture, publish_files
from tests.fixtures.malformed import entry, frame
from tests.hub.conftest import bearer, both_databases, make_user

ROOT = Path(__file__).parents[2]
SECURITY = ROOT / "docs" / "security.md"


# The document


def rows() -> dict[str, str]:
    """Row id -> its last column: the tests, or why there is none."""
    found = re.findall(r"^\| ([A-Z]\d+b?) \|.*\| (.*) \|$", SECURITY.read_text(), re.MULTILINE)
    return dict(found)


def names_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_attack_has_its_row() -> None:
    wanted = {f"{letter}{n}" for letter, last in LAST.items() for n in range(1, last + 1)}
    assert set(rows()) == wanted | {"A18b"}


LAST = {"S": 40, "F": 16, "N": 13, "H": 19, "A": 19, "R": 15}


@pytest.mark.parametrize("row", sorted(rows()))
def test_a_row_names_tests_that_exist_or_says_why_there_is_none(row: str) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", rows()[row])
    if not named:
        assert rows()[row].startswith(("Nothing to attack:", "Not defended:", "For the proxy:"))
    for file, test in named:
        assert test in names_in(ROOT / file), f"{row}: {file} has no {test}"


# Files


def test_s39_a_file_that_shrinks_while_it_is_read_is_an_error_and_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(frame({"a": entry("U8", (100_000,), (0, 100_000))}, bytes(100_000)))
    with TensorFile(path) as file:
        os.truncate(path, 200)
        with pytest.raises(BadFile, match="shorter"):
            file.read("a")


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return open, (str(self.marker), "w")


def test_f1_a_pickle_is_stored_and_never_loaded(
    hub: Hub, admin: Viewer, client: TestClient, tmp_path: Path
) -> None:
    marker = tmp_path / "executed"
    bomb = pickle.dumps(Bomb(marker))
    names = ["a.pt", "a.bin", "a.ckpt", "a.safetensors", "training_args.bin"]
    publish_files(hub, admin, "admin/bomb", dict.fromkeys(names, bomb))
    assert client.get("/admin/bomb").status_code == 200
    assert client.get("/admin/bomb/blob/main/a.pt").status_code == 200
    assert client.get("/admin/bomb/resolve/main/a.pt").content == bomb
    assert not marker.exists()
    pickle.loads(bomb).close()  # it would have worked
    assert marker.exists()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    crc = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def huge_text() -> bytes:
    """A PNG whose compressed text of 2 kB unpacks to 200 MB."""
    plain = picture()
    text = png_chunk(b"zTXt", b"parameters\0\0" + zlib.compress(bytes(200_000_000), 9))
    return plain[:33] + text + plain[33:]  # after the signature and IHDR


def huge_profile() -> bytes:
    plain = picture()
    profile = png_chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(200_000_000), 9))
    return plain[:33] + profile + plain[33:]


def many_frames() -> bytes:
    out = io.BytesIO()
    frames = [Image.new("L", (16, 16), n % 256) for n in range(3000)]
    frames[0].save(out, "WEBP", save_all=True, append_images=frames[1:], method=0)
    return out.getvalue()


@pytest.mark.parametrize("make", [huge_text, huge_profile, many_frames])
def test_f6_what_a_picture_carries_beside_its_first_frame_costs_nothing(
    tmp_path: Path, make: Any
) -> None:
    path = tmp_path / "p"
    path.write_bytes(make())
    try:
        facts = read_facts(path)
        thumbnail = make_thumbnail(path, 160)
    except BadPicture:
        return
    assert facts.prompt is None
    with Image.open(io.BytesIO(thumbnail)) as image:
        assert getattr(image, "n_frames", 1) == 1
        assert "icc_profile" not in image.info
    assert len(thumbnail) < 20_000


def test_f7_a_prompt_is_shown_as_text(hub: Hub, admin: Viewer, client: TestClient) -> None:
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>\nSteps: 20"
    files = {"a.safetensors": b"x", "p.png": picture(parameters=evil)}
    publish_files(hub, admin, "admin/p", files)
    page = client.get("/admin/p").text
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


SSTI = "{{7*191}} ${7*191} #{7*191} {%print(7*191)%} <%= 7*191 %> {{config}}"


def test_f12_f13_nothing_of_a_configuration_is_executed_or_rendered(
    hub: Hub, admin: Viewer, client: TestClient, tmp_path: Path
) -> None:
    marker = tmp_path / "executed"
    code = f"open({str(marker)!r}, 'w')".encode()
    config = {
        "peft_type": "LORA",
        "auto_mapping": {"base_model_class": "Evil", "parent_library": "modeling_evil"},
        "auto_map": {"AutoModel": "modeling_evil.Evil"},
        "base_model_name_or_path": SSTI,
    }
    files = {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": lora_bytes(tmp_path, metadata={"ss_output_name": SSTI}),
        "modeling_evil.py": code,
        "tokenizer_config.json": json.dumps({"chat_template": SSTI}).encode(),
        "README.md": f"---\ntags: ['{{{{7*191}}}}']\n---\n# {SSTI}\n\n{SSTI}\n".encode(),
    }
    publish_files(hub, admin, "admin/evil", files)
    for path in ("/admin/evil", "/admin/evil/tree/main", "/admin/evil/blob/main/README.md", "/"):
        page = client.get(path)
        assert page.status_code == 200, path
        assert "1337" not in page.text
    assert "{{7*191}}" in client.get("/admin/evil").text
    assert not marker.exists()


# What one may not see


def addresses_of_a_repo() -> Iterator[str]:
    """Of every route that reads something of a repo, with `{full}` for its name."""
    samples = {"revision": "main", "path": "README.md", "place": "main/README.md", "num": "1"}
    samples |= {"file": "a.safetensors", "oid": "0" * 64, "kind": "models", "base": "main"}
    samples |= {"compare": "main..main"}
    for route in iter_route_contexts(create_app(Settings()).routes):
        path = route.path or ""
        if "GET" not in (route.methods or ()) or "{namespace}/{name}" not in path:
            continue
        path = path.replace("{namespace}/{name}", "{full}")
        yield re.sub(r"\{(?!full\})(\w+)[^}]*\}", lambda m: samples.get(m[1], "x"), path)


def test_a2_a3_a_private_repo_answers_others_like_one_that_is_not_there(
    hub: Hub, admin: Viewer, client: TestClient
) -> None:
    files = {"README.md": b"# a\n", "a.safetensors": b"x"}
    publish_files(hub, admin, "admin/here", files, private=True)
    publish_files(hub, admin, "admin/here", files, private=True, type="dataset")
    _, token = make_user(hub, "ada", Scope.ADMIN)
    addresses = sorted(set(addresses_of_a_repo()))
    assert len(addresses) > 20
    for address, headers in itertools.product(addresses, ({}, bearer(token))):
        here = client.get(address.replace("{full}", "admin/here"), headers=headers)
        gone = client.get(address.replace("{full}", "admin/gone"), headers=headers)
        assert here.status_code == gone.status_code, address
        assert here.text.replace("admin/here", "admin/gone") == gone.text, address
        assert without_ids(here.headers) == without_ids(gone.headers), address


def without_ids(headers: httpx2.Headers) -> dict[str, str]:
    return {
        name: value.replace("admin/here", "admin/gone")
        for name, value in headers.items()
        if name not in ("x-request-id", "ratelimit", "ratelimit-policy")
    }


# Requests


def json_routes() -> Iterator[tuple[str, str]]:
    samples = {"kind": "models", "namespace": "admin", "name": "ink", "revision": "main"}
    for route in iter_route_contexts(create_app(Settings()).routes):
        for method in sorted((route.methods or set()) & {"POST", "PUT", "PATCH", "DELETE"}):
            path = re.sub(r"\{(\w+)[^}]*\}", lambda m: samples.get(m[1], "x"), route.path or "")
            yield method, path


BOMBS = [
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"name": ' + b"9" * 100_000 + b"}",
    b'{"name": 1e999999}',
    b'{"name": "\\ud800"}',
    b'{"name": NaN, "name": -Infinity}',
    b"\xff\xfe{\0}\0",
    b"null",
    b'"' + b"a" * 500_000 + b'"',
]


def test_h18_no_json_is_too_deep_or_too_large_to_be_refused(
    hub: Hub, admin: Viewer, client: TestClient
) -> None:
    publish_files(hub, admin, "admin/ink", {"README.md": b"# ink\n"})
    headers = {"Content-Type": "application/json"} | bearer(hub.admin_token)
    for method, path in sorted(set(json_routes())):
        for bomb in BOMBS:
            answer = client.request(method, path, content=bomb, headers=headers)
            assert answer.status_code != 500, (method, path, bomb[:40])


@both_databases
def test_h18_what_a_database_cannot_keep_is_no_error(hub: Hub, client: TestClient) -> None:
    requests: list[tuple[str, str, Any]] = [
        ("DELETE", "/api/tokens/" + "9" * 12, None),
        ("DELETE", "/api/tokens/" + "9" * 30, None),
        ("POST", "/api/users", {"name": "ada", "full_name": "x\0y"}),
        ("POST", "/api/tokens", {"name": "a\0b", "scope": "read"}),
        ("POST", "/api/tokens", {"name": "\ud800", "scope": "read"}),
    ]
    headers = {"Content-Type": "application/json"} | bearer(hub.admin_token)
    for method, path, body in requests:
        content = json.dumps(body) if body is not None else None
        answer = client.request(method, path, content=content, headers=headers)
        assert answer.status_code < 500


def test_h8_ten_thousand_ranges_are_the_whole_file(
    hub: Hub, admin: Viewer, client: TestClient
) -> None:
    publish_files(hub, admin, "admin/ink", {"a.bin": b"0123456789"})
    ranges = "bytes=" + ",".join(f"{n}-{n}" for n in range(10_000))
    answer = client.get("/admin/ink/resolve/main/a.bin", headers={"Range": ranges})
    assert (answer.status_code, answer.content) == (200, b"0123456789")


@pytest.mark.parametrize("path", ["/login", "/settings/theme"])
def test_h9_a_form_with_a_huge_preamble_is_a_413(client: TestClient, path: str) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=b"}

    def body() -> Iterator[bytes]:
        for _ in range(100):
            yield b"x" * 2**20

    answer = client.post(path, content=body(), headers=headers)
    assert answer.status_code in (403, 413)


@pytest.mark.parametrize("path", ["/", "/api/adapters", "/api/models", "/admin/a/resolve/main/b"])
def test_h16_no_other_site_is_allowed_to_read_answers(client: TestClient, path: str) -> None:
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "GET"}
    for answer in (client.options(path, headers=headers), client.get(path, headers=headers)):
        assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_r14_lists_go_on_by_cursor_and_know_no_offset() -> None:
    for path, operations in create_app(Settings()).openapi()["paths"].items():
        for operation in operations.values():
            names = {p["name"] for p in operation.get("parameters", ())}
            assert not names & {"offset", "page", "skip", "p"}, path


BIG = frame({"lora_unet_x.lora_up.weight": entry("F16", (2**31, 1), (0, 2**32))})


def test_r1_a_recipe_has_a_largest_number_of_inputs(
    hub: Hub, admin: Viewer, client: TestClient, tmp_path: Path
) -> None:
    publish_files(hub, admin, "admin/ink", {"ink.safetensors": lora_bytes(tmp_path, rank=4)})

    def ask(address: str, n: int) -> httpx2.Response:
        inputs = [{"ref": "admin/ink", "strength": 1 + i / n} for i in range(n)]
        recipe = {"kind": "merge", "inputs": inputs}
        body: dict[str, Any] = {"recipe": recipe}
        if address == "/api/merges":
            body["publish"] = {"repo": "admin/out", "path": "x.safetensors"}
        return client.post(address, json=body, headers=bearer(hub.admin_token))

    for address in ("/api/merges", "/api/reports"):
        answer = ask(address, MAX_INPUTS + 1)
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, "inputs")
    assert ask("/api/merges", MAX_INPUTS).status_code == 202


def test_r2_a_header_that_promises_more_than_the_file_is_no_adapter(
    hub: Hub, admin: Viewer, client: TestClient
) -> None:
    publish_files(hub, admin, "admin/big", {"big.safetensors": BIG})
    recipe = {"kind": "merge", "inputs": [{"ref": "admin/big", "strength": 1.0}]}
    body = {"recipe": recipe, "publish": {"repo": "admin/out", "path": "x.safetensors"}}
    answer = client.post("/api/merges", json=body, headers=bearer(hub.admin_token))
    assert answer.status_code == 422
    assert "st_truncated" in answer.text
