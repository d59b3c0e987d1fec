"""Pictures and scores -> a grid of real samples (PNG) and a plot with intervals (SVG)."""

from collections.abc import Callable, Mapping, Sequence
from html import escape

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from train.tiny import metrics, render

from .scores import Asked
from .statistics import Estimate
from .study import Pair

ZOOM = 2
TILE = render.SIZE * ZOOM
GAP = 4
LEFT, TOP = 190, 40
PAPER, INK, FAINT = "#ffffff", "#1c1c22", "#9a9aa5"

Paint = Callable[[Pair, Sequence[Asked]], metrics.Images]


def grid_prompts(pairs: Sequence[Pair]) -> list[tuple[Pair, Asked]]:
    """Rows: three pairs with both words, and of the first pair each word alone and none."""
    rows = [(pair, _together(pair, "white")) for pair in pairs[:3]]
    first = pairs[0]
    concept = render.CONCEPTS[first.concept]
    styled = render.Scene("square", "green", "white", first.style)
    plain = concept.scene("white")
    known = render.Scene("triangle", "blue", "white")
    rows += [
        (first, Asked("style", styled, render.caption(styled))),
        (first, Asked("concept", plain, render.caption(plain, concept.word))),
        (first, Asked("old", known, render.caption(known))),
    ]
    return rows


def grid(columns: Mapping[str, Paint], pairs: Sequence[Pair]) -> Image.Image:
    """One row for each prompt, one column for each way to combine; pixels enlarged as they are."""
    rows = grid_prompts(pairs)
    width = LEFT + len(columns) * (TILE + GAP)
    sheet = Image.new("RGB", (width, TOP + len(rows) * (TILE + GAP)), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column, (label, paint) in enumerate(columns.items()):
        x = LEFT + column * (TILE + GAP)
        draw.multiline_text(
            (x + TILE / 2, TOP - 4), label, INK, font, anchor="md", align="center", spacing=2
        )
        for row, picture in enumerate(_painted(paint, rows)):
            tile = Image.fromarray(picture).resize((TILE, TILE), Image.Resampling.NEAREST)
            sheet.paste(tile, (x, TOP + row * (TILE + GAP)))
    for row, (_, asked) in enumerate(rows):
        place = (8, TOP + row * (TILE + GAP) + TILE / 2)
        draw.multiline_text(place, _wrapped(asked.prompt), INK, font, anchor="lm", spacing=4)
    return sheet.quantize(255, dither=Image.Dither.NONE)


def _painted(paint: Paint, rows: Sequence[tuple[Pair, Asked]]) -> list[metrics.Images]:
    """The pictures of one column; what one pair is asked for is painted at once."""
    pairs = list(dict.fromkeys(pair for pair, _ in rows))
    found = {
        (pair, asked): picture
        for pair in pairs
        for mine in [[asked for whose, asked in rows if whose == pair]]
        for asked, picture in zip(mine, paint(pair, mine), strict=True)
    }
    return [found[row] for row in rows]


def _together(pair: Pair, background: str) -> Asked:
    concept = render.CONCEPTS[pair.concept]
    scene = concept.scene(background, pair.style)
    return Asked("both", scene, render.caption(scene, concept.word))


def _wrapped(text: str, width: int = 24) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


ROW, SIDE, LABELS, EDGE = 24, 520, 190, 24
HEAD = 48
COLOURS = {"style": "#c2571a", "concept": "#7a3fb0", "both": "#1b7f5c", "kept": "#2f6fb7"}


def plot(rows: Mapping[str, Mapping[str, Estimate]], reference: str) -> str:
    """An SVG with one line for each name: its overall score with the interval, and what is in it.

    A row has the scores of COLOURS and `overall`, in 0..1; a line goes down from `reference`'s.
    """
    width, height = LABELS + SIDE + EDGE, HEAD + ROW * len(rows) + EDGE + 16
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    parts = [f'<rect width="100%" height="100%" fill="{PAPER}"/>', *_legend(), *_axis(len(rows))]
    at = _x(rows[reference]["overall"].mean)
    line = f"M{at:.1f} {HEAD}V{HEAD + ROW * len(rows)}"
    parts.append(f'<path d="{line}" stroke="{INK}" stroke-dasharray="3 3" stroke-opacity=".6"/>')
    for index, (name, found) in enumerate(rows.items()):
        y = HEAD + ROW * (index + 0.5)
        parts += [_text(LABELS - 14, y + 4, name, "end"), *_marks(found, y)]
    font = 'font-family="sans-serif" font-size="13"'
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>\n{body}\n</svg>\n'


def _marks(found: Mapping[str, Estimate], y: float) -> list[str]:
    whole = found["overall"]
    left, right = (_x(v) for v in np.clip([whole.mean - whole.half, whole.mean + whole.half], 0, 1))
    dots = [_dot(_x(found[name].mean), y, 4, colour) for name, colour in COLOURS.items()]
    bar = f'<path d="M{left:.1f} {y}H{right:.1f}" stroke="{INK}" stroke-width="3"/>'
    return [bar, *dots, _dot(_x(whole.mean), y, 6, INK)]


def _legend() -> list[str]:
    parts = []
    for index, (name, colour) in enumerate({"overall": INK, **COLOURS}.items()):
        x = LABELS + index * 84
        parts += [_dot(x + 5, 14, 5, colour), _text(x + 16, 18, name, "start")]
    return parts


def _axis(n_rows: int) -> list[str]:
    bottom = HEAD + ROW * n_rows
    parts = []
    for tick in (0, 0.2, 0.4, 0.6, 0.8, 1):
        line = f"M{_x(tick):.1f} {HEAD}V{bottom}"
        parts.append(f'<path d="{line}" stroke="{FAINT}" stroke-opacity=".35"/>')
        parts += [_text(_x(tick), y, f"{tick:g}", "middle") for y in (HEAD - 8, bottom + 18)]
    return parts


def _dot(x: float, y: float, radius: float, colour: str) -> str:
    return (
        f'<circle cx="{x:.1f}" cy="{y:g}" r="{radius:g}" fill="{colour}" '
        f'stroke="{PAPER}" stroke-width="1"/>'
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{INK}">{escape(text)}</text>'
    )


def _x(share: float) -> float:
    return LABELS + SIDE * share
