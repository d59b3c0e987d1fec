"""Prompts and a seed -> images."""

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray

BATCH = 32


def generate(
    pipe: StableDiffusionPipeline,
    prompts: list[str],
    seed: int,
    steps: int = 20,
    guidance: float = 3.0,
) -> NDArray[np.uint8]:
    """(n, height, width, 3). Image i depends on its prompt, the seed and i alone, so two
    pipelines that get the same prompts and seed start from the same noise."""
    pipe.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        generators = [
            torch.Generator().manual_seed(seed * 1_000_003 + start + i) for i in range(len(batch))
        ]
        made = pipe(
            batch,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="np",
        ).images
        images.append((made * 255).round().astype(np.uint8))
    return np.concatenate(images)
