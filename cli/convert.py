"""graft convert: an adapter in another dialect, or a pickle as safetensors."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal

from cli.console import CommandError, WrongUsage, err, out, plain, print_json
from cli.refs import adapter_in, fetch, path_of

if TYPE_CHECKING:
    from merge.convert import Converted


class Dialect(StrEnum):
    """What can be written; peft is a folder."""

    KOHYA = "kohya"
    DIFFUSERS = "diffusers"
    PEFT = "peft"
    COMFY = "comfy"


class Algorithm(StrEnum):
    """What others become, where that is exact."""

    LORA = "lora"


# Names that say nothing: the folder's does.
_GENERIC = ("adapter_model", "pytorch_lora_weights")


def register(app: typer.Typer) -> None:
    app.command()(convert)


def convert(
    file: Annotated[
        str,
        typer.Argument(
            help="an adapter: a path, namespace/name[@revision][:file], hf://, s3:// or https://",
            metavar="FILE",
        ),
    ],
    to: Annotated[
        Dialect | None, typer.Option("--to", help="Whose keys to write; peft is a folder.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            metavar="PATH",
            help="The file to write, or the folder for peft; without it here, named after FILE.",
        ),
    ] = None,
    algorithm: Annotated[
        Algorithm | None,
        typer.Option(help="lora makes plain LoRA of other algorithms, where that is exact."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="REF", help="The base that GLoRA needs to become LoRA.")
    ] = None,
    from_pickle: Annotated[
        bool, typer.Option("--from-pickle", help="FILE is a .pt, .bin or .ckpt: as safetensors.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Replace a file that is there.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document")] = False,
) -> None:
    """Write an adapter in another tool's keys, exactly: graft convert ink.safetensors --to diffusers."""
    if from_pickle:
        if to is not None or algorithm is not None or base is not None:
            raise WrongUsage("--from-pickle only unpacks; convert the file it writes")
        _unpack(file, target, force, as_json)
        return
    if to is None:
        raise WrongUsage(f"say what to write: --to {', '.join(Dialect)}")
    from merge.convert import convert as write

    path = adapter_in(fetch(file), file)
    where = _where(target or _beside(path, to), path, force)
    with err.status("converting"):
        done = write(path, where, to, algorithm=algorithm, base=fetch(base) if base else None)
    if as_json:
        print_json({"path": str(where), **done.to_json()})
    else:
        _print(done, where)


def _beside(path: Path, to: Dialect) -> str:
    """ink.safetensors -> ink.diffusers.safetensors, or the folder ink.peft; here."""
    name = path.resolve().parent.name if path.stem in _GENERIC else path.stem
    return f"{name}.{to}" + ("" if to is Dialect.PEFT else path.suffix)


def _where(text: str, source: Path, force: bool) -> Path:
    if Path(text).exists() and Path(text).samefile(source):
        raise CommandError(f"{text} is what the conversion reads; nothing was written")
    return path_of(text, force=force)


def _unpack(file: str, target: str | None, force: bool, as_json: bool) -> None:
    from merge.formats.hashes import sha256_file
    from merge.pickles import from_pickle

    path = fetch(file)
    where = _where(target or f"{path.stem}.safetensors", path, force)
    with err.status("unpacking"):
        kind = from_pickle(path, where)
    digest = sha256_file(where)
    if as_json:
        print_json({"path": str(where), "kind": kind, "sha256": digest})
        return
    out.print(f"{kind}, unpacked in a process of its own")
    out.print(f"output  sha256:{digest}")
    out.print(f"[bold]{plain(str(where))}[/]  {decimal(where.stat().st_size)}")


def _print(done: "Converted", where: Path) -> None:
    family = f", {done.family}" if done.family else ""
    layers = f"{done.layers_read} layers"
    if done.layers_written != done.layers_read:
        layers += f" as {done.layers_written}"
    algorithms = ", ".join(f"{name} ({n})" for name, n in sorted(done.algorithms.items()))
    out.print(f"{done.source_dialect} → {done.dialect}{family}: {layers}, {algorithms}")
    if done.ranks:
        low, high = min(done.ranks), max(done.ranks)
        out.print(f"rank    {low}" + (f" – {high}" if high != low else ""))
    for notice in done.notices:
        out.print(f"[yellow]note[/]    {plain(notice)}")
    out.print(f"output  sha256:{done.sha256}")
    out.print(f"[bold]{plain(str(where))}[/]  {decimal(done.size)}")
