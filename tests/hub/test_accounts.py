"""Signing in, passwords, logins, invitations, and the pages of an account."""

import re
from datetime import timedelta

import argon2
import pytest
from sqlmodel import select
from starlette.testclient import TestClient

from hub.app import SAFE_METHODS, create_app, mutating_routes, policies_of
from hub.context import Hub
from hub.db import now
from hub.deps import SESSION_COOKIE, signed_address
from hub.errors import BadField, TooManyTries, Unauthorized
from hub.users import passwords, sessions, throttle
from hub.users import service as users
from hub.users.models import Password, Scope, Token, Tries
from tests.hub.conftest import bearer, both_databases, make_user
from tests.hub.test_app import filled
from tests.hub.test_users import allow_changes_of_the_log

HOST = "http://127.0.0.1:8470"
HTML = {"Accept": "text/html", "Origin": HOST}
RIGHT = "correct horse battery"


@pytest.fixture(autouse=True)
def _cheap_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is about how long a hash takes."""
    monkeypatch.setattr(passwords, "HASHER", argon2.PasswordHasher(1, 8, 1))
    passwords._nobodys.cache_clear()


def make_account(hub: Hub, name: str = "ada", password: str = RIGHT) -> str:
    """A user with a password, and a token with scope admin."""
    _, secret = make_user(hub, name, Scope.ADMIN)
    with hub.db.write() as session:
        passwords.store(session, users.find_user(session, name), passwords.hashed(password))
    return secret


def sign_in(client: TestClient, name: str = "ada", password: str = RIGHT) -> None:
    answer = client.post("/login", data={"name": name, "password": password}, headers=HTML)
    assert answer.status_code == 303, answer.text


def form(client: TestClient, path: str, **data: str) -> tuple[int, str]:
    answer = client.post(path, data=data, headers=HTML)
    return answer.status_code, answer.headers.get("Location", answer.text)


def who(client: TestClient) -> int:
    """200 for somebody, 401 for nobody."""
    return client.get("/settings", headers=HTML).status_code


# Signing in


def test_a_name_and_a_password_are_a_login(hub: Hub, client: TestClient) -> None:
    make_account(hub)
    assert 'name="password"' in client.get("/login").text
    answer = client.post(
        "/login", data={"name": "ADA", "password": RIGHT, "next": "/jobs"}, headers=HTML
    )
    assert (answer.status_code, answer.headers["Location"]) == (303, "/jobs")
    cookie = answer.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    assert "Secure" not in cookie
    assert who(client) == 200
    assert form(client, "/logout") == (303, "/")
    assert who(client) == 401


def test_a_cookie_of_an_https_hub_is_secure(hub: Hub) -> None:
    make_account(hub)
    settings = hub.settings.model_copy(update={"public_url": "https://hub.example"})
    app = create_app(settings, hub=Hub(settings, hub.db, hub.store, hub.signer, hub.downloads))
    with TestClient(app, base_url="https://hub.example", follow_redirects=False) as client:
        data = {"name": "ada", "password": RIGHT}
        origin = {"Origin": "https://hub.example"}
        assert "Secure" in client.post("/login", data=data, headers=origin).headers["Set-Cookie"]


@pytest.mark.parametrize(
    ("name", "password"),
    [
        ("ada", "wrong"),
        ("nobody", RIGHT),
        ("bob", RIGHT),
        ("eve", RIGHT),
        ("", ""),
        ("a\x00", "\0"),
    ],
)
def test_every_wrong_login_has_one_answer(
    hub: Hub, client: TestClient, name: str, password: str
) -> None:
    make_account(hub)
    make_user(hub, "bob")  # without a password
    make_account(hub, "eve")
    with hub.db.write() as session:
        admin = users.find_user(session, "admin")
        users.change_user(session, admin, "eve", is_disabled=True)
    answer = client.post("/login", data={"name": name, "password": password}, headers=HTML)
    assert answer.status_code == 401
    assert "The name or the password is wrong." in answer.text
    assert SESSION_COOKIE not in answer.cookies


def test_an_unknown_name_costs_a_hash_too(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    make_account(hub)
    verified = []
    real = passwords.HASHER

    class Counting(argon2.PasswordHasher):
        def verify(self, hash: str | bytes, password: str | bytes) -> bool:
            verified.append(hash)
            return real.verify(hash, password)

    monkeypatch.setattr(passwords, "HASHER", Counting(1, 8, 1))
    for name in ("ada", "nobody", "admin"):
        with pytest.raises(Unauthorized):
            passwords.sign_in(hub.db, name, "wrong", "::1")
    parameters = {str(hash).split("$")[3] for hash in verified}
    assert (len(verified), len(parameters)) == (3, 1)


def test_a_hash_with_older_parameters_is_made_anew_at_the_next_login(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_account(hub)
    stronger = argon2.PasswordHasher(2, 16, 1)
    monkeypatch.setattr(passwords, "HASHER", stronger)
    with pytest.raises(Unauthorized):
        passwords.sign_in(hub.db, "ada", "wrong", "::1")
    with hub.db.read() as session:
        assert stronger.check_needs_rehash(session.exec(select(Password.hash)).one())
    passwords.sign_in(hub.db, "ada", RIGHT, "::1")
    with hub.db.read() as session:
        assert not stronger.check_needs_rehash(session.exec(select(Password.hash)).one())
    passwords.sign_in(hub.db, "ada", RIGHT, "::1")


def test_the_parameters_of_a_release_are_those_of_rfc_9106(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found = argon2.extract_parameters(passwords.HASHER.hash("x"))
    assert (found.type, found.time_cost, found.memory_cost) == (argon2.Type.ID, 3, 65536)


def test_a_password_is_kept_as_a_hash_only(hub: Hub) -> None:
    make_account(hub)
    with hub.db.read() as session:
        row = session.exec(select(Password)).one()
    assert row.hash.startswith("$argon2id$")
    assert RIGHT not in str(row.model_dump())


@pytest.mark.parametrize(
    "password", ["short", "x" * 257, "aaaaaaaaaaaa", "ada-lovelace1", "121212121212"]
)
def test_a_password_that_is_easy_to_guess_is_refused(password: str) -> None:
    with pytest.raises(BadField, match=r"characters|easy to guess"):
        passwords.check(password, "ada-lovelace")


# Tries


@both_databases
def test_a_thousand_tries_are_mostly_refused_before_anything_is_compared(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_account(hub)
    n_compared = 0
    real = passwords._verified

    def counted(known: str | None, text: str) -> bool:
        nonlocal n_compared
        n_compared += 1
        return real(known, text)

    monkeypatch.setattr(passwords, "_verified", counted)
    n_refused = 0
    for n in range(200):
        with pytest.raises((Unauthorized, TooManyTries)) as error:
            passwords.sign_in(hub.db, "ada", f"guess {n}", f"10.0.{n // 200}.{n % 200}")
        n_refused += error.type is TooManyTries
    assert (n_compared, n_refused) == (throttle.PER_USER, 200 - throttle.PER_USER)
    with pytest.raises(TooManyTries):
        passwords.sign_in(hub.db, "ada", RIGHT, "10.9.9.9")


def test_one_address_cannot_try_many_names(hub: Hub) -> None:
    for n in range(throttle.PER_ADDRESS):
        with pytest.raises(Unauthorized):
            passwords.sign_in(hub.db, f"user{n}", "guess", f"2001:db8::{n:x}")
    with pytest.raises(TooManyTries):
        passwords.sign_in(hub.db, "another", "guess", "2001:db8::ffff:1")
    with pytest.raises(Unauthorized):
        passwords.sign_in(hub.db, "another", "guess", "2001:db8:0:1::1")


def test_a_full_window_says_when_to_come_back_and_ends(hub: Hub, client: TestClient) -> None:
    make_account(hub)
    for _ in range(throttle.PER_USER):
        assert form(client, "/login", name="ada", password="guess")[0] == 401
    refused = client.post("/login", data={"name": "ada", "password": RIGHT}, headers=HTML)
    assert refused.status_code == 429
    assert 0 < int(refused.headers["Retry-After"]) <= 900
    assert "wait 15 minutes" in refused.text
    with hub.db.write() as session:
        for row in session.exec(select(Tries)):
            row.since = now() - throttle.WINDOW - timedelta(seconds=1)
            session.add(row)
    sign_in(client)
    with hub.db.read() as session:
        assert [row.key for row in session.exec(select(Tries))] == ["address:testclient"]


def test_a_right_password_clears_the_tries_of_its_user(hub: Hub, client: TestClient) -> None:
    make_account(hub)
    for _ in range(3):
        for _ in range(throttle.PER_USER - 1):
            assert form(client, "/login", name="ada", password="guess")[0] == 401
        sign_in(client)


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("testclient", "testclient"),
    ],
)
def test_an_address_counts_with_its_network(address: str, network: str) -> None:
    assert throttle.network_of(address) == network


# Logins


def test_each_login_has_a_cookie_of_its_own(hub: Hub, client: TestClient) -> None:
    make_account(hub)
    sign_in(client)
    first = client.cookies[SESSION_COOKIE]
    sign_in(client)
    assert client.cookies[SESSION_COOKIE] != first


def test_signing_out_ends_the_login_and_not_only_the_cookie(hub: Hub, client: TestClient) -> None:
    make_account(hub)
    sign_in(client)
    stolen = client.cookies[SESSION_COOKIE]
    form(client, "/logout")
    client.cookies.set(SESSION_COOKIE, stolen)
    assert who(client) == 401


def test_a_login_is_no_token(hub: Hub, client: TestClient) -> None:
    make_account(hub)
    sign_in(client)
    assert len(client.get("/api/tokens").json()) == 1
    bare = bearer(client.cookies[SESSION_COOKIE])
    client.cookies.clear()
    assert client.get("/api/tokens", headers=bare).status_code == 401


def test_a_login_with_a_token_has_its_rights_and_its_end(hub: Hub, client: TestClient) -> None:
    viewer, secret = make_user(hub, "ada", Scope.READ)
    assert form(client, "/login", token=f" {secret} ", next="/") == (303, "/")
    page = client.get("/settings/tokens", headers=HTML)
    assert "may not change your account" in page.text
    assert "Make token" not in page.text
    assert form(client, "/settings/tokens", name="more")[0] == 403
    assert viewer.user is not None
    assert viewer.token_id is not None
    with hub.db.write() as session:
        users.revoke_token(session, viewer.user, viewer.token_id)
    assert who(client) == 401


def test_a_disabled_user_loses_every_login_and_token_at_once(hub: Hub, client: TestClient) -> None:
    token = make_account(hub)
    sign_in(client)
    with hub.db.write() as session:
        admin = users.find_user(session, "admin")
        users.change_user(session, admin, "ada", is_disabled=True)
    assert who(client) == 401
    assert client.get("/api/whoami-v2", headers=bearer(token)).status_code == 401


def test_logins_are_listed_and_ended_one_by_one(hub: Hub, client: TestClient) -> None:
    make_account(hub)
    app = client.app
    firefox = "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"
    with TestClient(app, base_url=HOST, follow_redirects=False) as other:
        other.headers["User-Agent"] = firefox
        sign_in(other)
        sign_in(client)
        text = client.get("/settings/sessions", headers=HTML).text
        assert "Firefox on Linux" in text
        assert text.count("this one") == 1
        ids = re.findall(r"/settings/sessions/(\d+)/end", text)
        assert len(ids) == 2
        assert form(client, f"/settings/sessions/{ids[1]}/end") == (303, "/settings/sessions")
        assert (who(other), who(client)) == (401, 200)
        sign_in(other)
        assert form(client, "/settings/sessions/end-others") == (303, "/settings/sessions")
        assert (who(other), who(client)) == (401, 200)


def test_nobody_ends_the_login_of_another(hub: Hub, client: TestClient) -> None:
    make_account(hub)
    make_account(hub, "eve")
    with hub.db.write() as session:
        theirs = sessions.start(session, users.find_user(session, "eve"), how="test", days=1)
    sign_in(client)
    assert form(client, f"/settings/sessions/{theirs.token_id}/end")[0] == 404
    with hub.db.read() as session:
        assert session.get_one(Token, theirs.token_id).revoked_at is None


# A new password


def test_a_new_password_ends_every_login_but_the_one_that_set_it(
    hub: Hub, client: TestClient
) -> None:
    token = make_account(hub)
    with TestClient(client.app, base_url=HOST, follow_redirects=False) as other:
        sign_in(other)
        sign_in(client)
        new = "another good password"
        status, text = form(client, "/settings/password", current="wrong", password=new)
        assert (status, "present password is wrong" in text) == (422, True)
        assert form(client, "/settings/password", current=RIGHT, password="short")[0] == 422
        assert who(other) == 200
        old_cookie = client.cookies[SESSION_COOKIE]
        assert form(client, "/settings/password", current=RIGHT, password=new)[0] == 303
        assert (who(other), who(client)) == (401, 200)
        other.cookies.set(SESSION_COOKIE, old_cookie)
        assert who(other) == 401
        assert form(other, "/login", name="ada", password=RIGHT)[0] == 401
        other.cookies.clear()
        sign_in(other, password=new)
    assert client.get("/api/whoami-v2", headers=bearer(token)).is_success


def test_the_present_password_is_not_guessed_from_an_open_browser(
    hub: Hub, client: TestClient
) -> None:
    make_account(hub)
    sign_in(client)
    new = "another good password"
    for _ in range(throttle.PER_USER):
        assert form(client, "/settings/password", current="guess", password=new)[0] == 422
    assert form(client, "/settings/password", current=RIGHT, password=new)[0] == 429


def test_an_account_without_a_password_sets_its_first(hub: Hub, client: TestClient) -> None:
    assert hub.admin_token is not None
    assert "admin.token" in client.get("/login").text
    assert form(client, "/login", token=hub.admin_token)[0] == 303
    assert form(client, "/settings/password", password=RIGHT)[0] == 303
    form(client, "/logout")
    sign_in(client, "admin")


# Accounts


def test_signing_up_is_off_until_a_setting_allows_it(hub: Hub, client: TestClient) -> None:
    data = {"name": "ada", "password": RIGHT}
    assert client.get("/signup", headers=HTML).status_code == 403
    assert client.post("/signup", data=data, headers=HTML).status_code == 403
    settings = hub.settings.model_copy(update={"signup": True})
    opened = Hub(settings, hub.db, hub.store, hub.signer, hub.downloads)
    app = create_app(settings, hub=opened)
    with TestClient(app, base_url=HOST, follow_redirects=False) as open_client:
        assert "/signup" in open_client.get("/login").text
        status, text = form(open_client, "/signup", name="admin", password=RIGHT)
        assert (status, "is or was in use" in text) == (409, True)
        assert form(open_client, "/signup", name="api", password=RIGHT)[0] == 422
        assert form(open_client, "/signup", name="ada", password="short")[0] == 422
        assert form(open_client, "/signup", **data) == (303, "/settings")
        assert who(open_client) == 200
        assert open_client.get("/settings/users", headers=HTML).status_code == 403


def link_in(text: str) -> str:
    found = re.search(r"http://127\.0\.0\.1:8470(/invite\?code=[\w-]+)", text)
    assert found is not None
    return found[1]


@both_databases
def test_an_invitation_makes_one_account_in_its_organisation(hub: Hub, client: TestClient) -> None:
    make_account(hub, "olga")
    with hub.db.write() as session:
        users.create_organization(session, "acme", users.find_user(session, "olga"))
    form(client, "/login", token=hub.admin_token or "")
    assert form(client, "/settings/users/invite", organization="nowhere")[0] == 404
    answer = client.post("/settings/users/invite", data={"organization": "acme"}, headers=HTML)
    assert answer.headers["Cache-Control"] == "private, no-store"
    link = link_in(answer.text)
    assert link not in client.get("/settings/users", headers=HTML).text
    form(client, "/logout")
    code = link.partition("=")[2]
    assert "into the organisation acme" in client.get(link, headers=HTML).text
    assert form(client, "/invite", code=code, name="olga", password=RIGHT)[0] == 409
    assert form(client, "/invite", code=code, name="ada", password="short")[0] == 422
    data = {"code": code, "name": "ada", "full_name": "Ada L.", "password": RIGHT}
    assert form(client, "/invite", **data) == (303, "/settings")
    assert [o["role"] for o in client.get("/api/organizations").json()] == ["writer"]
    assert form(client, "/invite", **data | {"name": "bob"})[0] == 404
    assert client.get(link, headers=HTML).status_code == 404


@both_databases
def test_a_link_for_a_new_password_works_once_and_for_its_user(
    hub: Hub, client: TestClient
) -> None:
    make_account(hub)
    with TestClient(client.app, base_url=HOST, follow_redirects=False) as ada:
        sign_in(ada)
        form(client, "/login", token=hub.admin_token or "")
        text = client.post("/settings/users/ada/reset", headers=HTML).text
        form(client, "/logout")
        assert who(ada) == 200
        code = link_in(text).partition("=")[2]
        new = "a password from a link"
        assert form(client, "/invite", code=code, name="mallory", password=new)[0] == 303
        assert (who(client), who(ada)) == (200, 401)
        assert client.get("/api/whoami-v2").json()["name"] == "ada"
        assert form(client, "/invite", code=code, password=new)[0] == 404
        sign_in(ada, password=new)


@pytest.mark.parametrize("change", ["is_disabled", "is_admin", "old", "user_disabled"])
def test_a_link_dies_with_who_made_it_and_with_time(
    hub: Hub, client: TestClient, change: str
) -> None:
    token = make_account(hub, "boss")
    make_account(hub)
    with hub.db.write() as session:
        admin = users.find_user(session, "admin")
        users.change_user(session, admin, "boss", is_admin=True)
    form(client, "/login", token=token)
    code = link_in(client.post("/settings/users/ada/reset", headers=HTML).text).partition("=")[2]
    form(client, "/logout")
    with hub.db.write() as session:
        if change == "old":
            session.connection().exec_driver_sql("UPDATE invitation SET expires_at = created_at")
        elif change == "user_disabled":
            users.change_user(session, admin, "ada", is_disabled=True)
        else:
            fields = {change: change == "is_disabled"}
            users.change_user(session, admin, "boss", **fields)  # type: ignore[arg-type]
    assert form(client, "/invite", code=code, password=RIGHT)[0] == 404


def test_a_name_is_never_given_again(hub: Hub, client: TestClient) -> None:
    make_account(hub)
    with hub.db.write() as session:
        admin = users.find_user(session, "admin")
        users.change_user(session, admin, "ada", is_disabled=True)
    made = client.post("/api/users", json={"name": "Ada"}, headers=bearer(hub.admin_token))
    assert (made.status_code, made.json()["error"]["code"]) == (409, "NameTaken")


# Pages


def test_a_new_token_is_shown_once(hub: Hub, client: TestClient) -> None:
    make_account(hub)
    sign_in(client)
    data = {"name": "laptop", "scope": "write", "days": "90", "places": "ada, ada/ink"}
    answer = client.post("/settings/tokens", data=data, headers=HTML)
    assert answer.headers["Cache-Control"] == "private, no-store"
    secret = re.findall(r"graft_[\w-]{43}", answer.text)[0]
    listed = client.get("/settings/tokens", headers=HTML).text
    assert "laptop" in listed
    assert "ada, ada/ink" in listed
    assert secret not in listed
    with TestClient(client.app, base_url=HOST) as program:
        assert program.get("/api/whoami-v2", headers=bearer(secret)).is_success
        token_id = re.findall(r"/settings/tokens/(\d+)/revoke", listed)[0]
        assert form(client, f"/settings/tokens/{token_id}/revoke") == (303, "/settings/tokens")
        assert program.get("/api/whoami-v2", headers=bearer(secret)).status_code == 401
    for wrong in ({"days": "7"}, {"name": ""}, {"places": "nowhere"}):
        assert form(client, "/settings/tokens", **data | wrong)[0] == 422


def test_an_organisation_is_made_and_managed_on_its_pages(hub: Hub, client: TestClient) -> None:
    make_account(hub)
    make_account(hub, "bob")
    sign_in(client)
    acme = "/organizations/acme"
    assert form(client, "/settings/organizations", name="ada")[0] == 409
    assert form(client, "/settings/organizations", name="acme") == (303, acme)
    status, text = form(client, f"{acme}/members", user="nobody", role="writer")
    assert (status, "there is no user" in text.lower()) == (404, True)
    assert form(client, f"{acme}/members", user="bob", role="reader") == (303, acme)
    status, text = form(client, f"{acme}/remove", user="ada")
    assert (status, "last administrator" in text) == (409, True)
    with TestClient(client.app, base_url=HOST, follow_redirects=False) as bob:
        sign_in(bob, "bob")
        page = bob.get(acme, headers=HTML).text
        assert "Leave acme" in page
        assert "Add member" not in page
        assert form(bob, f"{acme}/members", user="bob", role="admin")[0] == 403
        assert form(bob, f"{acme}/remove", user="ada")[0] == 403
        assert form(bob, f"{acme}/remove", user="bob") == (303, "/settings/organizations")
        assert bob.get(acme, headers=HTML).status_code == 403


def test_the_users_page_is_for_administrators(hub: Hub, client: TestClient) -> None:
    make_account(hub)
    make_account(hub, "eve")
    sign_in(client)
    assert client.get("/settings/users", headers=HTML).status_code == 403
    assert form(client, "/settings/users/eve/disable")[0] == 403
    form(client, "/login", token=hub.admin_token or "")
    for change in ("disable", "enable", "promote", "demote"):
        assert form(client, f"/settings/users/eve/{change}") == (303, "/settings/users")
    assert form(client, "/settings/users/eve/bury")[0] == 422
    assert form(client, "/settings/users/admin/demote")[0] == 409


# Forms of other sites


def test_no_form_is_sent_by_a_page_of_another_site(hub: Hub, client: TestClient) -> None:
    """Every changing route, with an administrator's cookie: the Origin decides."""
    form(client, "/login", token=hub.admin_token or "")
    app = client.app
    assert app is not None
    # They look at nothing but their own body, or know no cookies.
    harmless = {"/settings/theme", "/api/validate-yaml", "/xet/{cache}/{path:path}"}
    harmless |= {r.path or "" for r in mutating_routes(app) if signed_address in policies_of(r)}  # type: ignore[arg-type]
    acted = []
    for route in mutating_routes(app):  # type: ignore[arg-type]
        if (route.path or "") in harmless:
            continue
        for method in sorted((route.methods or set()) - SAFE_METHODS):
            for origin in ("http://evil.example", "null"):
                headers = {"Origin": origin, "Accept": "text/html"}
                answer = client.request(method, filled(route.path or ""), headers=headers)
                if answer.status_code not in (401, 403, 501):
                    acted.append((method, route.path, answer.status_code))
    assert not acted, str(acted)


# The audit log


def test_the_audit_log_is_shown_and_verified_for_administrators(
    hub: Hub, client: TestClient
) -> None:
    ada = make_account(hub)
    admin = bearer(hub.admin_token)
    for path in ("/api/audit", "/api/audit/verify"):
        assert client.get(path).status_code == 401
        assert client.get(path, headers=bearer(ada)).status_code == 403
    page = client.get("/api/audit?action=token&limit=1", headers=admin).json()
    assert [(e["user"], e["action"]) for e in page["items"]] == [("ada", "token.issue")]
    before = page["next_before"]
    older = client.get(f"/api/audit?action=token&before={before}", headers=admin).json()
    assert older["next_before"] is None
    assert client.get("/api/audit?user=nobody", headers=admin).status_code == 404
    by_ada = client.get("/api/audit?user=ADA", headers=admin).json()["items"]
    assert {entry["user"] for entry in by_ada} == {"ada"}
    chain = client.get("/api/audit/verify", headers=admin).json()
    assert (chain["broken"], chain["has_expected"]) == (None, None)
    noted = client.get("/api/audit/verify", params={"expect": chain["head"]}, headers=admin).json()
    assert noted["has_expected"] is True

    form(client, "/login", token=hub.admin_token or "")
    assert "token.issue" in client.get("/settings/audit", headers=HTML).text
    assert (
        '<td data-label="Did">token.issue'
        not in client.get("/settings/audit?action=login", headers=HTML).text
    )
    assert client.get("/settings/audit?user=nobody", headers=HTML).status_code == 404
    sound = client.get("/settings/audit?verify=1", headers=HTML).text
    assert "are as they were written" in sound
    with hub.db.write() as session:
        allow_changes_of_the_log(session)
        session.connection().exec_driver_sql("UPDATE audit SET subject = 'x' WHERE id = 2")
    broken = client.get("/settings/audit?verify=1", headers=HTML).text
    assert "Row 2 was changed" in broken
    assert "are as they were written" not in broken


def test_what_people_do_with_accounts_is_in_the_log(hub: Hub, client: TestClient) -> None:
    make_account(hub)
    sign_in(client)
    form(client, "/settings/organizations", name="acme")
    form(client, "/settings/tokens", name="laptop", scope="read")
    form(client, "/logout")
    for _ in range(throttle.PER_USER):
        form(client, "/login", name="ada", password="guess")
    log = client.get("/api/audit", headers=bearer(hub.admin_token)).json()["items"]
    actions = [entry["action"] for entry in reversed(log)][5:]
    assert actions == ["login", "organization.create", "token.issue", "logout", "login.throttle"]
    assert RIGHT not in str(log)
    assert "guess" not in str(log)
