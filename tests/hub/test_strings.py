"""Characters that JSON and YAML can spell and no database keeps: NUL and half a surrogate pair."""

import json
from typing import Any

from starlette.testclient import TestClient

from hub.context import Hub
from hub.users.service import Viewer
from tests.fixtures.catalogue import publish_files
from tests.fixtures.malformed import entry, frame
from tests.hub.conftest import bearer, both_databases

REPO = "/api/models/admin/a"
HOOKS = "/api/settings/webhooks"

# Where a text of a client arrives: "@" is the character.
BODIES: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", "/api/users", {"name": "a", "full_name": "@"}),
    ("POST", "/api/users", {"name": "u@"}),
    ("PATCH", "/api/users/admin", {"full_name": "@"}),
    ("POST", "/api/organizations", {"name": "o", "full_name": "@"}),
    ("POST", "/api/tokens", {"name": "@"}),
    ("POST", "/api/tokens", {"name": "a", "places": ["admin/@"]}),
    ("POST", "/api/merges", {"recipe": {"kind": "@"}, "publish": {"repo": "admin/b"}}),
    ("POST", "/api/merges", {"recipe": {"@": 1}, "publish": {"repo": "admin/b"}}),
    ("POST", "/api/reports", {"recipe": {"kind": "merge", "inputs": [{"ref": "@"}]}}),
    ("POST", "/api/repos/create", {"name": "@"}),
    ("POST", "/api/repos/move", {"fromRepo": "admin/a", "toRepo": "admin/@"}),
    ("POST", f"{REPO}/branch/b", {"startingPoint": "@"}),
    ("POST", f"{REPO}/tag/main", {"tag": "@"}),
    ("POST", f"{REPO}/tag/main", {"tag": "t", "message": "@"}),
    ("POST", f"{REPO}/super-squash/main", {"message": "@"}),
    ("POST", f"{REPO}/revert/main", {"branch": "@"}),
    ("POST", f"{REPO}/duplicate", {"repository": "admin/@"}),
    ("POST", f"{REPO}/discussions", {"title": "@@@"}),
    ("POST", f"{REPO}/discussions", {"title": "about", "description": "@"}),
    ("POST", f"{REPO}/discussions/1/comment", {"comment": "@"}),
    ("POST", f"{REPO}/discussions/1/title", {"title": "@@@"}),
    ("POST", f"{REPO}/discussions/1/status", {"status": "closed", "comment": "@"}),
    ("POST", f"{REPO}/user-access-request/grant", {"user": "@"}),
    ("POST", f"{REPO}/preupload/main", {"files": [{"path": "@", "size": 1}]}),
    ("POST", f"{REPO}/preupload/main", {"files": [], "gitIgnore": "@"}),
    ("POST", f"{REPO}/commit/main", {"key": "header", "value": {"summary": "@"}}),
    ("POST", f"{REPO}/commit/main", {"key": "deletedFile", "value": {"path": "@"}}),
    ("POST", "/api/validate-yaml", {"content": "---\ntitle: @\n---\n"}),
    ("POST", HOOKS, {"url": "https://example.org/@", "watched": []}),
    ("POST", HOOKS, {"url": "https://example.org/", "watched": [], "secret": "@"}),
    ("POST", HOOKS, {"url": "https://example.org/", "watched": [{"type": "user", "name": "@"}]}),
]


@both_databases
def test_a_text_that_no_database_keeps_is_refused_wherever_it_arrives(
    hub: Hub, admin: Viewer, client: TestClient
) -> None:
    publish_files(hub, admin, "admin/a", {"x.txt": b"x"})
    headers = bearer(hub.admin_token) | {"Content-Type": "application/json"}
    about = client.post(f"{REPO}/discussions", json={"title": "about"}, headers=headers)
    assert about.status_code == 200
    for method, address, body in BODIES:
        for spelled in ("\\u0000", "\\ud800"):
            text = json.dumps(body).replace("@", spelled)
            answer = client.request(method, address, content=text, headers=headers)
            assert answer.status_code in (400, 404, 422), (address, text, answer.text)


def test_a_card_that_json_cannot_say_again_is_refused_before_an_upload_and_told_after(
    hub: Hub, admin: Viewer, client: TestClient
) -> None:
    for matter, why in (
        ('license: "\\ud800"', "line 2: a text holds half of a surrogate pair"),
        ("seed: 0x" + "f" * 4000, "line 2: a number has more than 1024 bits"),
    ):
        card = f"---\n{matter}\n---\n"
        answer = client.post("/api/validate-yaml", json={"content": card})
        assert answer.status_code == 400
        assert answer.json()["errors"] == [{"message": f"Invalid YAML front matter: {why}"}]
        publish_files(hub, admin, "admin/b", {"README.md": card.encode()})
        assert "cardData" not in client.get("/api/models/admin/b").json()
        assert client.get("/api/models?full=true").status_code == 200
        assert why in client.get("/admin/b").text


@both_databases
def test_odd_metadata_of_a_file_is_shown_or_told(
    hub: Hub, admin: Viewer, client: TestClient
) -> None:
    def file(text: str) -> bytes:
        about = {"modelspec.title": text, "modelspec.usage_hint": text, "ss_output_name": text}
        return frame({"__metadata__": about, "a": entry()}, bytes(16))

    files = {"zero.safetensors": file("ink\0"), "half.safetensors": file("\ud800")}
    publish_files(hub, admin, "admin/a", files)
    zero = client.get("/api/adapters/admin/a/zero.safetensors").json()
    assert zero["title"] == "ink\N{REPLACEMENT CHARACTER}"
    half = client.get("/api/adapters/admin/a/half.safetensors").json()
    assert "holds half of a surrogate pair" in half["problem"]
    assert len(client.get("/api/adapters?q=ink").json()["items"]) == 1
    assert client.get("/admin/a").status_code == 200
