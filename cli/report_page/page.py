"""A report as one HTML page that needs nothing else: styles and drawings are inside, and no script."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from rich.filesize import decimal

from cli.report_page import charts
from cli.report_words import (
    command,
    dtype_name,
    labels,
    meanings,
    number,
    pair_name,
    percent,
    rank_name,
    recipe_text,
    signed,
)
from merge.families import FAMILIES

if TYPE_CHECKING:
    from merge.reports.report import Group, Report

_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Tile:
    """A number that stands for itself, what it is, and what it means."""

    value: str
    name: str
    meaning: str


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing with a heading, a key to its colours and one sentence of meaning."""

    heading: str
    drawing: Markup
    meaning: str
    key: tuple[tuple[str, str], ...] = ()  # class of a swatch, what it stands for


def render(report: "Report") -> str:
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    names = labels(report)
    measured = report.total.apart > 0
    return environment.get_template("page.html").render(
        report=report,
        names=names,
        heading=" + ".join(
            f"{name} {its.strength:g}" for name, its in zip(names, report.inputs, strict=True)
        ),
        about=_about(report),
        style=Markup((_HERE / "page.css").read_text("utf-8")),
        tiles=list(_tiles(report)) if measured else [],
        charts=list(_charts(report, names)) if measured else [],
        meanings=meanings(report),
        rows=list(_block_rows(report)),
        command=command(report) if report.suggestion else "",
        recipe=recipe_text(report) if report.suggestion else "",
        colour=charts.colour_class,
        decimal=decimal,
        dtype_name=dtype_name,
        pair_name=pair_name,
        number=number,
        percent=percent,
        rank_name=rank_name,
        signed=signed,
    )


def _about(report: "Report") -> str:
    """What the files are for, and what the result would be."""
    family = report.family
    found = ["a model of no family we know" if family is None else FAMILIES[family].title]
    found.append(f"{report.total.modules} modules")
    if report.dialect is not None:
        found.append(f"would be written in {report.dialect} names")
    if report.dtype is not None:
        found.append(dtype_name(report.dtype))
    return " · ".join(found)


def _tiles(report: "Report") -> Iterator[Tile]:
    total, ranks, stored = report.total, report.ranks, report.storage
    if len(report.inputs) > 1:
        kept = percent(total.norm**2 / total.apart, 0)
        yield Tile(kept, "energy of the sum", "of what the adapters have apart")
        yield Tile(percent(-total.cancels / total.apart, 1), "cancels", "where they pull apart")
        scale = "–" if total.scale is None else f"{total.scale:.3g}"
        yield Tile(scale, "λ", "factor that gives the sum the energy they have apart")
    if ranks is not None:
        error = "nothing is lost" if ranks.asked.error == 0 else percent(ranks.asked.error, 2)
        lost = error if ranks.asked.error == 0 else f"{error} is lost"
        yield Tile(decimal(ranks.asked.size_bytes), f"rank {rank_name(ranks.asked)}", lost)
    for loss in () if stored is None else stored.bake:
        if loss.is_base:
            wrong = f"of the change arrives, with {percent(loss.error, 1)} error"
            arrives = "overflows" if loss.overflows else percent(loss.gain, 0)
            if loss.overflows:
                wrong = "the base's dtype does not hold the sum"
            yield Tile(arrives, f"baked in {dtype_name(loss.dtype)}", wrong)


def _charts(report: "Report", names: Sequence[str]) -> Iterator[Chart]:
    says = meanings(report)
    several = len(names) > 1
    key = [(charts.colour_class(i), name) for i, name in enumerate(names)] if several else []
    marks = [("adds", "adds up"), ("cancels", "cancels"), ("sum", "the sum")] if several else []
    yield Chart(
        "Energy by block",
        charts.energy(report, names),
        "To the right what each adapter does there"
        + (", and what their sum gains; to the left what cancels. " if several else ". ")
        + (says["blocks"] if several else ""),
        (*key, *marks),
    )
    if several:
        scale = (("tone more full", "the same"), ("tone less full", "opposite"))
        if len(names) > 2:
            yield Chart(
                "How alike they are",
                charts.matrix(report, names),
                "Above the diagonal cosines, below it how far they write the same directions, beyond "
                "chance.",
                scale,
            )
        yield Chart(
            "Cosine by block",
            charts.heat(report, names),
            "Where two adapters push the same way, and where they push against each other; the two "
            "colours above a column are its pair.",
            scale,
        )
    if report.ranks is not None:
        yield Chart(
            "Energy kept at each rank",
            charts.spectrum(report, names),
            "The line is the whole file, the band eight tenths of its layers; coloured marks on top "
            "are the adapters' own ranks.",
        )
        if report.ranks.frontier:
            yield Chart(
                "Size against error",
                charts.frontier(report),
                "What is left out at a size: with one rank everywhere (thin, numbered), and with the "
                "best rank for every layer (thick); the ring is what was asked for.",
            )


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    group: "Group"
    ratio: str
    cancels: str


def _block_rows(report: "Report") -> Iterator[Row]:
    for group in report.blocks:
        apart = group.apart or 1.0
        yield Row(
            f"{group.component} {group.block}",
            group,
            percent(group.norm**2 / apart, 0),
            percent(-group.cancels / apart, 1),
        )
