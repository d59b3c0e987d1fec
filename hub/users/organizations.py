"""Members of organisations: who they are, what they may do, coming and going."""

from dataclasses import dataclass

from sqlmodel import Session, col, select

from hub.audit import record
from hub.errors import Forbidden, LastAdmin, UserNotFound
from hub.users.models import Membership, Organization, Role, User
from hub.users.names import key_of
from hub.users.service import Viewer, find_user, has_role, may_manage


@dataclass(frozen=True, slots=True)
class Member:
    name: str
    full_name: str
    role: Role
    is_disabled: bool


def find(session: Session, name: str) -> Organization:
    """UserNotFound."""
    query = select(Organization).where(Organization.key == key_of(name))
    found = session.exec(query).first()
    if found is None:
        raise UserNotFound(f"there is no organisation {name[:96]!r}")
    return found


def members(session: Session, viewer: Viewer, name: str) -> list[Member]:
    """By name, for members of the organisation; Forbidden, UserNotFound."""
    organization = find(session, name)
    viewer.require_user()
    if not (viewer.covers(name) and has_role(session, viewer, name, tuple(Role))):
        raise Forbidden(f"only members see who is in {organization.name}")
    return [
        Member(user.name, user.full_name, role, user.is_disabled)
        for user, role in everybody(session, organization)
    ]


def everybody(session: Session, organization: Organization) -> list[tuple[User, Role]]:
    """The members by name, whoever asks."""
    query = (
        select(User, Membership.role)
        .join(Membership, col(Membership.user_id) == col(User.id))
        .where(Membership.organization_id == organization.id)
        .order_by(User.key)
    )
    return [(user, Role(role)) for user, role in session.exec(query)]


def set_role(session: Session, viewer: Viewer, name: str, member: str, role: Role) -> None:
    """Make a user a member, or change what they may do; Forbidden, UserNotFound, LastAdmin."""
    organization, user = _managed(session, viewer, name), find_user(session, member)
    assert user.id is not None
    assert organization.id is not None
    found = session.get(Membership, (user.id, organization.id))
    if found is None:
        found = Membership(user_id=user.id, organization_id=organization.id)
    elif role != Role.ADMIN:
        _require_another_admin(session, organization, user)
    found.role = role
    session.add(found)
    detail = f"{organization.name}: {user.name} ({role})"
    record(session, viewer.user_id, "organization.member", detail)


def remove(session: Session, viewer: Viewer, name: str, member: str) -> None:
    """Take a member out; everybody may take out themselves. Forbidden, UserNotFound, LastAdmin."""
    user = find_user(session, member)
    if user.id == viewer.user_id:
        viewer.require_account()
        organization = find(session, name)
    else:
        organization = _managed(session, viewer, name)
    assert user.id is not None
    assert organization.id is not None
    found = session.get(Membership, (user.id, organization.id))
    if found is None:
        raise UserNotFound(f"{user.name} is not in {organization.name}")
    _require_another_admin(session, organization, user)
    session.delete(found)
    detail = f"{organization.name}: {user.name}"
    record(session, viewer.user_id, "organization.remove", detail)


def _managed(session: Session, viewer: Viewer, name: str) -> Organization:
    organization = find(session, name)
    if not may_manage(session, viewer, name):
        raise Forbidden(
            f"changing the members of {organization.name} takes one of its administrators and a"
            " token with scope admin"
        )
    return organization


def _require_another_admin(session: Session, organization: Organization, user: User) -> None:
    """LastAdmin if nobody who can sign in would be left to manage the organisation."""
    # The lock makes two administrators who leave at the same moment wait for each other.
    session.exec(
        select(Organization).where(Organization.id == organization.id).with_for_update()
    ).one()
    admins = session.exec(
        select(Membership.user_id)
        .join(User, col(User.id) == col(Membership.user_id))
        .where(
            Membership.organization_id == organization.id,
            Membership.role == Role.ADMIN,
            col(User.is_disabled).is_(False),
        )
    ).all()
    if list(admins) == [user.id]:
        raise LastAdmin(
            f"{user.name} is the last administrator of {organization.name}: name another one first"
        )
