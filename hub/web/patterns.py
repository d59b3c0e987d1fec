"""A calm picture for a file that has none, drawn from its own numbers (hub/adapters/profile.py)."""

import math
from collections.abc import Sequence
from itertools import pairwise

WIDTH, HEIGHT = 280, 360
_LAYERS = 5
_OPEN = (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
    ' preserveAspectRatio="xMidYMid slice">'
)


def pattern_svg(profile: str, seed: str) -> str:
    """Hills whose outline is the profile; the seed (hexadecimal digits) gives their colours.

    Dark at the foot, where a card has its white words.
    """
    heights = [int(digit) for digit in profile]
    hue = int(seed[:4], 16) % 360
    turn = 35 + int(seed[4:6], 16) % 60
    sky, glow = _colour(0.80, 0.045, hue + turn), _colour(0.90, 0.05, hue + 1.6 * turn)
    parts = [
        _OPEN,
        f'<linearGradient id="s" x2="0" y2="1"><stop stop-color="{sky}"/>',
        f'<stop offset=".7" stop-color="{glow}"/></linearGradient>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="url(#s)"/>',
    ]
    for layer in range(_LAYERS):
        depth = layer / (_LAYERS - 1)
        shift = layer * (3 + int(seed[6:8], 16) % 7)
        shifted = heights[shift % len(heights) :] + heights[: shift % len(heights)]
        outline = _hills(_smooth(shifted), base=150 + 175 * depth, swing=92 - 46 * depth)
        fill = _colour(0.74 - 0.42 * depth, 0.055 + 0.02 * depth, hue + turn * (1 - depth))
        parts.append(f'<path d="{outline}" fill="{fill}"/>')
    return "".join((*parts, "</svg>"))


def _smooth(values: Sequence[int]) -> list[float]:
    """Each value with its neighbours, so that one loud tensor is a hill and not a needle."""
    n = len(values)
    weights = [math.exp(-((k / 2) ** 2)) for k in range(-4, 5)]
    return [
        sum(w * values[(i + k) % n] for k, w in zip(range(-4, 5), weights, strict=True))
        / sum(weights)
        for i in range(n)
    ]


def _hills(values: Sequence[float], *, base: float, swing: float) -> str:
    step = WIDTH / (len(values) - 1)
    points = [(i * step, base - swing * (value - 4.5) / 4.5) for i, value in enumerate(values)]
    curve = [f"M0 {HEIGHT}V{points[0][1]:.1f}"]
    for (x0, y0), (x1, y1) in pairwise(points):
        middle = (x0 + x1) / 2
        curve.append(f"C{middle:.1f} {y0:.1f} {middle:.1f} {y1:.1f} {x1:.1f} {y1:.1f}")
    return "".join((*curve, f"V{HEIGHT}Z"))


def _colour(lightness: float, chroma: float, hue: float) -> str:
    return f"oklch({lightness:.3f} {chroma:.3f} {hue % 360:.0f})"
