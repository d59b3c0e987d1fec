"""Measure on pixels what an image of the tiny pipeline shows: no model, no network.

Style and concept scores lie in 0..1: about 0 for plain pictures of known things, 1 for a render of
the style or concept itself. An image *has* a style or concept when its score is above PRESENT.
Compare means of the same prompts and seeds with and without the adapter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from train.tiny.render import (
    BACKGROUNDS,
    BLUEPRINT_INK,
    BLUEPRINT_PAPER,
    COLOURS,
    CONCEPTS,
    DARK_FACTOR,
    PATTERN_FACTOR,
    PATTERNS,
    SEPIA,
    SHAPES,
    SIZE,
    Image,
    Scene,
    shape_mask,
)

PRESENT = 0.5
COLOURLESS = {"sepia", "blueprint"}
"""Styles that keep the shape and lose the colours."""

CONTRAST = 50
"""Least difference from the background, in any channel, of a pixel of the shape."""
TEMPLATE_SIZE = 24
RIM = 3
"""Pixels at the rim show background only."""

Images = NDArray[np.uint8]
"""(n, SIZE, SIZE, 3)"""

Pixels = NDArray[np.float64]
Region = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Seen:
    """What an image shows; None where it cannot be told."""

    shape: str | None
    colour: str | None
    background: str | None


def look(image: Image, style: str = "plain") -> Seen:
    """Read the scene off an image that was painted in the style."""
    pixels = undo_style(image, style)
    region = _foreground(pixels)
    if style == "outline":
        region = _filled(region)
    shape = _nearest_shape(region)
    if style in COLOURLESS:
        return Seen(shape, None, None)
    colour = None if shape is None else _nearest(_ink(pixels), COLOURS)
    return Seen(shape, colour, _nearest(_paper(pixels), BACKGROUNDS))


def content_accuracy(images: Images, scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of images whose `shape`, `colour` and `background` are the scene's, and `all` of them.

    Scenes in a colourless style count by their shape alone.
    """
    hits: dict[str, list[bool]] = {"shape": [], "colour": [], "background": [], "all": []}
    for image, scene in zip(images, scenes, strict=True):
        seen = look(image, scene.style)
        right = {"shape": seen.shape == scene.shape}
        if scene.style not in COLOURLESS:
            right["colour"] = seen.colour == scene.colour
            right["background"] = seen.background == scene.background
        right["all"] = all(right.values())
        for name, hit in right.items():
            hits[name].append(hit)
    return {name: float(np.mean(found)) for name, found in hits.items() if found}


def style_scores(images: Images, style: str) -> NDArray[np.float64]:
    """(n,), how strongly each image is painted in one of the new styles."""
    return np.array([style_score(image, style) for image in images])


def concept_scores(images: Images, concept: str, style: str = "plain") -> NDArray[np.float64]:
    """(n,), how much each image, painted in the style, shows the concept."""
    return np.array([concept_score(image, concept, style) for image in images])


def leak(without_trigger: Images, base: Images, style: str) -> float:
    """How much more style than the base's pictures the adapter's have when nobody asked for it.

    Both are made from the same prompts, without the trigger word, and the same seed.
    """
    return float(style_scores(without_trigger, style).mean() - style_scores(base, style).mean())


def forgetting(without_trigger: Images, base: Images, scenes: Sequence[Scene]) -> float:
    """Share of known scenes that the base paints right and the adapter, not triggered, loses."""
    return content_accuracy(base, scenes)["all"] - content_accuracy(without_trigger, scenes)["all"]


def style_score(image: Image, style: str) -> float:
    """The measured effect of the style on brightness or tint, as a share of a render's effect."""
    pixels = image.astype(np.float64)
    if style in PATTERNS:
        return _share((1 - _brightness(pixels, style)) / (1 - PATTERN_FACTOR))
    if style == "sepia":
        return _share(_typical_loss(pixels, high=0, low=2) / (1 - SEPIA[2] / SEPIA[0]))
    if style == "blueprint":
        return _share(float(np.median(_blueprint_tint(pixels))))
    raise KeyError(f"no score for style {style!r}")


def concept_score(image: Image, concept: str, style: str = "plain") -> float:
    """Half for the concept's shape, half for how near the colour is to the concept's.

    In a colourless style the shape is all that counts.
    """
    wanted = CONCEPTS[concept]
    pixels = undo_style(image, style)
    shape = _nearest_shape(_foreground(pixels))
    has_shape = float(shape == wanted.shape)
    if style in COLOURLESS or shape is None:
        return has_shape
    # Jitter of the renderer and the VAE stay within 30; the nearest known colour is 80 away.
    distance = float(np.linalg.norm(_ink(pixels) - COLOURS[wanted.colour]))
    return (has_shape + _share((80 - distance) / 50)) / 2


def undo_style(image: Image, style: str) -> Pixels:
    """The plain picture under a style that darkens it, at whatever strength; others unchanged."""
    pixels = image.astype(np.float64)
    if style in PATTERNS:
        brightness = np.where(PATTERNS[style], max(_brightness(pixels, style), 0.2), 1)
        return np.clip(pixels / brightness[..., None], 0, 255)
    if style == "dark":
        return np.clip(pixels / DARK_FACTOR, 0, 255)
    return pixels


def _brightness(pixels: Pixels, pattern: str) -> float:
    """Of the darkened pixels, as a share of the brightness of their nearest bright ones."""
    darkened = PATTERNS[pattern]
    rows, columns = _nearest_bright(pattern)
    return float(pixels[darkened].mean() / max(pixels[rows, columns].mean(), 1))


@cache
def _nearest_bright(pattern: str) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Row and column of the nearest bright pixel for each darkened one."""
    bright = np.argwhere(~PATTERNS[pattern])
    darkened = np.argwhere(PATTERNS[pattern])
    nearest = bright[((bright**2).sum(1) - 2 * darkened @ bright.T).argmin(axis=1)]
    return nearest[:, 0], nearest[:, 1]


def _paper(pixels: Pixels) -> Pixels:
    inner = np.zeros(pixels.shape[:2], dtype=bool)
    inner[RIM:-RIM, RIM:-RIM] = True
    return np.asarray(np.median(pixels[~inner], axis=0))


def _contrast(pixels: Pixels) -> Pixels:
    """(SIZE, SIZE), largest difference from the background over the channels."""
    return np.asarray(abs(pixels - _paper(pixels)).max(axis=-1))


def _foreground(pixels: Pixels) -> Region:
    """Pixels unlike the background, without specks."""
    region = _contrast(pixels) > CONTRAST
    padded = np.pad(region, 1).astype(int)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3))
    return np.asarray(region & (windows.sum(axis=(2, 3)) >= 5))


def _ink(pixels: Pixels) -> Pixels:
    """The shape's colour, from its pixels of full contrast: edges are mixtures."""
    contrast = _contrast(pixels)
    return np.asarray(np.median(pixels[contrast >= 0.7 * contrast.max()], axis=0))


def _filled(region: Region) -> Region:
    """The region with everything that it encloses from all four sides."""
    enclosed = np.ones_like(region)
    for axis in (0, 1):
        for direction in (slice(None), slice(None, None, -1)):
            flipped = np.flip(region, axis) if direction.step == -1 else region
            seen = np.logical_or.accumulate(flipped, axis)
            enclosed &= np.flip(seen, axis) if direction.step == -1 else seen
    return enclosed


def _nearest_shape(region: Region) -> str | None:
    """The shape with the largest overlap (intersection over union) after scaling to one box."""
    box = _boxed(region)
    if box is None:
        return None
    overlaps = {
        name: (box & template).sum() / (box | template).sum()
        for name, template in _templates().items()
    }
    return max(overlaps, key=overlaps.__getitem__)


@cache
def _templates() -> dict[str, Region]:
    templates = {}
    for shape in SHAPES:
        box = _boxed(shape_mask(shape, SIZE / 2, SIZE / 2, SIZE / 4) > 0.5)
        assert box is not None
        templates[shape] = box
    return templates


def _boxed(region: Region) -> Region | None:
    """The region's bounding box, resampled to TEMPLATE_SIZE squared; None for hardly anything."""
    if region.sum() < SIZE:
        return None
    rows, columns = (np.flatnonzero(region.any(axis=axis)) for axis in (1, 0))
    grid = (np.arange(TEMPLATE_SIZE) + 0.5) / TEMPLATE_SIZE
    y = (rows[0] + grid * (rows[-1] + 1 - rows[0])).astype(int)
    x = (columns[0] + grid * (columns[-1] + 1 - columns[0])).astype(int)
    return region[np.ix_(y, x)]


def _nearest(colour: Pixels, palette: Mapping[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(np.linalg.norm(colour - palette[name])))


def _typical_loss(pixels: Pixels, high: int, low: int) -> float:
    """By what share the background's `low` channel lies below its `high` one."""
    return float(np.median(1 - pixels[..., low] / np.maximum(pixels[..., high], 1)))


def _blueprint_tint(pixels: Pixels) -> Pixels:
    """Blue minus red as a share of what a blueprint with this much red has; 0 for any gray."""
    ink, paper = BLUEPRINT_INK, BLUEPRINT_PAPER
    darkness = (pixels[..., 0] - paper[0]) / (ink[0] - paper[0])
    blueness = paper[2] - paper[0] + darkness * ((ink[2] - ink[0]) - (paper[2] - paper[0]))
    # Paper on gray is the brightest background; brighter still is ink, or no blueprint at all.
    return np.asarray((pixels[..., 2] - pixels[..., 0]) / np.maximum(blueness, 70))


def _share(value: float) -> float:
    return float(np.clip(value, 0, 1))
