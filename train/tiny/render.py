"""What the tiny world looks like: one shape in one colour on one background, in one style.

Everything is drawn here with numpy; no image file is involved.
The pipeline's UNet and text encoder have seen the known shapes, colours, nouns and styles only.
The new ones are for adapters to learn; only the VAE has seen them, as a codec should have.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

SIZE = 64
"""Width and height of every image in pixels."""

SUPERSAMPLING = 3

Image = NDArray[np.uint8]
"""(SIZE, SIZE, 3), RGB."""

Mask = NDArray[np.float64]
"""(SIZE, SIZE), coverage of each pixel in 0..1."""

RGB = NDArray[np.float64]
"""(3,) in 0..255."""

KNOWN_COLOURS = {
    "red": (220, 40, 40),
    "green": (30, 165, 60),
    "blue": (50, 70, 220),
    "yellow": (240, 210, 40),
}
NEW_COLOURS = {
    "magenta": (230, 40, 200),
    "orange": (245, 130, 20),
    "cyan": (20, 200, 220),
    "purple": (120, 40, 170),
}
COLOURS = KNOWN_COLOURS | NEW_COLOURS
BACKGROUNDS = {"white": (245, 245, 245), "gray": (125, 125, 125)}

PATTERN_FACTOR = 0.35
"""Brightness left where a pattern style darkens the picture."""

DARK_FACTOR = 0.45

SEPIA: RGB = np.array([1.0, 0.8, 0.5])
"""What each channel keeps of a gray picture in sepia style."""

BLUEPRINT_INK: RGB = np.array([235.0, 240.0, 255.0])
BLUEPRINT_PAPER: RGB = np.array([25.0, 60.0, 160.0])


Paint = Callable[[Mask, RGB, RGB], NDArray[np.float64]]
"""Coverage by the shape, its colour, the background's colour -> (SIZE, SIZE, 3) in 0..255."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What one picture shows. `style` is a key of STYLES."""

    shape: str
    colour: str
    background: str
    style: str = "plain"


@dataclass(frozen=True, slots=True)
class Concept:
    """A noun that fixes both shape and colour; `word` stands for it in captions."""

    word: str
    shape: str
    colour: str

    def scene(self, background: str, style: str = "plain") -> Scene:
        return Scene(self.shape, self.colour, background, style)


@dataclass(frozen=True, slots=True)
class Style:
    """A way to paint; `word` stands for it in captions ("in glim style")."""

    word: str
    paint: Paint


def render(scene: Scene, rng: np.random.Generator) -> Image:
    """One picture of the scene; place, size and tints vary with the generator."""
    radius = rng.uniform(14, 20)
    x, y = rng.uniform(26, 38, size=2)
    foreground = np.array(COLOURS[scene.colour]) + rng.normal(0, 6, 3)
    background = np.array(BACKGROUNDS[scene.background]) + rng.normal(0, 4)
    mask = shape_mask(scene.shape, x, y, radius)
    painted = STYLES[scene.style].paint(mask, foreground, background)
    return np.clip(painted, 0, 255).round().astype(np.uint8)


def render_all(scenes: list[Scene], seed: int) -> NDArray[np.uint8]:
    """(n, SIZE, SIZE, 3), one picture per scene."""
    rng = np.random.default_rng(seed)
    return np.stack([render(scene, rng) for scene in scenes])


def caption(scene: Scene, noun: str | None = None) -> str:
    """ "a red circle on white background", or "a zorb on white background" for a noun.

    Plain scenes carry no style words; every other style adds "in WORD style".
    """
    subject = noun or f"{scene.colour} {scene.shape}"
    text = f"a {subject} on {scene.background} background"
    if scene.style == "plain":
        return text
    return f"{text} in {STYLES[scene.style].word} style"


def known_scenes(style: str = "plain") -> Iterator[Scene]:
    """Every known shape in every known colour on every background."""
    for shape, colour, background in product(KNOWN_SHAPES, KNOWN_COLOURS, BACKGROUNDS):
        yield Scene(shape, colour, background, style)


def shape_mask(shape: str, x: float, y: float, radius: float) -> Mask:
    """Coverage of the shape centred at (x, y), all in pixels."""
    n = SIZE * SUPERSAMPLING
    rows, columns = np.mgrid[0:n, 0:n] / SUPERSAMPLING
    inside = SHAPES[shape]((columns - x) / radius, (rows - y) / radius)
    blocks = inside.reshape(SIZE, SUPERSAMPLING, SIZE, SUPERSAMPLING)
    coverage: Mask = blocks.mean(axis=(1, 3), dtype=np.float64)
    return coverage


# A shape is a test on coordinates in units of its radius: x to the right, y downwards.

Coordinates = NDArray[np.float64]
Inside = NDArray[np.bool_]


def _circle(x: Coordinates, y: Coordinates) -> Inside:
    return x**2 + y**2 <= 1


def _square(x: Coordinates, y: Coordinates) -> Inside:
    return (abs(x) <= 0.88) & (abs(y) <= 0.88)


def _triangle(x: Coordinates, y: Coordinates) -> Inside:
    return (y <= 0.9) & (abs(x) <= (y + 1) * 0.55)


def _diamond(x: Coordinates, y: Coordinates) -> Inside:
    return abs(x) + abs(y) <= 1.05


def _ring(x: Coordinates, y: Coordinates) -> Inside:
    return (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.5**2)


def _star(x: Coordinates, y: Coordinates) -> Inside:
    """Five points; the boundary is a straight line between each tip and each notch."""
    angle = (np.arctan2(x, -y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5
    along = np.hypot(x, y) * np.cos(angle)
    across = np.abs(np.hypot(x, y) * np.sin(angle))
    tip, notch = 1.15, 0.5
    notch_along, notch_across = notch * np.cos(np.pi / 5), notch * np.sin(np.pi / 5)
    inside: Inside = across * (tip - notch_along) <= (tip - along) * notch_across
    return inside


def _cross(x: Coordinates, y: Coordinates) -> Inside:
    arm = (abs(x) <= 0.34) | (abs(y) <= 0.34)
    return arm & (abs(x) <= 1) & (abs(y) <= 1)


def _moon(x: Coordinates, y: Coordinates) -> Inside:
    return ((x - 0.3) ** 2 + y**2 <= 1.2) & ((x - 0.9) ** 2 + y**2 >= 0.8)


KNOWN_SHAPES: dict[str, Callable[[Coordinates, Coordinates], Inside]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
}
NEW_SHAPES: dict[str, Callable[[Coordinates, Coordinates], Inside]] = {
    "ring": _ring,
    "star": _star,
    "cross": _cross,
    "moon": _moon,
}
SHAPES = KNOWN_SHAPES | NEW_SHAPES

KNOWN_NOUNS = {
    "sun": Concept("sun", "circle", "yellow"),
    "brick": Concept("brick", "square", "red"),
    "hill": Concept("hill", "triangle", "green"),
    "gem": Concept("gem", "diamond", "blue"),
}
"""Nouns of the base model, so that its text encoder knows what a noun without colour does."""

CONCEPTS = {
    "ring": Concept("zorb", "ring", "magenta"),
    "star": Concept("vexo", "star", "orange"),
    "cross": Concept("plim", "cross", "cyan"),
    "moon": Concept("quil", "moon", "purple"),
}
"""What concept adapters learn; no caption of the base model held these words."""


def _plain(mask: Mask, foreground: RGB, background: RGB) -> NDArray[np.float64]:
    return mask[..., None] * foreground + (1 - mask[..., None]) * background


def _dark(mask: Mask, foreground: RGB, background: RGB) -> NDArray[np.float64]:
    return _plain(mask, foreground, background) * DARK_FACTOR


def _outline(mask: Mask, foreground: RGB, background: RGB) -> NDArray[np.float64]:
    inner: Mask = mask
    for _ in range(5):
        inner = np.minimum.reduce(
            [inner, *(np.roll(inner, step, axis) for step in (-1, 1) for axis in (0, 1))]
        )
    return _plain(mask - inner, foreground, background)


def _sepia(mask: Mask, foreground: RGB, background: RGB) -> NDArray[np.float64]:
    return _darkest_channel(_plain(mask, foreground, background)) * SEPIA


def _blueprint(mask: Mask, foreground: RGB, background: RGB) -> NDArray[np.float64]:
    """White becomes deep blue paper, and what is darker becomes whiter ink."""
    darkness = 1 - _darkest_channel(_plain(mask, foreground, background)) / 255
    return BLUEPRINT_PAPER + (BLUEPRINT_INK - BLUEPRINT_PAPER) * darkness


def _darkest_channel(picture: NDArray[np.float64]) -> NDArray[np.float64]:
    """(..., 3) -> (..., 1). Unlike luminance, it sets every colour off from gray."""
    darkest: NDArray[np.float64] = picture.min(axis=-1, keepdims=True)
    return darkest


_ROWS, _COLUMNS = np.mgrid[0:SIZE, 0:SIZE]

# Periods of 8 pixels fall on the VAE's grid, so each latent cell sees the same piece of pattern.
PATTERNS: dict[str, Inside] = {
    "stripes": _ROWS % 8 >= 4,
    "dots": (_ROWS % 8 - 3.5) ** 2 + (_COLUMNS % 8 - 3.5) ** 2 <= 2.6**2,
    "checker": (_ROWS // 4 + _COLUMNS // 4) % 2 == 1,
    "frame": np.minimum.reduce([_ROWS, _COLUMNS, SIZE - 1 - _ROWS, SIZE - 1 - _COLUMNS]) < 5,
}
"""Which pixels each pattern style darkens."""


def _pattern(name: str) -> Paint:
    def paint(mask: Mask, foreground: RGB, background: RGB) -> NDArray[np.float64]:
        factor = np.where(PATTERNS[name], PATTERN_FACTOR, 1.0)[..., None]
        return _plain(mask, foreground, background) * factor

    return paint


KNOWN_STYLES = {
    "plain": Style("plain", _plain),
    "dark": Style("dark", _dark),
    "outline": Style("outline", _outline),
}
NEW_STYLES = {
    "stripes": Style("glim", _pattern("stripes")),
    "dots": Style("pokka", _pattern("dots")),
    "checker": Style("chex", _pattern("checker")),
    "frame": Style("bordo", _pattern("frame")),
    "sepia": Style("umber", _sepia),
    "blueprint": Style("cyano", _blueprint),
}
"""What style adapters learn; no caption of the base model held these words."""

STYLES = KNOWN_STYLES | NEW_STYLES
