"""Users and tokens over HTTP."""

from starlette.testclient import TestClient

from hub.context import Hub
from hub.users.models import Scope
from tests.hub.conftest import bearer, make_user


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
        ("first token", "write"),
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
    _, ada = make_user(hub, "ada")
    _, bob = make_user(hub, "bob")
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
