"""graft unbake: the base as it was before a bake, or the bake without some of its adapters."""

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal

from cli.arguments import as_typed
from cli.console import CommandError, byte_progress, out, plain, print_json
from cli.finding import Finder
from cli.merge import AsJSON, Force, run
from cli.ranges import Blocks
from cli.recipes import From, rebuilt
from cli.refs import adapter_in, fetch, place_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from merge.formats.sources import File
    from merge.lineage import History
    from merge.recipe import Recipe

_HASH = re.compile(r"(?:sha256:)?([0-9a-f]{8,64})", re.IGNORECASE)


def register(app: typer.Typer) -> None:
    app.command()(unbake)


def unbake(
    file: Annotated[
        str, typer.Argument(metavar="FILE", show_default=False, help="A baked file or folder.")
    ],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="REF", help="What it was baked into, without which nothing exact is left."
        ),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option("--out", "-o", help="The file or folder to write, or s3://bucket/key."),
    ] = None,
    remove: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REF|SHA256",
            help="Only take this adapter out, and keep the others; repeat it for more.",
        ),
    ] = None,
    source: From = None,
    force: Force = False,
    as_json: AsJSON = False,
) -> None:
    """Go back to the base of a bake, or bake again without some adapters; exact, by the recipe."""
    from merge.lineage import read
    from merge.unbake import require_bake, without

    path = fetch(file)
    history = read(path)
    recipe = history.recipe
    require_bake(recipe, path.name)
    if base is None:
        assert recipe.base is not None  # a bake without a base is no recipe
        needed = f"{file} was baked into sha256:{recipe.base.sha256}: give it with --base"
        raise CommandError(f"{needed} ({_without_base(recipe, file)})")
    removed = [_digest(text, recipe) for text in remove or []]
    with as_typed(None, file):
        left = without(recipe, removed) if removed else None
    held = fetch(base)
    digest = _require_base(recipe, held, file, base)
    if removed and to is None:
        raise CommandError("--remove makes a new file: say where with -o OUT")
    if left is None:
        _restore(held, file, to, recipe, digest, removed, force=force, as_json=as_json)
    else:
        assert to is not None
        _bake_again(left, history, held, digest, path, to, source or [], force, as_json)
        if not as_json:
            _list(recipe, removed)


def _without_base(recipe: "Recipe", file: str) -> str:
    """What is left to somebody who has no base."""
    if recipe.method.model_dump() != {"name": "linear", "normalise": None}:
        return f"without it {recipe.method.name} cannot be undone: what it gave is no plain sum"
    undo = " ".join(f"ADAPTER={-its.strength:g}" for its in recipe.inputs)
    return (
        f"without it only `graft bake {file} {undo}` is left, which is not exact: what rounding "
        "took from the base's values does not come back"
    )


def _require_base(recipe: "Recipe", held: Path, file: str, base: str) -> str:
    from merge.pins import pin
    from merge.unbake import require_base

    digest = pin(held).sha256
    require_base(recipe, digest, file, base)
    return digest


def _digest(text: str, recipe: "Recipe") -> str:
    """The SHA-256 of an input, from its first digits or from the adapter itself."""
    from merge.pins import pin

    found = _HASH.fullmatch(text)
    if found is not None and not Path(text).exists():
        start = found[1].lower()
        matches = {
            its.sha256 or "" for its in recipe.inputs if (its.sha256 or "").startswith(start)
        }
        if len(matches) > 1:
            raise CommandError(f"--remove {text}: {len(matches)} of its adapters begin like that")
        return matches.pop() if matches else start
    return pin(adapter_in(fetch(text), text)).sha256


def _list(recipe: "Recipe", removed: list[str]) -> None:
    for its in recipe.inputs:
        gone = "  removed" if its.sha256 in removed or not removed else ""
        out.print(f"{its.strength:g} × sha256:{its.sha256}{gone}", soft_wrap=True)


def _restore(
    held: Path,
    file: str,
    to: str | None,
    recipe: "Recipe",
    digest: str,
    removed: list[str],
    *,
    force: bool,
    as_json: bool,
) -> None:
    """Write the base's bytes where that is asked for, and say what was found."""
    from merge.unbake import restore

    if to is not None:
        place = place_of(to, force=force)
        size = sum(f.stat().st_size for f in ([held] if held.is_file() else held.rglob("*")))
        with byte_progress("restoring", size) as progress:
            task = progress.task_ids[0]
            digest = restore(held, place, lambda step: progress.advance(task, step))
    if as_json:
        print_json(
            {
                "path": to,
                "base_sha256": digest,
                "inputs": [
                    {
                        "sha256": its.sha256,
                        "strength": its.strength,
                        "removed": not removed or its.sha256 in removed,
                    }
                    for its in recipe.inputs
                ],
            }
        )
        return
    _list(recipe, removed)
    out.print(f"base    sha256:{digest}")
    if to is None:
        out.print(f"{plain(file)} was made of it; -o OUT writes it")
    else:
        out.print(f"[bold]{plain(to)}[/]  {decimal(size)}")


def _bake_again(
    recipe: "Recipe",
    history: "History",
    held: Path,
    digest: str,
    path: Path,
    to: str,
    places: list[Path],
    force: bool,
    as_json: bool,
) -> None:
    finder = Finder(places)
    finder.know(digest, held)
    with tempfile.TemporaryDirectory() as folder, as_typed(None, path.name):

        def gather(recipe: "Recipe", blocks: Blocks) -> "Mapping[str, File]":
            leaves = finder.search(recipe, history.parents, path.name, blocks)
            return rebuilt(leaves, Path(folder)) if leaves.steps else leaves.files

        run(recipe, to, force=force, save_recipe=None, as_json=as_json, gather=gather)
