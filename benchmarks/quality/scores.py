"""Pictures -> numbers: does a merged adapter still do what its two inputs did, alone and together?

style     mean style score of known things asked for in the style
concept   mean concept score of the concept asked for without the style
both      mean of the lesser of the two scores where both are asked for at once
kept      1 - forgetting: share of what the base paints right without either word that is still right
content   share of the pictures in the style that show the thing asked for
overall   mean of style, concept, both and kept

All are shares in 0..1, and more is better. `both_style` and `both_concept` are the two scores of the
pictures behind `both`; `leak` is the style that shows where only known things were asked for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np

from train.tiny import metrics, render
from train.tiny.render import Scene

from .study import Pair

KINDS = ("style", "concept", "both", "old")
OVERALL = ("style", "concept", "both", "kept")


@dataclass(frozen=True, slots=True)
class Asked:
    """One picture that is asked for: what it shall show, and the words for it."""

    kind: str
    scene: Scene
    prompt: str


def asked_of(pair: Pair, n: int) -> list[Asked]:
    """n pictures of each kind: the style, the concept, both together, and what the base knows."""
    concept = render.CONCEPTS[pair.concept]
    known = list(render.known_scenes())
    # A stride without a common factor walks shapes, colours and backgrounds at once.
    known = [known[7 * index % len(known)] for index in range(len(known))]
    found: list[Asked] = []
    for kind in KINDS:
        style = pair.style if kind in ("style", "both") else "plain"
        if kind in ("style", "old"):
            scenes = [Scene(s.shape, s.colour, s.background, style) for s in known]
            words = [(scene, render.caption(scene)) for scene in scenes]
        else:
            scenes = [concept.scene(background, style) for background in render.BACKGROUNDS]
            words = [(scene, render.caption(scene, concept.word)) for scene in scenes]
        found += [Asked(kind, scene, prompt) for scene, prompt in islice(cycle(words), n)]
    return found


def prompts(asked: Sequence[Asked]) -> list[str]:
    return [one.prompt for one in asked]


def scores(
    pair: Pair, asked: Sequence[Asked], images: metrics.Images, base: metrics.Images
) -> dict[str, float]:
    """Scores of the pictures; `base` are those of the same prompts and noise without any change."""
    kinds = np.array([one.kind for one in asked])
    at = {kind: np.flatnonzero(kinds == kind) for kind in KINDS}
    scenes = {kind: [one.scene for one in asked if one.kind == kind] for kind in KINDS}
    both_style = metrics.style_scores(images[at["both"]], pair.style)
    both_concept = metrics.concept_scores(images[at["both"]], pair.concept, pair.style)
    old, old_base = images[at["old"]], base[at["old"]]
    found = {
        "style": metrics.style_scores(images[at["style"]], pair.style).mean(),
        "concept": metrics.concept_scores(images[at["concept"]], pair.concept).mean(),
        "both": np.minimum(both_style, both_concept).mean(),
        "kept": 1 - metrics.forgetting(old, old_base, scenes["old"]),
        "content": metrics.content_accuracy(images[at["style"]], scenes["style"])["all"],
        "both_style": both_style.mean(),
        "both_concept": both_concept.mean(),
        "leak": metrics.leak(old, old_base, pair.style),
    }
    return with_overall({name: float(value) for name, value in found.items()})


def with_overall(found: Mapping[str, float]) -> dict[str, float]:
    return {**found, "overall": float(np.mean([found[name] for name in OVERALL]))}
