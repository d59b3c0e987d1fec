"""Which user a provider's subject is; never decided by an e-mail address or a name."""

from sqlmodel import Session, col, select

from hub.audit import record
from hub.errors import BadField, IdentityTaken, UserNotFound
from hub.users import passwords
from hub.users.models import Identity, User
from hub.users.oidc import Person


def owner(session: Session, person: Person) -> User | None:
    """The user of a provider's subject, or None."""
    row = _find(session, person)
    return session.get(User, row.user_id) if row is not None else None


def of(session: Session, user: User) -> list[Identity]:
    """What the user can sign in with, oldest first."""
    query = select(Identity).where(Identity.user_id == user.id).order_by(col(Identity.id))
    return list(session.exec(query))


def link(session: Session, user: User, person: Person) -> None:
    """From now on this subject is this user; IdentityTaken if it is another already."""
    row = _find(session, person)
    if row is not None and row.user_id != user.id:
        raise IdentityTaken("this sign-in belongs to another user of the hub")
    if row is None:
        assert user.id is not None
        session.add(
            Identity(
                user_id=user.id,
                issuer=person.issuer,
                subject=person.subject,
                name=person.name or person.full_name,
            )
        )
        session.flush()
        record(session, user.id, "identity.link", f"{user.name}: {person.issuer}")


def unlink(session: Session, user: User, identity_id: int) -> None:
    """BadField if it is the only way in that the user has beside tokens."""
    row = session.get(Identity, identity_id)
    if row is None or row.user_id != user.id:
        raise UserNotFound(f"{user.name} has no such sign-in")
    if len(of(session, user)) == 1 and not passwords.exists(session, user):
        raise BadField("set a password first: this is your only way to sign in", "identity")
    session.delete(row)
    record(session, user.id, "identity.unlink", f"{user.name}: {row.issuer}")


def _find(session: Session, person: Person) -> Identity | None:
    query = select(Identity).where(
        Identity.issuer == person.issuer, Identity.subject == person.subject
    )
    return session.exec(query).first()
