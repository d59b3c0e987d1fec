"""Users, organisations, tokens."""

from datetime import timedelta

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlmodel import Session, select

from hub.audit import Audit, broken_link, verify
from hub.context import Hub
from hub.db import now
from hub.errors import BadField, BadName, Forbidden, NameTaken, Unauthorized, UserNotFound
from hub.users import service as users
from hub.users.models import Membership, Role, Scope, Token
from hub.users.service import ANONYMOUS, Viewer
from tests.hub.conftest import both_databases, make_user

pytestmark = both_databases


def test_only_the_hash_of_a_token_is_kept(hub: Hub) -> None:
    _, secret = make_user(hub, "ada")
    assert secret.startswith("graft_")
    with hub.db.read() as session:
        rows = [row.model_dump() for row in session.exec(select(Token))]
    assert secret not in str(rows)
    assert secret.removeprefix("graft_") not in str(rows)


def test_a_token_says_who_and_what(hub: Hub) -> None:
    reader, _ = make_user(hub, "ada", Scope.READ)
    assert reader.user is not None
    assert (reader.user.name, reader.scope) == ("ada", "read")
    with pytest.raises(Forbidden, match="only read"):
        reader.require_write()
    with pytest.raises(Unauthorized):
        ANONYMOUS.require_write()


@pytest.mark.parametrize("secret", ["", "graft_", "graft_" + "A" * 43, "hf_" + "x" * 34])
def test_an_unknown_token_is_refused(hub: Hub, secret: str) -> None:
    with hub.db.read() as session, pytest.raises(Unauthorized, match="Invalid credentials"):
        users.viewer_of(session, secret)


def test_an_expired_token_is_refused(hub: Hub) -> None:
    viewer, _ = make_user(hub, "ada")
    assert viewer.user is not None
    with hub.db.write() as session:
        old = users.issue_token(
            session, viewer.user, "old", expires_at=now() - timedelta(seconds=1)
        )
        new = users.issue_token(session, viewer.user, "new", expires_at=now() + timedelta(hours=1))
    with hub.db.read() as session:
        assert users.viewer_of(session, new).user_id == viewer.user_id
        with pytest.raises(Unauthorized):
            users.viewer_of(session, old)
        assert [token.name for token in users.tokens(session, viewer.user)] == ["new", "test"]


def test_a_revoked_token_is_refused_also_in_a_request_that_has_begun(hub: Hub) -> None:
    viewer, secret = make_user(hub, "ada")
    assert viewer.user is not None
    assert viewer.token_id is not None
    with hub.db.write() as session:
        users.revoke_token(session, viewer.user, viewer.token_id)
        with pytest.raises(Unauthorized):
            users.recheck(session, viewer)
    with hub.db.read() as session, pytest.raises(Unauthorized):
        users.viewer_of(session, secret)


def test_an_administrator_who_was_demoted_since_the_request_began_is_none(
    hub: Hub, admin: Viewer
) -> None:
    with hub.db.write() as session:
        user = users.find_user(session, "admin")
        user.is_admin = False
        session.add(user)
    with hub.db.write() as session:
        assert admin.is_admin
        assert not users.recheck(session, admin).is_admin


def test_nobody_revokes_the_token_of_another(hub: Hub, admin: Viewer) -> None:
    viewer, _ = make_user(hub, "ada")
    assert viewer.user is not None
    assert admin.token_id is not None
    with hub.db.write() as session, pytest.raises(UserNotFound):
        users.revoke_token(session, viewer.user, admin.token_id)


def test_a_disabled_user_is_refused(hub: Hub) -> None:
    _, secret = make_user(hub, "ada")
    with hub.db.write() as session:
        user = users.find_user(session, "ADA")
        user.is_disabled = True
        session.add(user)
    with hub.db.read() as session, pytest.raises(Unauthorized):
        users.viewer_of(session, secret)


@pytest.mark.parametrize("name", ["Ada", "ADA", "ada"])
def test_a_name_is_given_once_whatever_its_case_and_kind(
    hub: Hub, admin: Viewer, name: str
) -> None:
    make_user(hub, "Ada")
    assert admin.user is not None
    with hub.db.write() as session:
        with pytest.raises(NameTaken):
            users.create_user(session, name)
        with pytest.raises(NameTaken):
            users.create_organization(session, name, admin.user)


@pytest.mark.parametrize("name", ["api", "Settings", "healthz", "datasets"])
def test_an_address_of_the_hub_is_no_user(hub: Hub, name: str) -> None:
    with hub.db.write() as session, pytest.raises(BadName, match="address of the hub"):
        users.create_user(session, name)


def test_a_token_needs_a_name(hub: Hub, admin: Viewer) -> None:
    assert admin.user is not None
    with hub.db.write() as session, pytest.raises(BadField):
        users.issue_token(session, admin.user, "")


def test_an_unknown_user_is_not_found(hub: Hub) -> None:
    with hub.db.read() as session, pytest.raises(UserNotFound, match="'nobody'"):
        users.find_user(session, "nobody")


@pytest.mark.parametrize(
    ("role", "reads", "writes"),
    [(Role.READER, True, False), (Role.WRITER, True, True), (Role.ADMIN, True, True)],
)
def test_members_of_an_organisation_act_by_their_role(
    hub: Hub, role: Role, reads: bool, writes: bool
) -> None:
    owner, _ = make_user(hub, "ada")
    member, _ = make_user(hub, "bob")
    stranger, _ = make_user(hub, "eve")
    assert owner.user is not None
    assert member.user is not None
    with hub.db.write() as session:
        acme = users.create_organization(session, "Acme", owner.user)
        session.add(Membership(user_id=member.user_id, organization_id=acme.id, role=role))
    with hub.db.read() as session:
        assert users.organizations(session, member.user)[0][1] is role
        assert users.may_read_private(session, member, "acme") is reads
        assert users.may_write(session, member, "ACME") is writes
        assert users.may_write(session, owner, "acme")
        assert not users.may_read_private(session, stranger, "acme")
        assert not users.may_write(session, stranger, "acme")
        assert not users.may_write(session, Viewer(owner.user, Scope.READ), "acme")


def test_the_audit_chain_shows_a_changed_row(hub: Hub) -> None:
    make_user(hub, "ada")
    with hub.db.read() as session:
        assert broken_link(session) is None
        actions = [row.action for row in session.exec(select(Audit).order_by("id"))]
    assert actions == ["user.create", "token.issue"] * 2
    with hub.db.write() as session:
        allow_changes_of_the_log(session)
        row = session.get_one(Audit, 2)
        row.subject = "admin: nothing (read)"
        session.add(row)
    with hub.db.read() as session:
        assert broken_link(session) == 2


def allow_changes_of_the_log(session: Session) -> None:
    """As whoever may change the database itself can."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("ALTER TABLE audit DISABLE TRIGGER USER"))
    else:
        session.execute(text("DROP TRIGGER audit_no_update"))
        session.execute(text("DROP TRIGGER audit_no_delete"))


@pytest.mark.parametrize("change", ["UPDATE audit SET subject = 'x'", "DELETE FROM audit"])
def test_the_database_refuses_to_change_the_log(hub: Hub, change: str) -> None:
    with pytest.raises(DBAPIError, match="only added to"), hub.db.write() as session:
        session.execute(text(change))
    with hub.db.read() as session:
        assert verify(session).rows == 2


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ("UPDATE audit SET user_id = 7 WHERE id = 3", 3),
        ("UPDATE audit SET action = 'x' WHERE id = 1", 1),
        ("UPDATE audit SET previous = '' WHERE id = 4", 4),
        ("DELETE FROM audit WHERE id = 1", 2),
        ("DELETE FROM audit WHERE id = 3", 4),
    ],
)
def test_every_change_of_the_log_shows(hub: Hub, change: str, broken: int) -> None:
    make_user(hub, "ada")
    with hub.db.write() as session:
        allow_changes_of_the_log(session)
        session.execute(text(change))
    with hub.db.read() as session:
        found = verify(session)
        assert (found.broken, found.is_sound) == (broken, False)


def test_rows_taken_from_the_end_show_against_a_hash_that_was_noted(hub: Hub) -> None:
    make_user(hub, "ada")
    with hub.db.read() as session:
        noted = verify(session).head
    make_user(hub, "bob")
    with hub.db.read() as session:
        assert verify(session, noted).is_sound
        assert not verify(session, "0" * 64).is_sound
    with hub.db.write() as session:
        allow_changes_of_the_log(session)
        session.execute(text("DELETE FROM audit WHERE id >= 4"))
    with hub.db.read() as session:
        assert verify(session).is_sound
        assert not verify(session, noted).is_sound
