"""What every command prints with: results on stdout, progress and errors on stderr."""

import json
import sys
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)


class CommandError(Exception):
    """A failure the user can act on; its message is the one sentence that is printed."""


class WrongUsage(CommandError):
    """What was typed cannot be meant, whatever the files hold."""


def print_json(value: Any) -> None:
    """One JSON document on stdout, never styled, so that a script can read it."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")


def fail(message: str, status: int = 1) -> NoReturn:
    """Print one sentence on stderr and leave."""
    err.print(f"[bold red]error:[/] {plain(message)}")
    raise SystemExit(status)


def plain(message: str) -> str:
    # Names inside messages come from files and servers: no terminal escapes, no Rich markup.
    text = "".join(
        c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in message
    )
    return text.replace("[", r"\[")


def n_files(files: Sized) -> str:
    """How many there are, in words."""
    return "1 file" if len(files) == 1 else f"{len(files)} files"


@contextmanager
def count_progress(label: str, total: int | None, unit: str = "") -> Iterator[Progress]:
    """A bar that counts things, with an ETA; silent when stderr is not a terminal."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=err, transient=False, disable=not err.is_terminal) as progress:
        progress.add_task(label, total=total, note="")
        yield progress


@contextmanager
def byte_progress(label: str, total: int | None, *, is_kept: bool = True) -> Iterator[Progress]:
    """A bar in bytes with rate and ETA; silent when stderr is not a terminal.

    One that is not kept goes when it is full.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=err, transient=not is_kept, disable=not err.is_terminal
    ) as progress:
        progress.add_task(label, total=total)
        yield progress
