"""`graft admin`: upkeep of a hub's data folder by whoever runs it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import accounts, quotas, upkeep
from cli.connection import connection
from cli.console import CommandError, count_progress, err, out, print_json
from cli.serve import load_settings

if TYPE_CHECKING:
    from hub.context import Hub


def register(app: typer.Typer) -> None:
    admin = typer.Typer(no_args_is_help=True)
    admin.callback()(_upkeep)
    admin.command()(reindex)
    admin.command()(mirror)
    upkeep.register(admin)
    quotas.register(admin)
    accounts.register(admin)
    app.add_typer(admin, name="admin")


def _upkeep() -> None:
    """Upkeep of a hub's data."""


def reindex(
    data: Annotated[Path | None, typer.Option(help="Folder of the hub's data (data).")] = None,
    from_blobs: Annotated[
        bool,
        typer.Option("--from-blobs", help="The catalogue is lost: repos and commits as well."),
    ] = False,
) -> None:
    """Make the catalogue anew from the files: facts, hashes, pictures, search.

    Nothing that was published is changed. With SQLite the hub must be stopped.
    """
    settings = load_settings(data_dir=data)
    store = settings.data_dir / "store"
    if from_blobs and settings.database_url is None and not store.exists():
        raise CommandError(f"there is no hub in {settings.data_dir}")
    from hub.adapters import service
    from hub.context import open_hub

    with (
        upkeep.refusals(),
        open_hub(settings) if from_blobs else upkeep.hub_of(data, to_write=True) as hub,
        count_progress("Reading", None, "repos") as progress,
    ):
        bar = progress.task_ids[0]

        def report(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        if from_blobs:
            _rebuild(hub)
        n = service.reindex(hub, report)
    out.print(f"{n} {'repo' if n == 1 else 'repos'} read anew")


def mirror(
    repo: Annotated[str, typer.Argument(help="namespace/name or hf://namespace/name")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Fetch a repo of the hub that this one mirrors, or what is new in it.

    Asks the running hub, with an administrator's token.
    """
    made = connection().post("/api/mirrors", {"repo": repo.removeprefix("hf://")})
    if as_json:
        print_json(made)
    else:
        out.print(f"{made['repo']} is at {made['commit'][:12]}: {made['message']}", markup=False)


def _rebuild(hub: "Hub") -> None:
    from hub.upkeep.rebuild import NotEmpty, rebuild

    try:
        made = rebuild(hub)
    except NotEmpty as error:
        raise CommandError(error.message) from error
    out.print(f"{made.repos} repos and {made.commits} commits are back")
    for what, names in (("repos", made.lost_repos), ("commits", made.lost_commits)):
        if names:
            err.print(f"{len(names)} {what} lack bytes: {', '.join(names)}", markup=False)
    if made.unsigned:
        err.print(
            f"{made.unsigned} manifests are not signed with this hub's secret.key", markup=False
        )
