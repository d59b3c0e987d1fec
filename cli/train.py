"""`graft train` and `graft publish`: run, show and send; the work is in `train`."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cli.connection import connection, explained
from cli.console import CommandError, err, n_files, out, print_json
from cli.refs import fetch
from train.errors import TrainError
from train.presets import PRESETS

if TYPE_CHECKING:
    from train.config import TrainConfig
    from train.publish import Published, Target
    from train.result import Result

Guard = Callable[[], AbstractContextManager[None]]
"""Around every use of a target: turns the errors of its client into one sentence."""


def register(app: typer.Typer) -> None:
    app.command()(train)
    app.command()(publish)


def train(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="CONFIG.yaml", help="What to train; docs/training.md explains it."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="New folder for the result; by default ./NAME.")
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="REPO", help="Push the result to namespace/name.")
    ] = None,
    publish: Annotated[
        str | None,
        typer.Option(metavar="S3URL", help="Publish the result under s3://bucket/prefix."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repo private.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an unfinished run.")] = False,
    list_presets: Annotated[
        bool, typer.Option("--list-presets", help="Show what `targets` may name, and stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a LoRA adapter from a YAML file, with samples, scores and a card."""
    if list_presets:
        _list_presets(as_json)
        return
    if config is None:
        raise typer.BadParameter("give a CONFIG.yaml, or --list-presets", param_hint="CONFIG")
    from train.config import BUILT_IN, load_config  # pydantic would slow every command down

    with _one_sentence():
        wish = load_config(config)
        # Credentials that turn out wrong after hours of training are the costliest error there is.
        targets = _targets(wish.name, push, publish, private)
        for target, guard in targets:
            with guard():
                target.check()
        base = None if wish.base == BUILT_IN else fetch(wish.base)
        result = _train(wish, output or Path(wish.name), base, resume)
        published = [_publish(result.folder, target, guard) for target, guard in targets]
    if as_json:
        print_json(_as_json(result, published))
    else:
        _show(result, published)


def publish(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a finished run.")],
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="A repo namespace/name, or s3://bucket/prefix.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Make a new repo private.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was sent as JSON.")] = False,
) -> None:
    """Publish a training result to a hub or to object storage; safe to repeat."""
    with _one_sentence():
        from train.manifest import read_manifest

        name = read_manifest(folder).name
        is_s3 = target.startswith("s3:")
        [(place, guard)] = _targets(
            name, None if is_s3 else target, target if is_s3 else None, private
        )
        published = _publish(folder, place, guard)
    if as_json:
        print_json(_published_json(published))
    elif published.sent:
        out.print(f"{n_files(published.sent)}, {published.bytes_sent:,} bytes sent to ", end="")
        out.print(published.target, style="bold", markup=False)
    else:
        out.print(f"{published.target} already has all of it", markup=False)


def _train(wish: "TrainConfig", output: Path, base: Path | None, resume: bool) -> "Result":
    # transformers says at import that optional packages are missing; nobody can act on that.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with err.status("Loading the training libraries"):
        from diffusers.utils.logging import disable_progress_bar

        from train.sd15 import train as run

    disable_progress_bar()

    with _stop_on_signal() as stopped, _Watcher() as watcher:
        return run(
            wish,
            output,
            resume=resume,
            listener=watcher.see,
            cancelled=stopped,
            base_folder=base,
        )


class _Watcher:
    """Shows a run's events: a bar on a terminal, a line now and then in a log file."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=err,
            disable=not err.is_terminal,
        )
        self._task = self._progress.add_task("preparing", total=None, note="")
        self._last_line = 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def see(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "note":
                self._say(f"note: {event['message']}")
            case "phase":
                self._progress.update(self._task, description=event["what"])
            case "start":
                self._start(event)
            case "step":
                self._step(event)
            case "sample":
                self._say(f"sample of step {event['step']}: {event['path']}")
            case "sample_failed":
                self._say(f"no sample at step {event['step']}: {event['detail']}")

    def _start(self, event: dict[str, Any]) -> None:
        share = event["trainable"] / event["total"]
        self._say(
            f"training {event['trainable']:,} of {event['total']:,} parameters ({share:.2%}) in "
            f"{event['modules']} layers on {event['examples']} images, "
            f"{event['device']} {event['precision']}"
        )
        if event["from_step"]:
            self._say(f"continuing after step {event['from_step']}")
        self._progress.update(
            self._task,
            description=event["name"],
            total=event["steps"],
            completed=event["from_step"],
        )

    def _step(self, event: dict[str, Any]) -> None:
        note = f"loss {event['loss']:.4f}, {_duration(event['eta_s'])} left"
        self._progress.update(self._task, completed=event["step"], note=note)
        is_due = time.monotonic() - self._last_line > 10 or event["step"] == event["steps"]
        if not err.is_terminal and is_due:
            self._last_line = time.monotonic()
            self._say(f"step {event['step']} of {event['steps']}: {note}")

    def _say(self, text: str) -> None:
        self._progress.console.print(text, markup=False)


def _targets(
    name: str, repo: str | None, url: str | None, private: bool
) -> "list[tuple[Target, Guard]]":
    """Where the result goes, each with what explains the errors of its client."""
    targets: list[tuple[Target, Guard]] = []
    if repo is not None:
        if repo.count("/") != 1:
            raise CommandError(f"{repo} is not a repo name: write namespace/name")
        hub = connection()
        api = hub.api()  # before the next import: it decides how huggingface_hub uploads
        from train.targets import HubTarget

        targets.append((HubTarget(api, repo, private), partial(explained, hub, repo)))
    if url is not None:
        from train.targets import s3_target

        targets.append((s3_target(url, name), nullcontext))
    return targets


def _publish(folder: Path, target: "Target", guard: Guard) -> "Published":
    from train.publish import State, publish

    with err.status(f"Publishing to {target.name}") as status, guard():

        def notify(state: State, detail: str) -> None:
            status.update(f"Publishing to {target.name}: {state}, {detail}")

        return publish(folder, target, notify)


@contextmanager
def _one_sentence() -> Iterator[None]:
    try:
        yield
    except TrainError as error:
        raise CommandError(str(error)) from error


@contextmanager
def _stop_on_signal() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C or SIGTERM asks the run to save and stop; the next one ends the process."""
    received: list[int] = []
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        err.print("stopping after this step; once more to stop at once")
        signal.signal(number, previous[signal.Signals(number)])

    for number in previous:
        signal.signal(number, note)
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _list_presets(as_json: bool) -> None:
    if as_json:
        print_json(
            {
                name: {
                    "layers": preset.layers,
                    "good_for": preset.good_for,
                    "sd15_parameters_at_rank_8": preset.sd15_rank8,
                }
                for name, preset in PRESETS.items()
            }
        )
        return
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("targets", "layers", "good for"):
        table.add_column(column)
    table.add_column("SD 1.5 at rank 8", justify="right")
    for name, preset in PRESETS.items():
        millions = f"{preset.sd15_rank8 / 1e6:.2f} M, {decimal(preset.sd15_rank8 * 2)}"
        table.add_row(name, preset.layers, preset.good_for, millions)
    out.print(table)


def _show(result: "Result", published: "list[Published]") -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column()
    size = decimal(result.size_bytes)
    table.add_row("adapter", f"{result.file} ({size})")
    table.add_row("sha256", result.sha256)
    share = result.trainable / result.total
    table.add_row("trained", f"{result.trainable:,} parameters ({share:.2%} of the UNet)")
    for name, value in result.scores.items():
        table.add_row(name.replace("_", " "), f"{value:.3f}")
    table.add_row("samples", str(result.folder / "samples"))
    table.add_row("card", str(result.folder / "README.md"))
    for one in published:
        table.add_row("published", f"{one.target} ({n_files(one.sent)})")
    out.print(table, markup=False)


def _as_json(result: "Result", published: "list[Published]") -> dict[str, Any]:
    return {
        "folder": str(result.folder),
        "file": str(result.file),
        "sha256": result.sha256,
        "size_bytes": result.size_bytes,
        "trainable": result.trainable,
        "total": result.total,
        "scores": result.scores,
        "published": [_published_json(one) for one in published],
    }


def _published_json(published: "Published") -> dict[str, Any]:
    return {
        "target": published.target,
        "sent": list(published.sent),
        "bytes_sent": published.bytes_sent,
    }


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
