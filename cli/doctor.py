"""`graft doctor`: what to know before trusting a hub with files."""

from pathlib import Path
from typing import Annotated

import typer

from cli.console import CommandError, out, plain, print_json
from cli.serve import load_settings

_STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "failed": "bold red"}


def register(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor(
    data: Annotated[Path | None, typer.Option(help="Folder of the hub's data (data).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check the data folder, the database, the store of the files and the clock; change nothing.

    The hub may be running. A bucket is tried with objects that are removed again.
    """
    settings = load_settings(data_dir=data)
    from hub.doctor import Level, examine

    found = []
    for finding in examine(settings):
        found.append(finding)
        if not as_json:
            style = _STYLES[finding.level]
            check, message = plain(finding.check), plain(finding.message)
            out.print(f"[{style}]{finding.level:<8}[/]{check:<14}{message}")
    if as_json:
        print_json([{"check": f.check, "level": f.level, "message": f.message} for f in found])
    failed = sum(finding.level == Level.FAILED for finding in found)
    if failed:
        raise CommandError(f"{failed} of {len(found)} checks failed")
