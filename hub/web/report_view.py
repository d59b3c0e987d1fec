"""A report as the bench draws it: lengths and positions for figures, and what they say in words."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import log10
from typing import Any

from hub.web.bench_state import Bench
from hub.web.render import percent, size

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
BAR = 1000  # width of a bar's drawing
WIDE, HIGH = 360, 180  # of the drawing of size against error
LEFT, BOTTOM = 40, 28
_MANY_CANCEL = 0.1  # share of the energy in a block that is worth a word
_MAX_WORDS = 4


@dataclass(frozen=True, slots=True)
class Bit:
    """A piece of a bar: what it stands for, where it begins and how long it is."""

    kind: str
    x: float
    width: float


@dataclass(frozen=True, slots=True)
class Bar:
    """One block: what each adapter adds, what cancels (left of `zero`), and what is left (`mark`)."""

    name: str
    bits: tuple[Bit, ...]
    mark: float
    words: str


@dataclass(frozen=True, slots=True)
class Cell:
    """Of the table of pairs; `tone` is one of seven, from c-3 (opposite) to c3 (the same)."""

    text: str
    tone: str
    words: str


@dataclass(frozen=True, slots=True)
class Point:
    x: float
    y: float
    label: str = ""


@dataclass(frozen=True, slots=True)
class Option:
    """A choice of rank one could take instead; `url` is the bench with it."""

    name: str
    size: str
    error: str
    url: str
    is_chosen: bool


@dataclass(frozen=True, slots=True)
class Frontier:
    """The drawing of size against error: a line, points on it, and the axes' labels."""

    line: str
    points: tuple[Point, ...]
    asked: Point
    across: tuple[Point, ...]
    up: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class ReportView:
    """What the template shows, in its order; lengths of bars are of BAR."""

    names: tuple[str, ...]
    summary: str
    warnings: tuple[str, ...]
    zero: float
    bars: tuple[Bar, ...]
    pairs: tuple[tuple[str, tuple[Cell, ...]], ...]
    frontier: Frontier | None
    options: tuple[Option, ...]
    losses: tuple[str, ...]
    suggestion: tuple[str, ...]
    suggested_url: str | None
    notes: tuple[str, ...]


def view(report: Mapping[str, Any], names: Sequence[str], bench: Bench) -> ReportView:
    """`names` are what the page calls the inputs, in the recipe's order."""
    ranks, total, suggestion = report["ranks"], report["total"], report["suggestion"]
    zero, bars = _bars(report["blocks"], names)
    return ReportView(
        names=tuple(names),
        summary=_summary(report),
        warnings=tuple(_warnings(report, names)),
        zero=zero,
        bars=bars,
        pairs=tuple(_pairs(total, names)) if len(names) > 1 else (),
        frontier=_frontier(ranks) if ranks is not None and len(ranks["frontier"]) > 1 else None,
        options=tuple(_options(ranks, bench)) if ranks is not None else (),
        losses=tuple(_losses(report["storage"])),
        suggestion=tuple(map(_sentence, suggestion["reasons"])) if suggestion is not None else (),
        suggested_url=_suggested(suggestion, bench) if suggestion is not None else None,
        notes=tuple(report["notes"]),
    )


def _suggested(suggestion: Mapping[str, Any], bench: Bench) -> str | None:
    """The bench as it is suggested; None where it is so already."""
    (rank, value), *_ = suggestion["rank"].items()
    method = {name: str(said) for name, said in suggestion["method"].items()}
    rows = [
        replace(row, strength=f"{strength:g}")
        for row, strength in zip(bench.rows, suggestion["strengths"], strict=True)
    ]
    suggested = replace(
        bench,
        rows=tuple(rows),
        method=method.pop("name"),
        parameters=method,
        rank=rank,
        amount="" if rank == "exact" else f"{value:g}",
    )
    return suggested.address() if suggested.address() != bench.address() else None


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:] + "."


def _summary(report: Mapping[str, Any]) -> str:
    total, ranks = report["total"], report["ranks"]
    what = "Changes" if report["method"] == "linear" else "Their plain sum changes"
    modules = total["modules"]
    words = f"{what} {modules:,} {'module' if modules == 1 else 'modules'}."
    if ranks is not None:
        asked = ranks["asked"]
        kept = _range(asked["ranks"])
        words = f"{words[:-1]} at rank {kept}, {size(asked['size_bytes'])} in {_DTYPES.get(report['dtype'], report['dtype'])}"
        error = asked["error"]
        words += f", {percent(error)} away from the exact sum." if error > 1e-6 else ", exact."
    if total["apart"] > 0 and len(total["norms"]) > 1:
        kept = total["norm"] ** 2 / total["apart"]
        words += f" Together they have {percent(kept)} of the energy that they have apart."
    return words


def _warnings(report: Mapping[str, Any], names: Sequence[str]) -> Iterator[str]:
    """Where adapters work against each other, the worst first."""
    found = []
    for block in report["blocks"]:
        for pair in block["pairs"]:
            share = -pair["cancels"] / block["apart"] if block["apart"] > 0 else 0.0
            if share > _MANY_CANCEL:
                one, other = (names[i] for i in pair["pair"])
                words = f"{one} and {other} pull {_block_name(block)} apart: "
                found.append((share, words + f"{percent(share)} of its energy cancels."))
    found.sort(reverse=True)
    yield from (words for _, words in found[:_MAX_WORDS])
    if len(found) > _MAX_WORDS:
        yield f"In {len(found) - _MAX_WORDS} more places something cancels."
    for one, name in zip(report["inputs"], names, strict=True):
        if one["unmeasured"]:
            yield f"{len(one['unmeasured'])} modules of {name} cannot be measured without a base."


def _bars(
    blocks: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> tuple[float, tuple[Bar, ...]]:
    """All to one scale: the largest block fills the width."""
    right = max((block["apart"] + block["adds"] for block in blocks), default=0.0)
    left = max((-block["cancels"] for block in blocks), default=0.0)
    if right <= 0:
        return 0.0, ()
    unit = BAR / (right + left)
    zero = left * unit
    return zero, tuple(_bar(block, names, zero, unit) for block in blocks)


def _bar(block: Mapping[str, Any], names: Sequence[str], zero: float, unit: float) -> Bar:
    cancels = -block["cancels"] * unit
    bits = [Bit("cancels", zero - cancels, cancels)] if cancels else []
    x = zero
    for n, norm in enumerate(block["norms"]):
        bits.append(Bit(f"a{n % 8}", x, norm**2 * unit))
        x += norm**2 * unit
    if block["adds"]:
        bits.append(Bit("adds", x, block["adds"] * unit))
    parts = [f"{name} {norm:.3g}" for name, norm in zip(names, block["norms"], strict=True)]
    words = f"{_block_name(block)}, norms: {', '.join(parts)}; together {block['norm']:.3g}"
    return Bar(_block_name(block), tuple(bits), zero + block["norm"] ** 2 * unit, words)


def _block_name(block: Mapping[str, Any]) -> str:
    return f"{block['component']} {block['block']}".strip()


def _pairs(
    total: Mapping[str, Any], names: Sequence[str]
) -> Iterator[tuple[str, tuple[Cell, ...]]]:
    """One line for every adapter, with a cell for every adapter before it."""
    known = {tuple(pair["pair"]): pair for pair in total["pairs"]}
    for i in range(1, len(names)):
        cells = tuple(_cell(known[j, i], names[j], names[i]) for j in range(i))
        yield names[i], cells


def _cell(pair: Mapping[str, Any], one: str, other: str) -> Cell:
    cosine = pair["cosine"]
    if cosine is None:
        return Cell("–", "c0", f"{one} and {other} meet in no module")
    overlaps = [
        f"{side} subspaces overlap {percent(pair[side])} above chance"
        for side in ("output", "input")
        if pair[side] is not None
    ]
    words = f"{one} and {other}: cosine {cosine:.3f} in {pair['modules']:,} modules"
    tone = round(max(-1.0, min(1.0, cosine * 2)) * 3)
    return Cell(
        f"{cosine:+.2f}".replace("-0.00", "0.00").replace("+0.00", "0.00"),
        f"c{tone}",
        "; ".join([words, *overlaps]),
    )


def _frontier(ranks: Mapping[str, Any]) -> Frontier:
    points = [(n_bytes, error) for n_bytes, error in ranks["frontier"] if n_bytes > 0]
    known = [*ranks["fixed"], ranks["asked"]]
    sizes = [n for n, _ in points] + [choice["size_bytes"] for choice in known]
    least, most = log10(max(1, min(sizes))), log10(max(max(sizes), min(sizes) + 1))
    top = max([error for _, error in points] + [choice["error"] for choice in known] + [1e-9])

    def place(n_bytes: float, error: float, label: str = "") -> Point:
        share = (log10(max(1, n_bytes)) - least) / (most - least)
        x = LEFT + share * (WIDE - LEFT - 12)
        return Point(round(x, 1), round((HIGH - BOTTOM) * (1 - error / top) + 8, 1), label)

    line = " ".join(f"{p.x},{p.y}" for p in (place(*point) for point in points))
    across = [10 ** (least + (most - least) * n / 3) for n in range(4)]
    return Frontier(
        line,
        tuple(place(c["size_bytes"], c["error"], f"{c['value']:g}") for c in ranks["fixed"]),
        place(ranks["asked"]["size_bytes"], ranks["asked"]["error"]),
        tuple(Point(place(n, 0).x, HIGH, size(round(n))) for n in across),
        tuple(Point(0, place(1, top * n / 2).y, percent(top * n / 2)) for n in range(3)),
    )


def _options(ranks: Mapping[str, Any], bench: Bench) -> Iterator[Option]:
    asked = (ranks["asked"]["name"], ranks["asked"]["value"])
    exact = [] if bench.is_full else [ranks["exact"]]
    energies = [choice for choice in ranks["energy"] if choice["value"] in _ENERGIES]
    offered = [*exact, *filter(_is_usual, ranks["fixed"]), *energies]
    if asked not in [(choice["name"], choice["value"]) for choice in offered]:
        offered.insert(len(exact), ranks["asked"])
    for choice in offered:
        name, value = choice["name"], choice["value"]
        rank = "exact" if name == "exact" else f"{name}:{value:g}"
        yield Option(
            _NAMES[name].format(value=value),
            size(choice["size_bytes"]),
            percent(choice["error"]),
            bench.address(rank=rank),
            (name, value) == asked,
        )


_NAMES = {
    "exact": "exact",
    "fixed": "rank {value:g}",
    "energy": "{value:.0%} of the energy",
    "shared": "shared as rank {value:g}",
    "budget_bytes": "{value:,.0f} bytes",
}
_ENERGIES = (0.9, 0.99)


def _is_usual(choice: Mapping[str, Any]) -> bool:
    """A power of two: what people choose, and few enough to look through."""
    rank = int(choice["value"])
    return rank & (rank - 1) == 0


def _losses(storage: Any) -> Iterator[str]:
    if storage is None:
        return
    parts = [
        f"{_DTYPES.get(rounding['dtype'], rounding['dtype'])} {percent(rounding['error'])}"
        + (" (overflows)" if rounding["overflows"] else "")
        for rounding in storage["factors"]
    ]
    if parts:
        yield f"Rounding loses, of the change: {', '.join(parts)}."
    for bake in storage["bake"]:
        if bake["is_base"] and bake["overflows"]:
            yield f"The base's {_DTYPES.get(bake['dtype'], bake['dtype'])} does not hold the sum."
        elif bake["is_base"]:
            yield (
                f"Baked into the base's {_DTYPES.get(bake['dtype'], bake['dtype'])}, {percent(bake['gain'])} of the change"
                f" arrives and {percent(bake['unchanged'])} of the values stay what they were."
            )


def _range(pair: Sequence[int]) -> str:
    low, high = pair
    return str(low) if low == high else f"{low} to {high}"
