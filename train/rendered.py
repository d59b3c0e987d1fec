"""The tiny pipeline's own data: pictures of a new style or concept, drawn by its renderer."""

import hashlib
from functools import partial
from itertools import cycle, islice

import numpy as np

from train.config import Dataset
from train.data import Example, Pixels, Report
from train.errors import BadDataset
from train.tiny import render
from train.tiny.render import Scene

DATA_SEED = 20_000
"""Added to the run's seed: the pictures differ from those the base was trained on."""


def rendered(dataset: Dataset, seed: int) -> Report:
    """`count` pictures of the style (over all known scenes) or of the concept (both backgrounds)."""
    pairs = _style_scenes(dataset.style) if dataset.style else _concept_scenes(dataset.concept)
    chosen = list(islice(cycle(pairs), dataset.count))
    images = render.render_all([scene for scene, _ in chosen], DATA_SEED + seed)
    examples = [
        Example(
            name=f"render-{index:04d}.png",
            caption=caption,
            digest=hashlib.sha256(image.tobytes()).hexdigest(),
            pixels=partial(_pixels, image),
        )
        for index, ((_, caption), image) in enumerate(zip(chosen, images, strict=True))
    ]
    return Report(tuple(examples), ())


def trigger(dataset: Dataset) -> str:
    """The word that calls the style or concept in captions."""
    if dataset.style:
        return f"{_style(dataset.style).word} style"
    return _concept(dataset.concept).word


def known_captions() -> list[str]:
    """Every scene the base knows, its nouns, and its known styles: what must not be forgotten."""
    plain = [render.caption(scene) for scene in render.known_scenes()]
    nouns = [
        render.caption(noun.scene(background), word)
        for word, noun in render.KNOWN_NOUNS.items()
        for background in render.BACKGROUNDS
    ]
    styled = [
        render.caption(scene)
        for style in render.KNOWN_STYLES
        if style != "plain"
        for scene in render.known_scenes(style)
    ]
    # Interleaved, so that any first part of the list has some of each.
    return [*_interleave(plain, [*nouns, *styled[::2]])]


def sample_captions(dataset: Dataset, count: int) -> list[str]:
    """Prompts that show what the adapter learned; styles in another scene each time."""
    scenes = _style_scenes(dataset.style) if dataset.style else _concept_scenes(dataset.concept)
    captions = [caption for _, caption in scenes]
    # A stride without a common factor walks shapes and colours at once.
    return [captions[(7 * index) % len(captions)] for index in range(count)]


def _style_scenes(name: str | None) -> list[tuple[Scene, str]]:
    assert name is not None
    _style(name)
    return [(scene, render.caption(scene)) for scene in render.known_scenes(name)]


def _concept_scenes(name: str | None) -> list[tuple[Scene, str]]:
    concept = _concept(name)
    scenes = [concept.scene(background) for background in render.BACKGROUNDS]
    return [(scene, render.caption(scene, concept.word)) for scene in scenes]


def _style(name: str) -> render.Style:
    if name not in render.NEW_STYLES:
        raise BadDataset(name, f"no such style; the renderer has {', '.join(render.NEW_STYLES)}")
    return render.NEW_STYLES[name]


def _concept(name: str | None) -> render.Concept:
    if name not in render.CONCEPTS:
        found = ", ".join(render.CONCEPTS)
        raise BadDataset(str(name), f"no such concept; the renderer has {found}")
    return render.CONCEPTS[name]


def _pixels(image: Pixels, resolution: int) -> Pixels:
    if resolution != render.SIZE:
        raise BadDataset("renderer", f"draws {render.SIZE} pixels, the run wants {resolution}")
    return np.asarray(image)


def _interleave(first: list[str], second: list[str]) -> list[str]:
    longest = max(len(first), len(second))
    return [part[i] for i in range(longest) for part in (first, second) if i < len(part)]
