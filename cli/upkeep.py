"""`graft admin fsck|gc|backup|restore`: what keeps a hub's data whole."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.console import CommandError, WrongUsage, byte_progress, out, plain, print_json
from cli.serve import load_settings

if TYPE_CHECKING:
    from hub.context import Hub
    from hub.upkeep.findings import Finding
    from hub.upkeep.gc import Blobs

Data = Annotated[Path | None, typer.Option(help="Folder of the hub's data (data).")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document.")]


def register(admin: typer.Typer) -> None:
    admin.command()(fsck)
    admin.command()(gc)
    admin.command()(backup)
    admin.command()(restore)


def fsck(
    data: Data = None,
    full: Annotated[bool, typer.Option(help="Read and hash every byte of the store.")] = False,
    accept: Annotated[
        bool, typer.Option(help="After a restore: if all is well, blobs may be collected again.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check that everything the hub promised is there; changes nothing.

    The hub may run meanwhile. Exit status 1 if something is wrong.
    """
    from hub.upkeep import fsck as checks

    if accept and not full:
        raise WrongUsage("--accept needs --full")
    label = "Reading" if full else "Checking"
    with hub_of(data, to_write=accept) as hub, _bytes(label) as report:
        found = checks.fsck(hub, full=full, report=report)
        sound = checks.is_sound(found)
        if accept and sound:
            checks.accept(hub)
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


def gc(
    data: Data = None,
    delete: Annotated[bool, typer.Option(help="Do it; without it only say what would go.")] = False,
    confirm: Annotated[
        int | None, typer.Option(help="That this many blobs may go, where that is very many.")
    ] = None,
    without_backup: Annotated[
        bool, typer.Option("--without-backup", help="Although there is no recent backup.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Collect bytes that nothing refers to: condemn them now, delete them a day later.

    With --delete on SQLite the hub must be stopped.
    """
    from hub.upkeep import gc as collection

    with hub_of(data, to_write=delete) as hub:
        planned = collection.plan(hub)
        brake = collection.brake(hub, planned, confirm=confirm, without_backup=without_backup)
        if delete:
            planned = collection.collect(
                hub, planned, confirm=confirm, without_backup=without_backup
            )
    if as_json:
        print_json({"done": delete, "refused": brake} | planned.to_json())
        return
    said = ("condemned", "deleted") if delete else ("would be condemned", "would be deleted")
    _print_blobs(said[0], planned.condemn)
    _print_blobs(f"without a row {said[0]}", planned.orphans)
    _print_blobs(said[1], planned.delete)
    _print_blobs(f"left by an interrupted run {said[1]}", planned.unfinished)
    if not delete:
        out.print("Nothing was changed; --delete does it." if brake is None else plain(brake))
    elif not (planned.condemn or planned.orphans or planned.delete or planned.unfinished):
        out.print("There is nothing to collect.")


def backup(
    folder: Annotated[Path, typer.Argument(help="Where the snapshots and blobs are kept.")],
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Copy the catalogue, then every blob that the folder does not have yet; the hub may run.

    A catalogue on PostgreSQL needs pg_dump. Exit status 1 if the hub had lost blobs.
    """
    from hub.upkeep import backup as backups

    with hub_of(data, to_write=False) as hub, _bytes("Copying") as report:
        made = backups.backup(hub, folder, report)
    if as_json:
        print_json(made.to_json())
    else:
        out.print(f"{made.name}: {made.blobs} blobs, {made.copied} of them new")
    _fail_for(made.lost, "the hub itself has lost or damaged")


def restore(
    folder: Annotated[Path, typer.Argument(help="What `graft admin backup` wrote.")],
    data: Data = None,
    snapshot: Annotated[str | None, typer.Option(help="Its name (the latest).")] = None,
    revoke_tokens: Annotated[
        bool, typer.Option("--revoke-tokens", help="Nobody may use an old token or login.")
    ] = False,
    blobs: Annotated[
        bool, typer.Option("--blobs", help="Only give a hub back the blobs that it has lost.")
    ] = False,
) -> None:
    """Make a hub from a backup in an empty folder.

    Nothing is collected in it until `graft admin fsck --full --accept` has passed.
    """
    from hub.errors import HubError
    from hub.upkeep import restore as bringing_back

    if blobs:
        with hub_of(data, to_write=False) as hub, _bytes("Reading") as report:
            n, lost = bringing_back.mend(hub, folder, report)
        out.print(f"{n} blobs put back")
    else:
        settings = load_settings(data_dir=data)
        try:
            chosen = bringing_back.choose(folder, snapshot)
            with _bytes("Copying") as report:
                lost = bringing_back.restore(
                    settings, folder, chosen, revoke_tokens=revoke_tokens, report=report
                )
        except HubError as error:
            raise CommandError(error.message) from error
        out.print(f"{chosen.name} is back; check it with `graft admin fsck --full --accept`")
    _fail_for(lost, "the backup lacks")


def _fail_for(lost: Sequence[str], what: str) -> None:
    if lost:
        raise CommandError(f"{what} {len(lost)} blobs: {', '.join(lost)}")


@contextmanager
def _bytes(label: str) -> Iterator[Callable[[int, int], None]]:
    """Bytes done and in all, as a bar."""
    with byte_progress(label, None) as progress:
        bar = progress.task_ids[0]
        yield lambda done, total: progress.update(bar, completed=done, total=total)


def _print_blobs(what: str, blobs: "Blobs") -> None:
    if blobs:
        out.print(f"{len(blobs)} blobs of {sum(blobs.sizes.values()):,} bytes {what}")


@contextmanager
def hub_of(data: Path | None, *, to_write: bool) -> Iterator["Hub"]:
    """The hub of a folder; one that is only read may be running. Refusals are one sentence."""
    from hub.context import look_into_hub, open_hub

    settings = load_settings(data_dir=data)
    if settings.database_url is None and not (settings.data_dir / "hub.sqlite3").exists():
        raise CommandError(f"there is no hub in {settings.data_dir}")
    with refusals():
        if to_write and settings.database_url is not None:
            # To open an empty database would make a hub in it.
            with look_into_hub(settings):
                pass
        with open_hub(settings) if to_write else look_into_hub(settings) as hub:
            yield hub


@contextmanager
def refusals() -> Iterator[None]:
    """What the hub, its database or its store refuses becomes one sentence."""
    from sqlalchemy.exc import DatabaseError, OperationalError

    from hub.errors import HubError

    try:
        yield
    except HubError as error:
        raise CommandError(error.message) from error
    except DatabaseError as error:
        # These two are the database's fault: it is damaged or away. Others would be ours.
        if type(error) not in (DatabaseError, OperationalError):
            raise
        raise CommandError(f"the catalogue failed: {error.orig}") from error
