"""Numbers for a trained adapter, always against the base in the same run with the same seeds.

score        mean style or concept score of prompts with the trigger, 0..1
base_score   the same prompts painted by the base
present      share of pictures in which the style or concept is there
content      share of pictures with the trigger that show the shape (and colour) asked for
leak         how much of it appears without the trigger, above the base
forgetting   share of known scenes the base paints right and the adapter does not
drift        mean absolute pixel difference to the base on prompts without the trigger, 0..1

A folder dataset has no ground truth for style or concept, so it gets its drift only.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray

from train import rendered
from train.config import BUILT_IN, TrainConfig
from train.tiny import metrics, render
from train.tiny.generate import generate

SEED = 7
DRIFT_PROMPTS = ("a photo of a tree", "a city street at night", "a portrait of a person", "a cup")
CONCEPT_COPIES = 16


def evaluate(pipe: StableDiffusionPipeline, config: TrainConfig) -> dict[str, float]:
    """Scores of the adapter that is live in the pipeline; rounded to four places."""
    if config.dataset.style is not None:
        scores = _style(pipe, config, config.dataset.style)
    elif config.dataset.concept is not None:
        scores = _concept(pipe, config, config.dataset.concept)
    else:
        is_tiny = config.base == BUILT_IN
        prompts = rendered.known_captions()[:8] if is_tiny else list(DRIFT_PROMPTS)
        with base_only(pipe):
            base = _paint(pipe, prompts, config)
        scores = {"drift": _difference(_paint(pipe, prompts, config), base)}
    return {name: round(float(value), 4) for name, value in scores.items()}


def _style(pipe: StableDiffusionPipeline, config: TrainConfig, style: str) -> dict[str, float]:
    scenes = list(render.known_scenes(style))
    asked = _paint(pipe, [render.caption(scene) for scene in scenes], config)
    scores = metrics.style_scores(asked, style)
    known = _known(pipe, config, len(scenes))
    with base_only(pipe):
        base = _paint(pipe, [render.caption(scene) for scene in scenes], config)
    return {
        "score": scores.mean(),
        "base_score": metrics.style_scores(base, style).mean(),
        "present": (scores > metrics.PRESENT).mean(),
        "content": metrics.content_accuracy(asked, scenes)["all"],
        "leak": metrics.leak(known.adapter, known.base, style),
        **known.scores(),
    }


def _concept(pipe: StableDiffusionPipeline, config: TrainConfig, name: str) -> dict[str, float]:
    concept = render.CONCEPTS[name]
    scenes = [concept.scene(background) for background in render.BACKGROUNDS] * CONCEPT_COPIES
    prompts = [render.caption(scene, concept.word) for scene in scenes]
    asked = _paint(pipe, prompts, config)
    scores = metrics.concept_scores(asked, name)
    known = _known(pipe, config, 2 * CONCEPT_COPIES)
    with base_only(pipe):
        base = _paint(pipe, prompts, config)
    leaked = metrics.concept_scores(known.adapter, name) - metrics.concept_scores(known.base, name)
    return {
        "score": scores.mean(),
        "base_score": metrics.concept_scores(base, name).mean(),
        "present": (scores > metrics.PRESENT).mean(),
        "content": metrics.content_accuracy(asked, scenes)["all"],
        "leak": leaked.mean(),
        **known.scores(),
    }


@dataclass(frozen=True, slots=True)
class _Known:
    """Plain scenes without the trigger, from the adapter and from the base."""

    scenes: Sequence[render.Scene]
    adapter: NDArray[np.uint8]
    base: NDArray[np.uint8]

    def scores(self) -> dict[str, float]:
        return {
            "forgetting": metrics.forgetting(self.adapter, self.base, self.scenes),
            "drift": _difference(self.adapter, self.base),
        }


def _known(pipe: StableDiffusionPipeline, config: TrainConfig, count: int) -> _Known:
    scenes = list(render.known_scenes())[:count]
    prompts = [render.caption(scene) for scene in scenes]
    adapter = _paint(pipe, prompts, config)
    with base_only(pipe):
        base = _paint(pipe, prompts, config)
    return _Known(scenes, adapter, base)


@contextmanager
def base_only(pipe: StableDiffusionPipeline) -> Iterator[None]:
    """The pipeline without the effect of its adapter."""
    pipe.unet.disable_adapters()
    try:
        yield
    finally:
        pipe.unet.enable_adapters()


def _paint(
    pipe: StableDiffusionPipeline, prompts: list[str], config: TrainConfig
) -> NDArray[np.uint8]:
    with torch.no_grad():
        return generate(
            pipe, prompts, SEED, steps=config.samples.steps, guidance=config.samples.guidance
        )


def _difference(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    return float(np.abs(one.astype(np.float64) - other).mean() / 255)
