"""Signing in at an OpenID Connect provider: a real one from PyPI, and a strict one that can lie."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import argon2
import httpx2
import pytest
from pydantic import SecretStr
from sqlmodel import select
from starlette.testclient import TestClient

from hub.app import create_app
from hub.context import Hub
from hub.deps import SESSION_COOKIE
from hub.errors import CannotStart
from hub.settings import Settings
from hub.users import invitations, oidc, passwords
from hub.users import service as users
from hub.users.models import Identity, User
from tests.fixtures.oidc import (
    CLIENT,
    SECRET,
    StrictProvider,
    mock_provider,
    signed_by_a_stranger,
    signed_with_the_client_secret,
    strict_provider,
    unsigned,
)
from tests.hub.conftest import make_user
from tests.hub.test_accounts import HOST, HTML, RIGHT, form, link_in, who

START = "/login/oidc"


@pytest.fixture(autouse=True)
def _cheap_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passwords, "HASHER", argon2.PasswordHasher(1, 8, 1))


@pytest.fixture
def provider() -> Iterator[StrictProvider]:
    with strict_provider() as started:
        yield started


@contextmanager
def browser(hub: Hub, issuer: str, **settings: Any) -> Iterator[TestClient]:
    """A browser at a hub that trusts the provider."""
    known = {"oidc_issuer": issuer, "oidc_client_id": CLIENT, "oidc_name": "Acme ID"}
    known["oidc_client_secret"] = SecretStr(SECRET)  # type: ignore[assignment]
    changed = hub.settings.model_copy(update=known | settings)
    opened = Hub(changed, hub.db, hub.store, hub.signer, hub.downloads)
    app = create_app(changed, hub=opened)
    with TestClient(app, base_url=HOST, follow_redirects=False) as client:
        yield client


def answer_of(client: TestClient, provider: StrictProvider, start: str = START) -> httpx2.Response:
    """Through the provider and back."""
    away = client.get(start, headers=HTML)
    assert away.status_code == 303, away.text
    back = provider.authorize(away.headers["Location"])
    return client.get(back, headers=HTML)


def n_users(hub: Hub) -> int:
    with hub.db.read() as session:
        return len(session.exec(select(User)).all())


def link(hub: Hub, name: str, issuer: str, subject: str) -> None:
    with hub.db.write() as session:
        user = users.find_user(session, name)
        assert user.id is not None
        session.add(Identity(user_id=user.id, issuer=issuer, subject=subject))


def test_with_the_provider_of_pypi(hub: Hub) -> None:
    with mock_provider() as issuer, browser(hub, issuer, oidc_signup=True) as client:
        assert "Sign in with Acme ID" in client.get("/login").text

        def through(subject: str) -> httpx2.Response:
            away = client.get(f"{START}?next=/bench", headers=HTML).headers["Location"]
            back = httpx2.post(away, data={"sub": subject})
            assert back.status_code == 302, back.text
            return client.get(back.headers["Location"], headers=HTML)

        assert through("subject-1").headers["Location"] == f"{START}/name"
        assert form(client, f"{START}/name", name="ada") == (303, "/bench")
        assert client.get("/api/whoami-v2").json()["name"] == "ada"
        form(client, "/logout")
        assert through("subject-1").headers["Location"] == "/bench"
        assert client.get("/api/whoami-v2").json()["name"] == "ada"


def test_whoever_the_provider_vouches_for_picks_a_name_once(
    hub: Hub, provider: StrictProvider
) -> None:
    provider.claims = {"sub": "s-1", "preferred_username": "ada", "name": "Ada L."}
    with browser(hub, provider.issuer, oidc_signup=True) as client:
        answer = answer_of(client, provider, f"{START}?next=/jobs")
        assert (answer.status_code, answer.headers["Location"]) == (303, f"{START}/name")
        assert who(client) == 401
        page = client.get(f"{START}/name", headers=HTML).text
        assert 'value="ada"' in page
        assert 'value="Ada L."' in page
        assert form(client, f"{START}/name", name="admin")[0] == 409
        assert form(client, f"{START}/name", name="ada") == (303, "/jobs")
        assert who(client) == 200
        form(client, "/logout")
        assert form(client, f"{START}/name", name="ada2")[0] == 401
        provider.claims = {"sub": "s-1", "preferred_username": "someone-else"}
        assert answer_of(client, provider).headers["Location"] == "/"
        assert client.get("/api/whoami-v2").json()["name"] == "ada"


def test_names_and_addresses_of_the_provider_link_nothing(
    hub: Hub, provider: StrictProvider
) -> None:
    provider.claims = {
        "sub": "s-1",
        "preferred_username": "admin",
        "email": "admin@hub.example",
        "email_verified": True,
    }
    with browser(hub, provider.issuer) as client:
        refused = answer_of(client, provider)
        assert (refused.status_code, who(client)) == (401, 401)
        assert "No account of this hub belongs to that sign-in" in refused.text
    with browser(hub, provider.issuer, oidc_signup=True) as client:
        assert answer_of(client, provider).headers["Location"] == f"{START}/name"
        assert form(client, f"{START}/name", name="admin")[0] == 409
    with hub.db.read() as session:
        assert session.exec(select(Identity)).all() == []


def test_the_same_subject_of_another_provider_is_another_person(
    hub: Hub, provider: StrictProvider
) -> None:
    link(hub, "admin", "http://127.0.0.1:1", "s-1")
    with browser(hub, provider.issuer) as client:
        assert answer_of(client, provider).status_code == 401


def test_a_disabled_user_does_not_come_in(hub: Hub, provider: StrictProvider) -> None:
    make_user(hub, "ada")
    link(hub, "ada", provider.issuer, "s-1")
    with browser(hub, provider.issuer) as client:
        assert answer_of(client, provider).status_code == 303
        with hub.db.write() as session:
            admin = users.find_user(session, "admin")
            users.change_user(session, admin, "ada", is_disabled=True)
        assert who(client) == 401
        assert answer_of(client, provider).status_code == 401
        assert who(client) == 401


def lying(**changed: Any) -> Callable[[StrictProvider], None]:
    def lie(provider: StrictProvider) -> None:
        def token(claims: dict[str, Any]) -> str:
            merged = claims | changed
            return provider.signed({k: v for k, v in merged.items() if v is not None})

        provider.lie = token

    return lie


LIES: dict[str, Callable[[StrictProvider], None]] = {
    "another nonce": lying(nonce="x"),
    "no nonce": lying(nonce=None),
    "another issuer": lying(iss="http://127.0.0.1:1"),
    "another audience": lying(aud="another"),
    "an audience among others, made for another": lying(aud=[CLIENT, "b"], azp="b"),
    "several audiences and no azp": lying(aud=[CLIENT, "b"]),
    "made for another": lying(azp="another"),
    "expired": lying(exp=int(time.time()) - 3600),
    "without an end": lying(exp=None),
    "of the future": lying(iat=int(time.time()) + 3600),
    "no subject": lying(sub=None),
    "an empty subject": lying(sub=""),
    "a long subject": lying(sub="x" * 256),
    "a subject that is a number": lying(sub=7),
    "not signed": lambda p: setattr(p, "lie", unsigned),
    "signed with the client's secret": lambda p: setattr(p, "lie", signed_with_the_client_secret),
    "signed by a stranger": lambda p: setattr(p, "lie", signed_by_a_stranger),
    "no token": lambda p: setattr(p, "lie", lambda claims: "x"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_token_that_proves_nothing_signs_nobody_in(
    hub: Hub, provider: StrictProvider, lie: str
) -> None:
    for subject in ("s-1", "7", "x" * 256, ""):
        link(hub, "admin", provider.issuer, subject)
    with browser(hub, provider.issuer) as client:
        assert answer_of(client, provider).status_code == 303
        client.cookies.clear()
        LIES[lie](provider)
        refused = answer_of(client, provider)
        assert (refused.status_code, who(client)) == (401, 401), refused.text
        assert SESSION_COOKIE not in refused.cookies


def test_a_token_for_several_audiences_that_was_made_for_us_is_good(
    hub: Hub, provider: StrictProvider
) -> None:
    link(hub, "admin", provider.issuer, "s-1")
    lying(aud=["b", CLIENT], azp=CLIENT)(provider)
    with browser(hub, provider.issuer) as client:
        assert answer_of(client, provider).status_code == 303


def test_an_answer_belongs_to_the_browser_that_asked(hub: Hub, provider: StrictProvider) -> None:
    link(hub, "admin", provider.issuer, "s-1")
    with browser(hub, provider.issuer) as client, browser(hub, provider.issuer) as victim:
        away = client.get(START, headers=HTML).headers["Location"]
        planted = provider.authorize(away)
        assert victim.get(planted, headers=HTML).status_code == 401
        victim.get(START, headers=HTML)
        assert victim.get(planted, headers=HTML).status_code == 401
        assert (who(victim), who(client)) == (401, 401)
        assert client.get(planted, headers=HTML).status_code == 303
        assert client.get(planted, headers=HTML).status_code == 401  # its cookie is gone


def test_a_code_works_once_and_only_with_its_verifier(
    hub: Hub, provider: StrictProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    link(hub, "admin", provider.issuer, "s-1")
    with browser(hub, provider.issuer) as client:
        back = provider.authorize(client.get(START, headers=HTML).headers["Location"])
        cookies = dict(client.cookies)
        assert client.get(back, headers=HTML).status_code == 303
        client.cookies.clear()
        for name, value in cookies.items():
            client.cookies.set(name, value)
        refused = client.get(back, headers=HTML)
        assert (refused.status_code, "begin again" in refused.text) == (401, True)
        away = client.get(START, headers=HTML).headers["Location"]
        other = provider.authorize(away.replace("code_challenge=", "code_challenge=x"))
        assert client.get(other, headers=HTML).status_code == 401


@pytest.mark.parametrize("extra", ["iss=http%3A%2F%2Fevil.example", "error=access_denied"])
def test_an_answer_of_another_provider_or_with_an_error_is_refused(
    hub: Hub, provider: StrictProvider, extra: str
) -> None:
    link(hub, "admin", provider.issuer, "s-1")
    with browser(hub, provider.issuer) as client:
        back = provider.authorize(client.get(START, headers=HTML).headers["Location"])
        assert client.get(f"{back}&{extra}", headers=HTML).status_code == 401
        assert "/token" not in provider.seen


def test_a_provider_that_says_who_it_is_says_so_each_time(
    hub: Hub, provider: StrictProvider
) -> None:
    link(hub, "admin", provider.issuer, "s-1")
    provider.metadata = {"authorization_response_iss_parameter_supported": True}
    with browser(hub, provider.issuer) as client:
        assert answer_of(client, provider).status_code == 401
        back = provider.authorize(client.get(START, headers=HTML).headers["Location"])
        assert client.get(f"{back}&iss={provider.issuer}", headers=HTML).status_code == 303


def test_a_provider_may_change_its_keys(
    hub: Hub, provider: StrictProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    link(hub, "admin", provider.issuer, "s-1")
    with browser(hub, provider.issuer) as client:
        assert answer_of(client, provider).status_code == 303
        provider.rotate()
        assert answer_of(client, provider).status_code == 401  # asked a moment ago
        assert provider.seen.count("/keys") == 1
        monkeypatch.setattr(oidc, "KEYS_AT_MOST_EVERY_S", 0)
        assert answer_of(client, provider).status_code == 303


@pytest.mark.parametrize(
    ("path", "reply"),
    [
        ("/.well-known/openid-configuration", (500, b"{}")),
        ("/.well-known/openid-configuration", (302, b"{}")),
        ("/.well-known/openid-configuration", (200, b"[]")),
        ("/.well-known/openid-configuration", (200, b"<html>")),
        ("/.well-known/openid-configuration", (200, b'{"issuer": "http://evil.example"}')),
        ("/token", (500, b"{}")),
        ("/token", (200, b"{}")),
        ("/token", (200, b" " * (oidc.MAX_BYTES + 1))),
        ("/keys", (200, b'{"keys": 1}')),
        ("/keys", (200, b"{}")),
    ],
)
def test_a_provider_that_fails_is_a_502_and_signs_nobody_in(
    hub: Hub, provider: StrictProvider, path: str, reply: tuple[int, bytes]
) -> None:
    link(hub, "admin", provider.issuer, "s-1")
    provider.replies[path] = reply
    with browser(hub, provider.issuer) as client:
        answer = client.get(START, headers=HTML)
        if answer.status_code == 303:
            answer = client.get(provider.authorize(answer.headers["Location"]), headers=HTML)
        assert (answer.status_code, who(client)) == (502, 401)


def test_a_provider_that_is_away_keeps_nobody_from_a_password(hub: Hub) -> None:
    with browser(hub, "http://127.0.0.1:1") as client:
        assert client.get("/login").status_code == 200
        answer = client.get(START, headers=HTML)
        assert (answer.status_code, "cannot be reached" in answer.text) == (502, True)


def test_secrets_go_only_where_they_are_safe(hub: Hub, provider: StrictProvider) -> None:
    provider.metadata = {"token_endpoint": "http://plain.example/token"}
    with browser(hub, provider.issuer) as client:
        assert answer_of(client, provider).status_code == 502


@pytest.mark.parametrize("next", ["https://evil.example", "//evil.example", "/\\evil.example"])
def test_nobody_is_sent_elsewhere_afterwards(hub: Hub, provider: StrictProvider, next: str) -> None:
    link(hub, "admin", provider.issuer, "s-1")
    with browser(hub, provider.issuer) as client:
        assert answer_of(client, provider, f"{START}?next={next}").headers["Location"] == "/"


def test_a_way_in_is_added_in_the_settings_and_taken_out(
    hub: Hub, provider: StrictProvider
) -> None:
    with browser(hub, provider.issuer) as client, browser(hub, provider.issuer) as other:
        form(client, "/login", token=hub.admin_token or "")
        _, eve = make_user(hub, "eve", users.Scope.ADMIN)
        form(other, "/login", token=eve)
        text = client.get("/settings", headers=HTML).text
        address = text.split('href="/login/oidc?link=')[1].split('"')[0]
        theirs = other.get(f"{START}?link={address}", headers=HTML)
        assert theirs.status_code == 403
        assert client.get(f"{START}?link=x", headers=HTML).status_code == 403
        assert answer_of(client, provider, f"{START}?link={address}").headers["Location"] == (
            "/settings"
        )
        form(client, "/logout")
        assert answer_of(client, provider).headers["Location"] == "/"
        assert client.get("/api/whoami-v2").json()["name"] == "admin"

        text = other.get("/settings", headers=HTML).text
        address = text.split('href="/login/oidc?link=')[1].split('"')[0]
        taken = answer_of(other, provider, f"{START}?link={address}")
        assert (taken.status_code, "another user" in taken.text) == (409, True)
        assert form(other, "/settings/identities/1/remove")[0] == 404
        assert form(client, "/settings/identities/1/remove")[0] == 422  # the only way in
        assert form(client, "/settings/password", password=RIGHT)[0] == 303
        assert form(client, "/settings/identities/1/remove") == (303, "/settings")
        form(client, "/logout")
        assert answer_of(client, provider).status_code == 401


def test_nothing_is_linked_after_signing_out(hub: Hub, provider: StrictProvider) -> None:
    with browser(hub, provider.issuer) as client:
        form(client, "/login", token=hub.admin_token or "")
        text = client.get("/settings", headers=HTML).text
        address = text.split('href="/login/oidc?link=')[1].split('"')[0]
        away = client.get(f"{START}?link={address}", headers=HTML).headers["Location"]
        form(client, "/logout")
        assert client.get(provider.authorize(away), headers=HTML).status_code == 401
    with hub.db.read() as session:
        assert session.exec(select(Identity)).all() == []


def test_an_invitation_is_accepted_through_the_provider(hub: Hub, provider: StrictProvider) -> None:
    with browser(hub, provider.issuer) as client:
        form(client, "/login", token=hub.admin_token or "")
        text = client.post("/settings/users/invite", headers=HTML).text
        form(client, "/logout")
        invitation = link_in(text)
        assert "Join with Acme ID" in client.get(invitation, headers=HTML).text
        code = invitation.partition("=")[2]
        for expected in (f"{START}/name", None):
            before = n_users(hub)
            answer = answer_of(client, provider, f"{START}?code={code}")
            assert answer.headers.get("Location") == (expected or "/")
            if expected is not None:
                assert form(client, f"{START}/name", name="ada")[0] == 303
                assert n_users(hub) == before + 1
        provider.claims = {"sub": "s-2"}
        assert answer_of(client, provider, f"{START}?code={code}").status_code == 303
        assert form(client, f"{START}/name", name="bob")[0] == 404


def test_a_link_for_a_new_password_makes_no_account(hub: Hub, provider: StrictProvider) -> None:
    with hub.db.write() as session:
        admin = users.find_user(session, "admin")
        code = invitations.reset(session, admin, admin)
    with browser(hub, provider.issuer) as client:
        assert answer_of(client, provider, f"{START}?code={code}").status_code == 303
        assert form(client, f"{START}/name", name="ada")[0] == 404
    with hub.db.read() as session:
        assert session.exec(select(Identity)).all() == []


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"oidc_issuer": "http://id.example", "oidc_client_id": "x"}, "begins with https://"),
        ({"oidc_issuer": "https://id.example"}, "needs GRAFT_OIDC_CLIENT_ID"),
        ({"oidc_client_id": "x"}, "needs GRAFT_OIDC_ISSUER"),
    ],
)
def test_a_provider_that_is_half_set_keeps_the_hub_from_starting(
    settings: dict[str, str], why: str
) -> None:
    with pytest.raises(CannotStart, match=why):
        create_app(Settings(**settings))  # type: ignore[arg-type]


def test_a_hub_without_a_provider_has_no_such_page(client: TestClient) -> None:
    assert client.get(START, headers=HTML).status_code == 404
    assert client.get(f"{START}/callback", headers=HTML).status_code == 404
