"""Users and tokens over HTTP."""

import httpx2
import pytest
from starlette.testclient import TestClient

from hub.context import Hub
from hub.users.models import Scope
from tests.hub.conftest import bearer, make_user, new_token


def test_an_administrator_makes_a_user_who_makes_tokens(hub: Hub, client: TestClient) -> None:
    admin = bearer(hub.admin_token)
    made = client.post("/api/users", json={"name": "Ada"}, headers=admin)
    assert made.status_code == 201
    ada = bearer(made.json()["token"])
    body = {"name": "laptop", "scope": "read", "days": 30}
    new = client.post("/api/tokens", json=body, headers=ada)
    assert new.status_code == 201
    laptop = bearer(new.json()["token"])
    listed = client.get("/api/tokens", headers=laptop).json()
    assert [(t["name"], t["scope"]) for t in listed] == [
        ("laptop", "read"),
        ("first token", "admin"),
    ]
    assert new.json()["token"] not in str(listed)
    assert client.delete(f"/api/tokens/{listed[0]['id']}", headers=laptop).status_code == 403
    assert client.delete(f"/api/tokens/{listed[0]['id']}", headers=ada).status_code == 204
    assert client.get("/api/tokens", headers=laptop).status_code == 401
    assert client.get("/api/tokens").status_code == 401


def test_only_administrators_make_users(hub: Hub, client: TestClient) -> None:
    _, token = make_user(hub, "ada")
    refused = client.post("/api/users", json={"name": "bob"}, headers=bearer(token))
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "Forbidden")
    taken = client.post("/api/users", json={"name": "ADA"}, headers=bearer(hub.admin_token))
    assert (taken.status_code, taken.json()["error"]["param"]) == (409, "name")
    odd = {"name": "bob", "is_admin": True}
    refused = client.post("/api/users", json=odd, headers=bearer(hub.admin_token))
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "is_admin")


def test_members_of_an_organisation_are_set_by_its_administrators(
    hub: Hub, client: TestClient
) -> None:
    _, ada = make_user(hub, "ada", Scope.ADMIN)
    _, bob = make_user(hub, "bob", Scope.ADMIN)
    make_user(hub, "eve", Scope.READ)
    made = client.post("/api/organizations", json={"name": "Acme"}, headers=bearer(ada))
    assert (made.status_code, made.json()) == (201, {"name": "Acme"})
    repo = {"name": "ink", "organization": "acme"}
    assert client.post("/api/repos/create", json=repo, headers=bearer(bob)).status_code == 403
    member = "/api/organizations/acme/members"
    role = {"role": "writer"}
    assert client.put(f"{member}/eve", json=role, headers=bearer(bob)).status_code == 403
    assert client.put(f"{member}/bob", json=role, headers=bearer(ada)).status_code == 204
    assert client.post("/api/repos/create", json=repo, headers=bearer(bob)).status_code == 200
    assert client.put(f"{member}/eve", json=role, headers=bearer(bob)).status_code == 403
    assert client.put(f"{member}/nobody", json=role, headers=bearer(ada)).status_code == 404
    assert client.put(f"{member}/bob", json={"role": "x"}, headers=bearer(ada)).status_code == 422
    demoted = client.put(f"{member}/bob", json={"role": "reader"}, headers=bearer(ada))
    assert demoted.status_code == 204
    repo = {"name": "wax", "organization": "acme"}
    assert client.post("/api/repos/create", json=repo, headers=bearer(bob)).status_code == 403


def test_members_leave_and_are_removed_but_the_last_administrator_stays(
    hub: Hub, client: TestClient
) -> None:
    _, ada = make_user(hub, "ada", Scope.ADMIN)
    _, bob = make_user(hub, "bob", Scope.ADMIN)
    _, bob_write = new_token(hub, "bob", Scope.WRITE)
    _, eve = make_user(hub, "eve", Scope.ADMIN)
    client.post("/api/organizations", json={"name": "Acme"}, headers=bearer(ada))
    members = "/api/organizations/acme/members"

    def delete(name: str, token: str) -> int:
        return client.delete(f"{members}/{name}", headers=bearer(token)).status_code

    def put(name: str, role: str, token: str) -> int:
        body = {"role": role}
        return client.put(f"{members}/{name}", json=body, headers=bearer(token)).status_code

    last = client.delete(f"{members}/ada", headers=bearer(ada))
    assert (last.status_code, last.json()["error"]["code"]) == (409, "LastAdmin")
    assert put("ada", "writer", ada) == 409
    assert [put(name, "reader", ada) for name in ("bob", "eve")] == [204, 204]
    assert delete("eve", bob) == 403
    assert delete("bob", bob_write) == 403
    listed = client.get(members, headers=bearer(eve)).json()
    assert [(m["user"], m["role"]) for m in listed] == [
        ("ada", "admin"),
        ("bob", "reader"),
        ("eve", "reader"),
    ]
    assert delete("eve", ada) == 204
    assert delete("eve", ada) == 404
    assert client.get(members, headers=bearer(eve)).status_code == 403
    assert delete("bob", bob) == 204
    assert put("bob", "admin", ada) == 204
    assert delete("ada", ada) == 204
    assert delete("bob", hub.admin_token or "") == 409


def test_a_token_that_only_publishes_manages_nothing(hub: Hub, client: TestClient) -> None:
    _, ada = make_user(hub, "ada", Scope.WRITE)
    for method, path, body in (
        ("POST", "/api/tokens", {"name": "more"}),
        ("POST", "/api/organizations", {"name": "acme"}),
        ("DELETE", "/api/tokens/1", None),
    ):
        refused = client.request(method, path, json=body, headers=bearer(ada))
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "Forbidden"), path
        assert "scope admin" in refused.json()["error"]["message"]
    own = client.get("/api/tokens", headers=bearer(ada)).json()[0]["id"]
    assert client.delete(f"/api/tokens/{own}", headers=bearer(ada)).status_code == 204
    assert client.get("/api/tokens", headers=bearer(ada)).status_code == 401


def test_the_token_of_an_administrator_administers_only_with_that_scope(
    hub: Hub, client: TestClient
) -> None:
    _, ada = make_user(hub, "ada")
    secret = {"name": "secret", "private": True}
    assert client.post("/api/repos/create", json=secret, headers=bearer(ada)).is_success
    _, writer = new_token(hub, "admin", Scope.WRITE)
    assert client.get("/api/users", headers=bearer(writer)).status_code == 403
    assert client.get("/api/models/ada/secret", headers=bearer(writer)).status_code == 404
    assert client.get("/api/models/ada/secret", headers=bearer(hub.admin_token)).is_success


def test_a_token_with_places_acts_there_only(hub: Hub, client: TestClient) -> None:
    _, ada = make_user(hub, "ada", Scope.ADMIN)
    client.post("/api/organizations", json={"name": "Acme"}, headers=bearer(ada))
    for name in ("ada/ink", "ada/wax", "acme/oil"):
        namespace, _, repo = name.partition("/")
        body = {"name": repo, "organization": namespace, "private": True}
        assert client.post("/api/repos/create", json=body, headers=bearer(ada)).is_success
    body = {"name": "ci", "scope": "write", "places": ["Ada/Ink", "acme"]}
    ci = bearer(client.post("/api/tokens", json=body, headers=bearer(ada)).json()["token"])

    seen = client.get("/api/models", headers=ci).json()
    assert sorted(repo["id"] for repo in seen) == ["Acme/oil", "ada/ink"]
    assert client.get("/api/adapters", headers=ci).is_success
    assert client.get("/api/models/ada/wax", headers=ci).status_code == 404
    for repo, status in {"ada/ink": 200, "ada/wax": 404, "acme/oil": 200}.items():
        branch = client.post(f"/api/models/{repo}/branch/x", json={}, headers=ci)
        assert branch.status_code == status, repo
    new = {"name": "new", "organization": "ada"}
    assert client.post("/api/repos/create", json=new, headers=ci).status_code == 403
    new["organization"] = "acme"
    assert client.post("/api/repos/create", json=new, headers=ci).status_code == 200
    move = {"fromRepo": "acme/oil", "toRepo": "ada/oil"}
    assert client.post("/api/repos/move", json=move, headers=ci).status_code == 403

    who = client.get("/api/whoami-v2", headers=ci).json()["auth"]["accessToken"]
    assert (who["displayName"], who["role"]) == ("ci", "fineGrained")
    assert who["fineGrained"]["scoped"] == [
        {
            "entity": {"type": kind, "name": name},
            "permissions": ["repo.content.read", "repo.write"],
        }
        for kind, name in (("org", "acme"), ("model", "ada/ink"))
    ]


def test_a_confined_token_with_scope_admin_manages_its_organisation_and_no_account(
    hub: Hub, client: TestClient
) -> None:
    _, ada = make_user(hub, "ada", Scope.ADMIN)
    make_user(hub, "bob")
    for name in ("acme", "other"):
        client.post("/api/organizations", json={"name": name}, headers=bearer(ada))
    body = {"name": "sync", "scope": "admin", "places": ["acme"]}
    sync = bearer(client.post("/api/tokens", json=body, headers=bearer(ada)).json()["token"])
    role = {"role": "reader"}
    for name, status in {"acme": 204, "other": 403}.items():
        path = f"/api/organizations/{name}/members/bob"
        assert client.put(path, json=role, headers=sync).status_code == status
        assert client.delete(path, headers=sync).status_code == status
    assert client.get("/api/organizations/other/members", headers=sync).status_code == 403
    assert client.post("/api/tokens", json={"name": "x"}, headers=sync).status_code == 403
    assert client.delete("/api/organizations/acme/members/ada", headers=sync).status_code == 403


@pytest.mark.parametrize(
    "places", [[], [" "], ["nobody"], ["ada/.."], ["ada"] + [f"ada/x{n}" for n in range(100)]]
)
def test_places_are_checked(hub: Hub, client: TestClient, places: list[str]) -> None:
    _, ada = make_user(hub, "ada", Scope.ADMIN)
    body = {"name": "ci", "places": places}
    refused = client.post("/api/tokens", json=body, headers=bearer(ada))
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "places")


@pytest.mark.parametrize(
    ("scope", "role"), [("read", "read"), ("write", "write"), ("admin", "write")]
)
def test_whoami_says_what_a_token_may_in_the_words_of_clients(
    hub: Hub, client: TestClient, scope: Scope, role: str
) -> None:
    _, ada = make_user(hub, "ada", Scope(scope))
    who = client.get("/api/whoami-v2", headers=bearer(ada)).json()["auth"]["accessToken"]
    assert (who["displayName"], who["role"]) == ("test", role)
    assert who["createdAt"].endswith("Z")


def test_a_token_says_when_it_was_last_used(hub: Hub, client: TestClient) -> None:
    _, ada = make_user(hub, "ada")
    assert client.get("/api/tokens", headers=bearer(ada)).json()[0]["last_used_at"] is None
    hub.uses.flush(hub.db)
    used = client.get("/api/tokens", headers=bearer(ada)).json()[0]
    assert used["last_used_at"] >= used["created_at"]


def test_an_administrator_disables_promotes_and_renames(hub: Hub, client: TestClient) -> None:
    admin = bearer(hub.admin_token)
    _, ada = make_user(hub, "ada", Scope.ADMIN)

    def change(name: str, **fields: object) -> httpx2.Response:
        return client.patch(f"/api/users/{name}", json=fields, headers=admin)

    assert client.patch("/api/users/admin", json={}, headers=bearer(ada)).status_code == 403
    assert change("nobody").status_code == 404
    assert change("ADA", full_name="Ada L.", is_admin=True).json()["is_admin"]
    assert [user["full_name"] for user in client.get("/api/users", headers=bearer(ada)).json()] == [
        "Ada L.",
        "",
    ]
    assert change("ada", is_disabled=True).is_success
    assert client.get("/api/users", headers=bearer(ada)).status_code == 401
    last = change("admin", is_disabled=True)
    assert (last.status_code, last.json()["error"]["code"]) == (409, "LastAdmin")
    assert change("admin", is_admin=False).status_code == 409
    assert change("ada", is_disabled=False).is_success
    assert client.get("/api/users", headers=bearer(ada)).is_success
    assert change("admin", is_admin=False).is_success
    assert change("ada").status_code == 403
