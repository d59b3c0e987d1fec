"""The charts of a report. Every adapter has one colour, class `a0`, `a1` …, in all of them."""

from collections.abc import Callable, Iterator, Sequence
from math import log2
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup
from rich.filesize import decimal

from cli.report_page.svg import WIDTH, Log, drawing, path, tag, title, words
from cli.report_words import (
    COLOURS,
    block_name,
    number,
    pair_name,
    percent,
    rank_name,
    shown_blocks,
    signed,
)

if TYPE_CHECKING:
    from merge.reports.report import Choice, Group, PairIn, Report

Scale = Callable[[float], float]
Shown = Callable[[float], str]
_LABELS = 128  # room for the names of blocks
_ROW = 18


def colour_class(index: int) -> str:
    return f"a{index % len(COLOURS)}"


def energy(report: "Report", names: Sequence[str]) -> Markup:
    """Per block: what each adapter has, what adds up on the right, what cancels on the left."""
    groups = shown_blocks(report)
    right = max(max(group.apart + group.adds, group.norm**2) for group in groups) or 1.0
    left = max(-group.cancels for group in groups)
    unit = (WIDTH - _LABELS - 8) / (right + left)
    zero = _LABELS + left * unit
    height = _ROW * len(groups) + 4
    rows = [_energy_row(group, names, zero, unit, 2 + _ROW * i) for i, group in enumerate(groups)]
    axis = tag("line", x1=zero, x2=zero, y1=0, y2=height, class_="axis")
    return drawing(height, "Energy by block", [*rows, axis])


def _energy_row(group: "Group", names: Sequence[str], zero: float, unit: float, y: float) -> Markup:
    bar = {"y": y + 2, "height": _ROW - 5}
    parts = [words(_cut(block_name(group), 20), _LABELS - 8, y + 12, anchor="end")]
    x = zero
    for index, norm in enumerate(group.norms):
        width = norm * norm * unit
        said = title(f"{names[index]}: norm {number(norm)}, {percent(norm**2 / group.apart, 0)}")
        parts.append(tag("rect", said, x=x, width=width, class_=colour_class(index), **bar))
        x += width
    if group.adds > 0:
        said = title(f"adds up: {percent(group.adds / group.apart, 1)} of the energy here")
        parts.append(tag("rect", said, x=x, width=group.adds * unit, class_="adds", **bar))
    if group.cancels < 0:
        width = -group.cancels * unit
        said = title(f"cancels: {percent(-group.cancels / group.apart, 1)} of the energy here")
        parts.append(tag("rect", said, x=zero - width, width=width, class_="cancels", **bar))
    if len(names) > 1:
        at = zero + group.norm**2 * unit
        said = title(f"the sum: norm {number(group.norm)}")
        parts.append(tag("line", said, x1=at, x2=at, y1=y, y2=y + _ROW - 1, class_="sum"))
    return tag("g", *parts)


def matrix(report: "Report", names: Sequence[str]) -> Markup:
    """Cosines above the diagonal, shared output directions below it."""
    n = len(names)
    size = min(64.0, (WIDTH - _LABELS) / n)
    pairs = {pair.pair: pair for pair in report.total.pairs}
    top = 22
    parts = []
    for i, name in enumerate(names):
        y = top + i * size
        parts.append(words(_cut(name, 18), _LABELS - 8, y + size / 2 + 4, anchor="end"))
        parts.append(_chip(i, _LABELS + i * size + size / 2 - 6, 4))
        for j in range(n):
            parts.append(_matrix_cell(pairs, names, i, j, (_LABELS + j * size, y, size)))
    return drawing(top + n * size + 2, "Cosines and overlaps of all pairs", parts)


def _matrix_cell(
    pairs: dict[tuple[int, int], "PairIn"],
    names: Sequence[str],
    i: int,
    j: int,
    at: tuple[float, float, float],
) -> Markup:
    x, y, size = at
    box = {"x": x + 1, "y": y + 1, "width": size - 2, "height": size - 2, "rx": 4}
    if i == j:
        return tag("rect", class_=f"{colour_class(i)} own", **box)
    pair = pairs[min(i, j), max(i, j)]
    value, kind = (pair.cosine, "cosine") if i < j else (pair.output, "output overlap")
    shown = signed(value) if i < j else percent(value, 0)
    said = title(f"{pair_name(names, i, j)}: {kind} {shown}")
    return tag(
        "g",
        tag("rect", said, **box, **_tone(value, diverging=i < j)),
        words(shown, x + size / 2, y + size / 2 + 4, _cell(value), "middle") if size >= 34 else "",
    )


def _chip(index: int, x: float, y: float) -> Markup:
    return tag("rect", x=x, y=y, width=12, height=12, rx=3, class_=colour_class(index))


def _tone(value: float | None, *, diverging: bool) -> dict[str, object]:
    """A shade by strength: towards one colour for more than nothing, another for less."""
    if value is None:
        return {"class_": "tone none"}
    kind = "less" if value < 0 and diverging else "more"
    return {"class_": f"tone {kind}", "style": f"--t:{min(abs(value), 1.0) ** 0.5:.2f}"}


def _cell(value: float | None) -> str:
    """The class of words on a shade; on a strong one they are of the other brightness."""
    return "cell strong" if value is not None and abs(value) > 0.4 else "cell"


def heat(report: "Report", names: Sequence[str]) -> Markup:
    """Cosines of every pair in every block."""
    pairs = [pair.pair for pair in report.total.pairs]
    width = min(140.0, (WIDTH - _LABELS - 4) / len(pairs))
    top = 36
    parts = []
    for column, (i, j) in enumerate(pairs):
        middle = _LABELS + column * width + width / 2
        side = min(12.0, width - 2)
        for index, y in ((i, 4), (j, 20)):
            said = title(pair_name(names, i, j))
            box = {"x": middle - side / 2, "y": y, "width": side, "height": 12}
            parts.append(tag("rect", said, rx=3, class_=colour_class(index), **box))
    groups = shown_blocks(report)
    for row, group in enumerate(groups):
        y = top + row * _ROW
        parts.append(words(_cut(block_name(group), 20), _LABELS - 8, y + 13, anchor="end"))
        for column, pair in enumerate(group.pairs):
            x = _LABELS + column * width
            said = title(
                f"{block_name(group)}, {pair_name(names, *pair.pair)}: cosine {signed(pair.cosine)}"
            )
            box = {"x": x + 0.5, "y": y + 0.5, "width": width - 1, "height": _ROW - 1, "rx": 3}
            parts.append(tag("rect", said, **box, **_tone(pair.cosine, diverging=True)))
            if width >= 48 and pair.cosine is not None:
                shown = f"{pair.cosine:+.2f}"
                parts.append(words(shown, x + width / 2, y + 13, _cell(pair.cosine), "middle"))
    return drawing(top + _ROW * len(groups) + 2, "Cosines by block and pair", parts)


_PLOT = (50, 12, WIDTH - 32, 250)  # left, top, right, bottom; beyond it the last rank
_HIGH = 286


def spectrum(report: "Report", names: Sequence[str]) -> Markup:
    """How much of the energy the first ranks hold: in the whole file, and in single layers."""
    ranks = report.ranks
    assert ranks is not None
    left, top, right, bottom = _PLOT
    most = max(choice.value for choice in ranks.fixed)

    def across(rank: float) -> float:
        return left + (right - left) * (log2(rank) / log2(most) if most > 1 else 0.5)

    def up(share: float) -> float:
        return bottom - (bottom - top) * share

    parts = [*_grid_up([0.0, 0.25, 0.5, 0.75, 1.0], up, lambda v: percent(v, 0))]
    shown = [rank for rank in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if rank <= most]
    parts += _grid_across([float(r) for r in shown], across, lambda v: f"{v:g}", "rank")
    low, high = _spread(report, [int(choice.value) for choice in ranks.fixed])
    xs = [across(choice.value) for choice in ranks.fixed]
    if low:
        band = [*zip(xs, map(up, high), strict=True)]
        band += reversed([*zip(xs, map(up, low), strict=True)])
        parts.append(path(band, class_="area"))
    line = [(across(c.value), up(1 - c.error**2)) for c in ranks.fixed]
    parts.append(path(line, class_="line"))
    for choice in ranks.fixed:
        said = title(f"rank {choice.value:g} keeps {percent(1 - choice.error**2, 1)} of the energy")
        at = {"cx": across(choice.value), "cy": up(1 - choice.error**2)}
        is_even = log2(choice.value).is_integer()
        parts.append(tag("circle", said, r=2.8 if is_even else 1.6, class_="dot", **at))
    by_rank: dict[int, list[int]] = {}
    for index, its in enumerate(report.inputs):
        if its.rank is not None and its.rank[1] <= most:
            by_rank.setdefault(its.rank[1], []).append(index)
    for rank, same in by_rank.items():
        x = across(rank)
        parts.append(tag("line", x1=x, x2=x, y1=top, y2=bottom, class_="mark"))
        for place, index in enumerate(same):
            said = title(f"rank of {names[index]}: {rank}")
            begin = x - 5 * len(same) + 10 * place + 1
            shape = {"x": begin, "y": top - 10.0, "width": 8, "height": 8, "rx": 2}
            parts.append(tag("rect", said, class_=colour_class(index), **shape))
    return drawing(_HIGH, "Energy kept at each rank", parts)


def _spread(report: "Report", ranks: Sequence[int]) -> tuple[list[float], list[float]]:
    """What a tenth of the layers keep at most, and nine tenths."""
    kept = []
    for place in report.places:
        if place.values is not None and place.kind != "bias" and place.values.any():
            energies = np.cumsum(place.values**2) / np.sum(place.values**2)
            kept.append([energies[min(rank, len(energies)) - 1] for rank in ranks])
    if not kept:
        return [], []
    low, high = np.quantile(np.array(kept), [0.1, 0.9], axis=0)
    return low.tolist(), high.tolist()


def frontier(report: "Report") -> Markup:
    """Size against error: one rank everywhere, and the best ranks for every size."""
    ranks = report.ranks
    assert ranks is not None
    left, top, right, bottom = _PLOT
    floor = 0.001
    least = min(choice.size_bytes for choice in ranks.fixed) / 2
    best = [(size, error) for size, error in ranks.frontier if size >= least]
    sizes = [size for size, _ in best] + [choice.size_bytes for choice in ranks.fixed]
    across = Log(min(sizes), max(sizes), left, right)
    up = Log(floor, 1.0, bottom, top)

    def at(choice: "Choice") -> tuple[float, float]:
        return across(choice.size_bytes), up(max(choice.error, floor))

    parts = [*_grid_up(up.ticks(), up, lambda v: f"{100 * v:g} %")]
    ticks = across.ticks((1, 2, 5)) if max(sizes) < 30 * min(sizes) else across.ticks((1,))
    parts += _grid_across(ticks, across, decimal_short, "size")
    best_line = [(across(size), up(max(error, floor))) for size, error in best]
    # A straight line to nothing lost would pass below what is possible.
    fixed_line = [at(choice) for choice in ranks.fixed if choice.error >= floor]
    if fixed_line:
        parts.append(path([*best_line, *reversed(fixed_line)], class_="area"))
        parts.append(path(fixed_line, class_="line plain"))
    parts.append(path(best_line, class_="line"))
    parts += _fixed_points(ranks.fixed, at)
    for choice in (*ranks.energy, *ranks.shared):
        x, y = at(choice)
        mark = "shared" if choice.name == "shared" else "energy"
        parts.append(tag("circle", title(_told(choice)), cx=x, cy=y, r=2.5, class_=f"dot {mark}"))
    x, y = at(ranks.asked)
    said = title(f"asked for: {_told(ranks.asked)}")
    parts.append(tag("circle", said, cx=x, cy=y, r=6.0, class_="asked"))
    return drawing(_HIGH, "Size against error", parts)


def _fixed_points(
    fixed: Sequence["Choice"], at: "Callable[[Choice], tuple[float, float]]"
) -> Iterator[Markup]:
    labelled = [choice for choice in fixed if log2(choice.value).is_integer()]
    for choice in labelled:
        x, y = at(choice)
        yield tag("circle", title(_told(choice)), cx=x, cy=y, r=3.0, class_="dot plain")
        yield words(f"{choice.value:g}", x + 6, y - 5, "point")


def _told(choice: "Choice") -> str:
    name = rank_name(choice)
    what = f"rank {name}" if choice.name == "fixed" else name
    return f"{what}: {decimal(choice.size_bytes)}, {percent(choice.error, 2)} error"


def decimal_short(size: float) -> str:
    return decimal(int(size)).replace(".0 ", " ")


def _grid_up(values: Sequence[float], up: Scale, shown: Shown) -> Iterator[Markup]:
    left, _, right, _ = _PLOT
    for value in values:
        y = up(value)
        yield tag("line", x1=left, x2=right, y1=y, y2=y, class_="grid")
        yield words(shown(value), left - 6, y + 4, "tick", "end")


def _grid_across(
    values: Sequence[float], across: Scale, shown: Shown, name: str
) -> Iterator[Markup]:
    _, _, right, bottom = _PLOT
    for value in values:
        x = across(value)
        yield tag("line", x1=x, x2=x, y1=bottom, y2=bottom + 4, class_="axis")
        yield words(shown(value), x, bottom + 17, "tick", "middle")
    yield words(name, right, bottom + 32, "tick", "end")


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
