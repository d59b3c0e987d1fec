"""`graft report`: what a merge will do, before anything is written."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cli import merge as merging
from cli.arguments import as_typed, make_recipe
from cli.console import WrongUsage, count_progress, out, plain, print_json
from cli.ranges import Blocks as RemoteBlocks
from cli.refs import path_of
from cli.report_words import (
    COLOURS,
    block_name,
    command,
    dtype_name,
    labels,
    meanings,
    number,
    pair_name,
    percent,
    rank_name,
    shown_blocks,
    signed,
)
from cli.texts import write_text

if TYPE_CHECKING:
    from merge.recipe import Recipe
    from merge.reports.report import Choice, Report

_BAR = 26
_BARS = " "  # the title of a column of bars
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_SHOWN_RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def register(app: typer.Typer) -> None:
    app.command()(report)


def report(
    inputs: merging.Inputs,
    base: Annotated[
        str | None,
        typer.Option(metavar="REF", help="Also measure on this checkpoint: losses of a bake."),
    ] = None,
    method: merging.MethodName = "linear",
    rank: Annotated[int | None, typer.Option(help="Ask for this rank.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Ask for this share of each module's squared norm.")
    ] = None,
    budget: Annotated[
        int | None, typer.Option(metavar="BYTES", help="Ask for the best ranks within these bytes.")
    ] = None,
    shared: Annotated[
        int | None, typer.Option(metavar="RANK", help="Ask for as many numbers as this rank.")
    ] = None,
    block: merging.Blocks = None,
    component: merging.Components = None,
    leave_out: merging.LeaveOut = None,
    only: merging.Only = None,
    vectors: merging.Vectors = None,
    style_content: merging.StyleContent = False,
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="keep, float16, bfloat16 or float32.")
    ] = "keep",
    dialect: Annotated[
        str | None, typer.Option("--to", metavar="DIALECT", help="kohya, diffusers, comfy or peft.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the report as one page with charts.")
    ] = None,
    force: merging.Force = False,
    as_json: merging.AsJSON = False,
) -> None:
    """What a merge will do: graft report ink.safetensors=0.7 robot.safetensors=0.5.

    Overlap, what adds up and what cancels, errors for every rank, losses of dtypes, and a suggestion.
    docs/reports.md explains every number.
    """
    ranks = {"fixed": rank, "energy": energy, "budget_bytes": budget, "shared": shared}
    said = {name: value for name, value in ranks.items() if value is not None}
    if len(said) > 1:
        raise WrongUsage("say one of --rank, --energy, --budget and --shared")
    from merge.reports.suggest import least_loss

    recipe = make_recipe(
        {
            "kind": "merge",
            **({"base": {"ref": base}} if base else {}),
            "inputs": merging.inputs_of(
                inputs, block, component, leave_out, only, vectors, style_content
            ),
            "method": {"name": method},
            "rank": said or least_loss(method),
            "output": {"dialect": dialect, "dtype": dtype},
        },
        inputs,
    )
    page = None if html is None else path_of(str(html), force=force)
    with as_typed(inputs):
        found, seconds = measured(recipe)
    if page is not None:
        from cli.report_page.page import render

        write_text(page, render(found))
    if as_json:
        print_json(found.to_json())
        return
    for part in _parts(found, seconds):
        # Sentences are broken between words; what may be copied is not broken at all.
        out.print(part, soft_wrap=isinstance(part, str))
    if page is not None:
        out.print(f"[bold]{plain(str(page))}[/]  {decimal(page.stat().st_size)}")


def measured(recipe: "Recipe") -> tuple["Report", float]:
    """The report on a recipe of REFs, and how many seconds it took after the imports."""
    with RemoteBlocks() as blocks:
        files = merging.gather_files(recipe, blocks)
        from merge.reports.measure import measure

        started = time.perf_counter()
        with count_progress("measuring", None, "steps") as progress:
            task = progress.task_ids[0]
            found = measure(
                recipe,
                files,
                progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
    return found, time.perf_counter() - started


def _parts(report: "Report", seconds: float) -> Iterator[Table | Text | Padding | str]:
    """Tables, each with what it means in a line below it."""
    names = labels(report)
    says = meanings(report)
    yield _inputs_table(report, names)
    yield _meaning(says["inputs"])
    for note in report.notes:
        yield Text.assemble(("note  ", "yellow"), _clean(note))
    if report.total.modules == 0:
        return
    yield _coverage_table(report, names)
    yield _meaning(says["coverage"])
    if len(names) > 1:
        yield _pairs_table(report, names)
        yield _meaning(says["pairs"])
    yield _blocks_table(report, names)
    yield _meaning(says["blocks"])
    if report.ranks is not None:
        yield _ranks_table(report)
        yield _meaning(says["ranks"])
    if report.storage is not None:
        yield _dtypes_table(report)
        yield _meaning(says["dtypes"])
    if report.suggestion is not None:
        yield Text("suggestion", style="bold")
        for reason in report.suggestion.reasons:
            yield Padding(Text(_clean(reason)), (0, 0, 0, 2))
        yield f"\n[bold]{plain(command(report))}[/]\n"
    yield Text(f"measured in {seconds:.1f} s from the factors; nothing was written", style="dim")


def _clean(text: str) -> str:
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _meaning(text: str) -> Text:
    return Text(text + "\n", style="dim")


def _table(*columns: str, left: int = 1) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, title in enumerate(columns):
        is_left = index < left or title == _BARS
        table.add_column(title, justify="left" if is_left else "right", no_wrap=True)
    return table


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _inputs_table(report: "Report", names: Sequence[str]) -> Table:
    table = _table("", "adapter", "strength", "algorithm", "rank", "norm", _BARS, "energy", left=2)
    total = report.total
    for index, (its, name) in enumerate(zip(report.inputs, names, strict=True)):
        norm = total.norms[index]
        share = norm**2 / total.apart if total.apart else 0.0
        bar = Text(_bar(share, 12), style=_colour(index))
        table.add_row(
            Text("■", style=_colour(index)),
            Text(_cut(name, 24)),
            f"{its.strength:g}",
            _cut(", ".join(its.algorithms), 14),
            rank_range(its.rank),
            number(norm),
            bar,
            percent(share, 0),
        )
    return table


def rank_range(rank: tuple[int, int] | None) -> str:
    if rank is None:
        return "–"
    return str(rank[0]) if rank[0] == rank[1] else f"{rank[0]}–{rank[1]}"


def _coverage_table(report: "Report", names: Sequence[str]) -> Table:
    """Adapters in rows, because there may be many; components are few."""
    groups = [*report.components, report.total] if len(report.components) > 1 else report.components
    titles = [group.component or "together" for group in groups]
    table = _table("", "modules changed", *titles, left=2)
    for index, name in enumerate(names):
        cells = [f"{group.touched[index]} · {group.alone[index]}" for group in groups]
        table.add_row(Text("■", style=_colour(index)), Text(_cut(name, 24)), *cells)
    if len(names) > 1:
        table.add_row("", "by any", *(f"{group.modules}    " for group in groups), style="dim")
    return table


def _pairs_table(report: "Report", names: Sequence[str]) -> Table:
    table = _table("pair", "cosine", "adds", "cancels", "output", "input", "leak")
    leaks = {(leak.of, leak.into): leak for leak in report.leaks}
    shown = [_cut(name, 14) for name in names]
    for pair in report.total.pairs:
        i, j = pair.pair
        ends = [leaks.get(key) for key in ((i, j), (j, i))]
        there, back = (percent(None if leak is None else leak.core, 0) for leak in ends)
        table.add_row(
            Text(pair_name(shown, i, j)),
            signed(pair.cosine),
            percent(pair.adds / report.total.apart, 1),
            percent(-pair.cancels / report.total.apart, 1),
            percent(pair.output, 0),
            percent(pair.input, 0),
            f"{there.removesuffix(' %')} / {back}",
        )
    return table


def _blocks_table(report: "Report", names: Sequence[str]) -> Table:
    several = len(names) > 1
    groups = shown_blocks(report)
    columns = ("sum / apart", "cancels") if several else ()
    table = _table("block", "energy", "norm", *columns, left=2)
    largest = max(group.apart for group in groups) or 1.0
    for group in groups:
        bar = Text()
        ends = 0.0
        for index, norm in enumerate(group.norms):
            begin, ends = ends, ends + norm**2 / largest * _BAR
            bar.append(_piece(begin, ends), style=_colour(index))
        bar.pad_right(_BAR - len(bar))
        ratio = group.norm**2 / group.apart if group.apart else 0.0
        cells = (percent(ratio, 0), percent(-group.cancels / (group.apart or 1.0), 1))
        table.add_row(
            Text(_cut(block_name(group), 30)), bar, number(group.norm), *cells[: len(columns)]
        )
    return table


def _piece(begin: float, end: float) -> str:
    """Whole cells from where the piece before ended; only the last one of a bar may be a part."""
    cells = max(0, round(end) - round(begin))
    return "█" * cells


def _ranks_table(report: "Report") -> Table:
    ranks = report.ranks
    assert ranks is not None
    table = _table("rank", "size", "error", _BARS, "shared: size", "error")
    shared = {choice.value: choice for choice in ranks.shared}
    shown = [choice for choice in ranks.fixed if choice.value in _SHOWN_RANKS]
    for choice in shown:
        other = shared.get(choice.value)
        table.add_row(*_choice_cells(choice), *_pair_of(other))
    for choice in ranks.energy:
        if choice.value in (0.9, 0.99):
            table.add_row(*_choice_cells(choice))
    table.add_row(*_choice_cells(ranks.exact))
    if ranks.asked != ranks.exact and ranks.asked not in shown:
        table.add_row(*_choice_cells(ranks.asked), style="bold")
    return table


def _choice_cells(choice: "Choice") -> tuple[str | Text, ...]:
    return (
        rank_name(choice),
        decimal(choice.size_bytes),
        percent(choice.error, 2),
        Text(_bar(choice.error, 16), style="dim"),
    )


def _pair_of(choice: "Choice | None") -> tuple[str, ...]:
    return () if choice is None else (decimal(choice.size_bytes), percent(choice.error, 2))


def _dtypes_table(report: "Report") -> Table:
    stored = report.storage
    assert stored is not None
    titles = ("arrives", "wrong by", "unchanged") if stored.bake else ()
    table = _table("dtype", "", "factors", *titles, left=2)
    bakes = {loss.dtype: loss for loss in stored.bake}
    factors = {its.dtype: its for its in stored.factors}
    for dtype in dict.fromkeys([*factors, *bakes]):
        rounding, loss = factors.get(dtype), bakes.get(dtype)
        marks, cells = [], [""]
        if rounding is not None:
            cells = ["overflows" if rounding.overflows else percent(rounding.error, 3)]
            marks += ["output"] if rounding.is_asked else []
        if loss is not None:
            marks += ["base"] if loss.is_base else []
            shares = [percent(its, 1) for its in (loss.gain, loss.error, loss.unchanged)]
            cells += ["overflows", "", ""] if loss.overflows else shares
        mark = f"← {', '.join(marks)}" if marks else ""
        table.add_row(dtype_name(dtype), Text(mark, style="dim"), *cells)
    return table


def _bar(share: float, width: int) -> str:
    """A bar of eighths of a cell."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    whole, rest = divmod(eighths, 8)
    return ("█" * whole + (_EIGHTHS[rest] if rest else "")).ljust(width)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
