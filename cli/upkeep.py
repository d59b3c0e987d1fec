"""`graft admin fsck|gc|backup|restore`: what keeps a hub's data whole."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.console import CommandError, byte_progress, out, plain, print_json
from cli.serve import load_settings

if TYPE_CHECKING:
    from hub.upkeep.findings import Finding

Data = Annotated[Path | None, typer.Option(help="Folder of the hub's data (data).")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document.")]


def register(admin: typer.Typer) -> None:
    admin.command()(fsck)


def fsck(
    data: Data = None,
    full: Annotated[bool, typer.Option(help="Read and hash every byte of the store.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check that everything the hub promised is there; changes nothing.

    The hub may run meanwhile. Exit status 1 if something is wrong.
    """
    from hub.context import look_into_hub
    from hub.upkeep import fsck as checks

    settings = load_settings(data_dir=data)
    label = "Reading" if full else "Checking"
    with _refusals(), look_into_hub(settings) as hub, byte_progress(label, None) as progress:
        bar = progress.task_ids[0]
        found = checks.fsck(
            hub,
            full=full,
            report=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    sound = checks.is_sound(found)
    if as_json:
        print_json({"sound": sound, "findings": [finding.to_json() for finding in found]})
    else:
        _print_findings(found)
        if sound:
            out.print("Everything is there." if full else "Every row has its bytes.")
    if not sound:
        raise typer.Exit(1)


def _print_findings(found: Sequence["Finding"]) -> None:
    for finding in found:
        style = "bold red" if finding.severity == "error" else "dim"
        out.print(f"[{style}]{finding.severity}[/] {finding.promise} {plain(finding.what)}")
        out.print(f"      {plain(finding.advice)}")


@contextmanager
def _refusals() -> Iterator[None]:
    """What the hub refuses, as the one sentence of a failed command."""
    from hub.errors import HubError

    try:
        yield
    except HubError as error:
        raise CommandError(error.message) from error
