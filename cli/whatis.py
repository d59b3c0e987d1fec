"""graft whatis: which adapters are in a checkpoint, and how strongly."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cli.arguments import as_typed, make_recipe
from cli.console import WrongUsage, count_progress, out, plain, print_json
from cli.merge import AsJSON, gather_files
from cli.ranges import Blocks as RemoteBlocks
from cli.refs import open_ref

if TYPE_CHECKING:
    from merge.whatis import Answer

_MOST_GROUPS = 24
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


def register(app: typer.Typer) -> None:
    app.command()(whatis)


def whatis(
    checkpoint: Annotated[
        str,
        typer.Argument(metavar="CHECKPOINT", show_default=False, help="What is asked about."),
    ],
    base: Annotated[str, typer.Option(metavar="REF", help="The checkpoint that it was made from.")],
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapters",
            "--adapter",
            metavar="REF",
            help="An adapter that may be in it; once for each.",
        ),
    ] = None,
    more: Annotated[
        list[str] | None,
        typer.Argument(metavar="REF…", show_default=False, help="Further adapters."),
    ] = None,
    as_json: AsJSON = False,
) -> None:
    """Which adapters are in a checkpoint: graft whatis CHECKPOINT --base B --adapters ink robot.

    The strengths are those that explain most of the difference from the base.
    What is left is compared with what rounding alone leaves.
    """
    from merge.whatis import whatis as explain

    refs = [*(adapters or []), *(more or [])]
    if not refs:
        raise WrongUsage("say which adapters may be in it: --adapters REF REF …")
    recipe = make_recipe(
        {"kind": "bake", "base": {"ref": base}, "inputs": [{"ref": ref} for ref in refs]}, refs
    )
    with as_typed(refs), RemoteBlocks() as blocks:
        files = gather_files(recipe, blocks)
        asked = open_ref(checkpoint, blocks)
        with count_progress("comparing", None, "layers") as progress:
            task = progress.task_ids[0]
            answer = explain(
                asked,
                recipe,
                files,
                lambda done, total: progress.update(task, completed=done, total=total),
                lambda: False,
            )
    if as_json:
        print_json(answer.to_json())
        return
    _print(answer)


def _print(answer: "Answer") -> None:
    if answer.is_same:
        out.print("nothing differs: it is the base" + _but(answer))
        return
    table = Table(box=None, pad_edge=False)
    for title in ("adapter", "strength", "only it explains"):
        table.add_column(title, justify="left" if title == "adapter" else "right")
    for index, name in enumerate(answer.names):
        table.add_row(plain(name), _strength(answer, index), _share(answer.whole.alone[index]))
    out.print(table)
    if answer.level != "everywhere":
        out.print(_groups(answer))
    for group in answer.alike:
        out.print(f"[yellow]note[/]    {plain(_alike([answer.names[i] for i in group]))}")
    for name, n in answer.ignored.items():
        out.print(f"[yellow]note[/]    {n} layers of {plain(name)} are not in both checkpoints")
    if answer.unmatched:
        out.print(f"[yellow]note[/]    not compared: {plain(_some(answer.unmatched))}")
    out.print(_verdict(answer))


def _strength(answer: "Answer", index: int) -> str:
    for group in answer.alike:
        if index in group[1:]:
            return f"or {plain(answer.names[group[0]])}"
    if not answer.is_in(index):
        return "not in it"
    found = [
        (strength, its.errors[index])
        for its in answer.fits.values()
        if (strength := its.strengths[index]) is not None
    ]
    low, high = (f"{its[0]:.3f}" for its in (min(found), max(found)))
    if low != high:
        return f"{low} to {high}"
    error = 2 * max(error for _, error in found)
    return low + (f" ± {error:.1g}" if error >= 5e-4 else "")


def _groups(answer: "Answer") -> Table:
    """Strengths of components, blocks or layers, those with the same strengths together."""
    table = Table(box=None, pad_edge=False)
    for name in answer.names:
        table.add_column(plain(name), justify="right", overflow="fold")
    table.add_column(answer.level, overflow="fold")
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, its in answer.fits.items():
        key = tuple("" if s is None else f"{s:.2f}" for s in its.strengths)
        alike.setdefault(key, []).append(name)
    ordered = sorted(alike.items(), key=lambda item: -len(item[1]))
    for strengths, names in ordered[:_MOST_GROUPS]:
        table.add_row(*strengths, plain(_some(tuple(sorted(names)), 2)))
    if len(ordered) > _MOST_GROUPS:
        blanks = [""] * len(answer.names)
        table.add_row(*blanks, f"and {len(ordered) - _MOST_GROUPS} more: --json has all")
    return table


def _verdict(answer: "Answer") -> str:
    doubles = {index for group in answer.alike for index in group[1:]}
    there = [i for i in range(len(answer.names)) if answer.is_in(i) and i not in doubles]
    named = plain(_listed([answer.names[i] for i in there])) if there else ""
    dtype = _DTYPES.get(answer.dtype, answer.dtype)
    if not there:
        text = "none of these adapters is in it"
    elif answer.is_rounding:
        text = f"{named}: all of the difference, but for rounding to {dtype}"
    else:
        verb = "explains" if len(there) == 1 else "explain"
        text = f"{named} {verb} {_share(1 - answer.left)} of the difference; the rest is something else"
    return text + _but(answer)


def _but(answer: "Answer") -> str:
    if not answer.other:
        return ""
    return f"; outside of the layers that adapters change {plain(_some(answer.other))} differs too"


def _alike(names: list[str]) -> str:
    return f"{_listed(names)} are nearly the same change and cannot be told apart"


def _listed(names: list[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _some(names: tuple[str, ...], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _share(value: float) -> str:
    return f"{value:.2%}" if value < 0.9995 or value == 1 else "> 99.9%"
