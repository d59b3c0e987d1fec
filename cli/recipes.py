"""graft verify and graft recipe: files made again from what they say they were made of."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.segment import Segments

from cli.arguments import as_typed
from cli.console import CommandError, count_progress, err, out, plain, print_json
from cli.finding import Finder, Hint
from cli.loras import Loras
from cli.merge import AsJSON, Force, Out, run
from cli.ranges import Blocks
from cli.refs import fetch, path_of
from cli.texts import write_text
from cli.trees import as_document, as_tree, said

if TYPE_CHECKING:
    from merge.formats.sources import File
    from merge.leaves import Leaves
    from merge.lineage import History
    from merge.plan import Plan
    from merge.recipe import Recipe
    from merge.verify import Proof

From = Annotated[
    list[Path] | None,
    typer.Option(
        "--from",
        metavar="PATH",
        help="A file, or a folder to search, for what is known by SHA-256 alone; then the hub is asked.",
    ),
]
Scratch = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Where to make it again; by default the system's."),
]


def register(app: typer.Typer) -> None:
    app.command()(verify)
    recipes = typer.Typer(no_args_is_help=True, help="What files were made of, and made again.")
    recipes.command("run")(run_recipe)
    recipes.command("show")(show)
    recipes.command("import")(import_recipe)
    app.add_typer(recipes, name="recipe")


def verify(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", show_default=False, help="A merged or baked file or folder."
        ),
    ],
    source: From = None,
    scratch: Scratch = None,
    as_json: AsJSON = False,
) -> None:
    """Make a file again from the recipe in it, and compare every tensor; exit 1 if it differs."""
    path = fetch(file)
    from merge.lineage import read

    history = read(path)
    finder = Finder(source or [], _hints(path, history))
    with scratch_folder(scratch) as folder:
        leaves = finder.search(history.recipe, history.parents, path.name)
        from merge.verify import Verdict
        from merge.verify import verify as prove

        with rebuilding() as report:
            proof = prove(path, history, leaves, folder, report)
    if as_json:
        print_json({"path": file, **proof.to_json()})
    else:
        _print_proof(file, proof)
    if proof.verdict is Verdict.DIFFERS:
        raise typer.Exit(1)


def run_recipe(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            show_default=False,
            help="A recipe, YAML or JSON, or a file that was made by one, named as adapters are.",
        ),
    ],
    to: Out,
    source: From = None,
    force: Force = False,
    as_json: AsJSON = False,
) -> None:
    """Do what a recipe says; what it was made of and is gone is made again first."""
    path, recipe, parents = read_recipe(file)
    finder = Finder(source or [])
    with tempfile.TemporaryDirectory() as folder, as_typed(None, file):

        def gather(recipe: "Recipe", blocks: Blocks) -> "Mapping[str, File]":
            leaves = finder.search(recipe, parents, path.name, blocks)
            return rebuilt(leaves, Path(folder)) if leaves.steps else leaves.files

        run(recipe, to, force=force, save_recipe=None, as_json=as_json, gather=gather)


def read_recipe(file: str) -> "tuple[Path, Recipe, Mapping[str, Recipe]]":
    """Where it is, a recipe and those of its inputs: of a recipe file or of what was made by one."""
    from merge.lineage import read
    from merge.recipe import Recipe

    path = fetch(file)
    if path.is_dir() or path.suffix == ".safetensors":
        history = read(path)
        return path, history.recipe, history.parents
    with as_typed(None, file):
        return path, Recipe.load(path), {}


def show(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            show_default=False,
            help="A file that was made by a recipe, or a recipe, named as adapters are.",
        ),
    ],
    as_json: AsJSON = False,
) -> None:
    """What a file was made of, what that was made of, and so on, as a tree."""
    path, recipe, parents = read_recipe(file)
    if as_json:
        print_json(as_document(recipe, parents))
    else:
        tree = as_tree(plain(path.name), recipe, parents)
        # A tree cuts what is wider than the terminal, and names may be paths.
        out.print(Segments(out.render(tree, out.options.update(width=_WIDE))))


def import_recipe(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            show_default=False,
            help="A file of mergekit's, PEFT's or ComfyUI-Lora-Manager's, or a prompt or its file.",
        ),
    ],
    loras: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where the adapters of these names are.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write the recipe as YAML.")
    ] = None,
    force: Force = False,
    as_json: AsJSON = False,
) -> None:
    """Say another tool's recipe in ours, with every way in which it is not the same."""
    from merge.imports import import_recipe as read

    path = Path(source)
    is_prompt = "<" in source and not path.exists()
    if not is_prompt and not path.is_file():
        raise CommandError(f"{source}: there is no such file, and no <lora:name:strength> in it")
    text = source if is_prompt else _read_text(path)
    place = None if to is None else path_of(str(to), force=force)
    with as_typed(None, "the prompt" if is_prompt else source):
        found = read(text, Loras(loras).resolve)
    if place is not None:
        write_text(place, found.recipe.to_yaml())
    if as_json:
        recipe = found.recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        print_json({"tool": found.tool, "notes": list(found.notes), "recipe": recipe})
        return
    err.print(f"from {found.tool}: {plain(said(found.recipe))}")
    for note in found.notes:
        err.print(f"[yellow]note[/]  {plain(note)}")
    if place is None:
        out.print(found.recipe.to_yaml().rstrip(), markup=False)
    else:
        out.print(f"[bold]{plain(str(to))}[/]")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CommandError(f"{path} is not text") from error


@contextmanager
def scratch_folder(place: Path | None) -> Iterator[Path]:
    """An empty folder that is gone afterwards."""
    if place is not None and not place.is_dir():
        raise CommandError(f"--scratch {place}: there is no such folder")
    with tempfile.TemporaryDirectory(dir=place, prefix="graft-") as folder:
        yield Path(folder)


def rebuilt(leaves: "Leaves", scratch: Path) -> "Mapping[str, File]":
    """All files that a recipe names; BadRecipe where one that was made again is another."""
    from merge.rebuild import rebuild, require_same

    with rebuilding() as report:
        sources = rebuild(leaves, scratch, report)
    require_same(sources.remade)
    return sources.files


@contextmanager
def rebuilding() -> "Iterator[Callable[[Plan, int, int], None]]":
    """A bar for each file that is made, in modules or bytes as its plan counts."""
    with count_progress("making it again", None) as progress:
        task = progress.task_ids[0]
        yield lambda planned, done, total: progress.update(task, completed=done, total=total)


def _hints(path: Path, history: "History") -> dict[str, Hint]:
    """What is known of the files that will be looked for, beside their SHA-256."""
    from merge.formats.header import read_header
    from merge.formats.metadata import GRAFT_CERTIFICATE, read_json

    base = history.recipe.base
    hints: dict[str, Hint] = {}
    if base is not None and base.sha256 is not None and history.recipe.kind == "bake":
        size = None if path.is_dir() else path.stat().st_size
        hints[base.sha256] = Hint(near=size, is_folder=path.is_dir())
    if path.is_file():
        certificate = read_json(read_header(path).metadata, GRAFT_CERTIFICATE)
        inputs = certificate.get("inputs") if isinstance(certificate, dict) else None
        for its in inputs if isinstance(inputs, list) else ():
            if isinstance(its, dict) and isinstance(its.get("size_bytes"), int):
                hints[str(its.get("sha256"))] = Hint(size=its["size_bytes"])
    return hints


def _print_proof(file: str, proof: "Proof") -> None:
    from merge.errors import counted
    from merge.verify import Verdict

    recipe, found = proof.history.recipe, proof.comparison
    out.print(f"recipe   {recipe.digest()}")
    inputs = counted(recipe.sources(), "file", "files")
    made = f"; {len(proof.remade)} made again first" if proof.remade else ""
    out.print(f"made of  {inputs}{made}")
    out.print(f"tensors  {found.same} of {found.tensors} the same, bit for bit")
    for its in sorted(found.differences, key=lambda its: its.is_rounding)[:_MOST_SHOWN]:
        place = f"{its.file}: {its.tensor}" if its.file else its.tensor
        apart = its.largest
        by = f", by up to {apart * 100:.3g}% of the largest" if apart is not None else ""
        label = "[yellow]rounding[/]" if its.is_rounding else "[red]differs[/] "
        out.print(f"{label} {plain(place)}")
        out.print(f"         {its.what}{by}")
    if len(found.differences) > _MOST_SHOWN:
        out.print(f"         and {len(found.differences) - _MOST_SHOWN} more; --json has all")
    for text in found.wrong:
        out.print(f"[red]wrong[/]    {plain(text)}")
    for note in proof.notes:
        out.print(f"[yellow]note[/]     {plain(note)}")
    style = "red" if proof.verdict is Verdict.DIFFERS else "green"
    out.print(f"[bold]{plain(file)}[/]  [bold {style}]{proof.verdict}[/]")


_MOST_SHOWN = 10
_WIDE = 10_000
