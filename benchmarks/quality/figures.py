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


SIDE, MARGIN, LABELS = 520, 60, 190


def plot(points: Mapping[str, tuple[Estimate, Estimate]], x_label: str, y_label: str) -> str:
    """An SVG with one point and two intervals for each name: (style, concept) in 0..1."""
    width, height = SIDE + 2 * MARGIN + LABELS, SIDE + 2 * MARGIN
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    names = sorted(points, key=lambda name: -points[name][1].mean)
    heights = _spread([_y(points[name][1].mean) for name in names])
    parts = [f'<rect width="100%" height="100%" fill="{PAPER}"/>', *_axes(x_label, y_label)]
    for index, (name, label) in enumerate(zip(names, heights, strict=True)):
        colour = f"hsl({360 * index / len(names):.0f} 65% 42%)"
        marks = _marks(*points[name], label) + _text(MARGIN + SIDE + 30, label + 4, name, "start")
        parts.append(f'<g stroke="{colour}" fill="{colour}">{marks}</g>')
    body = "\n".join(parts)
    font = 'font-family="sans-serif" font-size="13"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>\n{body}\n</svg>\n'


def _marks(x: Estimate, y: Estimate, label: float) -> str:
    """A dot, its intervals, and a line to the height of its label."""
    left, right = (_x(v) for v in np.clip([x.mean - x.half, x.mean + x.half], 0, 1))
    low, high = (_y(v) for v in np.clip([y.mean - y.half, y.mean + y.half], 0, 1))
    at_x, at_y = _x(x.mean), _y(y.mean)
    bars = f"M{left:.1f} {at_y:.1f}H{right:.1f}M{at_x:.1f} {low:.1f}V{high:.1f}"
    lead = f"M{at_x:.1f} {at_y:.1f}L{MARGIN + SIDE + 24} {label:.1f}"
    return (
        f'<path d="{bars}" stroke-opacity=".45"/>'
        f'<path d="{lead}" stroke-opacity=".25" stroke-dasharray="2 3"/>'
        f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="4"/>'
    )


def _axes(x_label: str, y_label: str) -> list[str]:
    lines = ""
    texts = []
    for tick in (0, 0.2, 0.4, 0.6, 0.8, 1):
        lines += f"M{_x(tick):.0f} {_y(0)}V{_y(1)}M{_x(0)} {_y(tick):.0f}H{_x(1)}"
        texts += [
            _text(_x(tick), _y(0) + 18, f"{tick:g}", "middle"),
            _text(_x(0) - 8, _y(tick) + 4, f"{tick:g}", "end"),
        ]
    middle = MARGIN + SIDE / 2
    turned = _text(0, 0, y_label, "middle")
    return [
        f'<path d="{lines}" stroke="{FAINT}" stroke-opacity=".35"/>',
        f'<g fill="{INK}">',
        *texts,
        _text(middle, _y(0) + 42, x_label, "middle"),
        f'<g transform="translate(18 {middle}) rotate(-90)">{turned}</g></g>',
    ]


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" stroke="none">{escape(text)}</text>'
    )


def _spread(heights: Sequence[float], apart: float = 17) -> list[float]:
    """Heights of labels in the given order, none nearer to the next than `apart`."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + apart) if placed else height)
    # What ran over the lower edge pushes the ones above it up again.
    limit = float(MARGIN + SIDE)
    for index in reversed(range(len(placed))):
        placed[index] = min(placed[index], limit)
        limit = placed[index] - apart
    return placed


def _x(share: float) -> float:
    return MARGIN + SIDE * share


def _y(share: float) -> float:
    return MARGIN + SIDE * (1 - share)
