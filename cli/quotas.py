"""`graft admin quota`: what users and organisations keep, and may keep."""

import re
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich import filesize
from rich.table import Table

from cli.console import WrongUsage, out, plain, print_json
from cli.upkeep import AsJson, Data, hub_of

if TYPE_CHECKING:
    from hub.limits.quotas import Usage

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kmgt]?)(i?)b?", re.IGNORECASE)


def register(admin: typer.Typer) -> None:
    admin.command()(quota)


def quota(
    namespace: Annotated[
        str | None, typer.Argument(help="User or organisation; all of them without it.")
    ] = None,
    limit: Annotated[
        str | None,
        typer.Option("--set", help="500GB, 2GiB, a number of bytes, 'unlimited' or 'default'."),
    ] = None,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Show what is kept, or say how much may be.

    With SQLite the hub must be stopped for --set; PUT /api/quotas/NAME does it while it runs.
    """
    from hub.limits import quotas
    from hub.users.names import key_of

    if limit is not None and namespace is None:
        raise WrongUsage("--set needs the name of a user or organisation")
    limit_bytes = None if limit is None else _limit(limit)
    key = None if namespace is None else key_of(namespace)
    with hub_of(data, to_write=limit is not None) as hub:
        default = hub.settings.quota_bytes
        if limit is not None and key is not None:
            with hub.db.write() as session:
                quotas.set_limit(session, None, key, limit_bytes)
        with hub.db.read() as session:
            found = list(
                quotas.usages(session, default)
                if key is None
                else [quotas.usage(session, key, default)]
            )
    if as_json:
        print_json([asdict(usage) for usage in found])
    else:
        _print(found)


def _limit(text: str) -> int | None:
    from hub.limits.models import UNLIMITED

    words = {"default": None, "unlimited": UNLIMITED}
    if text.lower() in words:
        return words[text.lower()]
    size = _SIZE.fullmatch(text.strip())
    if size is None:
        raise WrongUsage(f"--set: {text!r} is no size such as 500GB or 2GiB")
    number, unit, binary = size.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(unit.lower() or " "))


def _print(found: "Iterable[Usage]") -> None:
    table = Table("namespace", "keeps", "may keep", box=None)
    for usage in found:
        limit = "unlimited" if usage.limit_bytes is None else filesize.decimal(usage.limit_bytes)
        own = " (default)" if usage.is_default else ""
        table.add_row(plain(usage.namespace), filesize.decimal(usage.used_bytes), limit + own)
    out.print(table)
