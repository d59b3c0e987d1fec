"""`graft admin token` and `graft admin audit`: a way in for whoever runs the hub, and its log."""

from dataclasses import asdict
from datetime import timedelta
from enum import StrEnum
from typing import Annotated

import typer

from cli.console import CommandError, out, plain, print_json
from cli.upkeep import AsJson, Data, hub_of


class Scope(StrEnum):
    READ = "read"
    WRITE = "write"
    ADMIN = "admin"


def register(admin: typer.Typer) -> None:
    admin.command()(token)
    audit = typer.Typer(no_args_is_help=True)
    audit.callback()(_audit)
    audit.command()(verify)
    audit.command("list")(list_entries)
    admin.add_typer(audit, name="audit")


def token(
    user: Annotated[str, typer.Argument(help="A user of this hub.")],
    scope: Annotated[Scope, typer.Option(help="What it may do.")] = Scope.ADMIN,
    days: Annotated[int, typer.Option(min=1, max=3650, help="Until it ends.")] = 1,
    data: Data = None,
) -> None:
    """Print a new token of a user, for whoever lost every other way in.

    With SQLite the hub must be stopped.
    """
    from hub.db import now
    from hub.users import models
    from hub.users import service as users

    with hub_of(data, to_write=True) as hub, hub.db.write() as session:
        found = users.find_user(session, user)
        if found.is_disabled:
            raise CommandError(f"{found.name} is disabled")
        secret = users.issue_token(
            session,
            found,
            "graft admin token",
            models.Scope(scope),
            expires_at=now() + timedelta(days=days),
        )
    out.print(plain(secret))


def _audit() -> None:
    """Who did what on this hub."""


def verify(
    expect: Annotated[
        str | None,
        typer.Option(help="A last hash noted earlier, which must still be in the log."),
    ] = None,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Recompute every hash of the log; exit 1 if a row was changed or removed."""
    from hub import audit

    with hub_of(data, to_write=False) as hub, hub.db.read() as session:
        chain = audit.verify(session, expect)
    if as_json:
        print_json(asdict(chain) | {"sound": chain.is_sound})
        raise typer.Exit(0 if chain.is_sound else 1)
    if chain.broken is not None:
        raise CommandError(f"row {chain.broken} was changed, or the row before it was removed")
    if chain.has_expected is False:
        raise CommandError(f"no row has the hash {expect}: the log was cut off or written anew")
    out.print(plain(f"{chain.rows} rows are as they were written; the last hash is {chain.head}"))


def list_entries(
    user: Annotated[str | None, typer.Option(help="Only what this user did.")] = None,
    action: Annotated[str, typer.Option(help="Only this, or a group such as token.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="How many rows.")] = 50,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Print the log, newest first."""
    from hub.users.audit_routes import page_of

    with hub_of(data, to_write=False) as hub, hub.db.read() as session:
        page = page_of(session, user=user, action=action, before=None, limit=limit)
    if as_json:
        print_json([entry.model_dump(mode="json") for entry in page.items])
        return
    for entry in page.items:
        who = entry.user or "-"
        out.print(
            plain(
                f"{entry.id}  {entry.at:%Y-%m-%d %H:%M:%S}  {who}  {entry.action}  {entry.subject}"
            )
        )
