"""Pictures of what an adapter does, each with the prompt and seed that make it again."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from train import rendered
from train.config import Samples, TrainConfig

DEFAULT_COUNT = 9
COVER_TILE = 192
COVER_GAP = 6
COVER_PAPER = (24, 24, 27)


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture and how it was made."""

    image: Image.Image
    prompt: str
    seed: int
    steps: int
    guidance: float

    def save(self, path: Path) -> None:
        """A PNG whose `parameters` text is what A1111's web UI writes and every gallery reads."""
        width, height = self.image.size
        facts = (
            f"Steps: {self.steps}, CFG scale: {self.guidance}, Seed: {self.seed}, "
            f"Size: {width}x{height}"
        )
        text = PngInfo()
        text.add_text("parameters", f"{self.prompt}\n{facts}")
        self.image.save(path, pnginfo=text, optimize=True)


def sample_prompts(config: TrainConfig, captions: Sequence[str]) -> list[str]:
    """The configured prompts, or some that show what was learned."""
    if config.samples.prompts:
        return list(config.samples.prompts)
    if config.dataset.folder is None:
        return rendered.sample_captions(config.dataset, DEFAULT_COUNT)
    return list(dict.fromkeys(captions))[:4]


@torch.no_grad()
def make_samples(
    pipe: StableDiffusionPipeline, prompts: Sequence[str], wish: Samples, resolution: int
) -> list[Sample]:
    """One picture per prompt, each alone and from its own seed, so that anyone can repeat it."""
    samples = []
    for index, prompt in enumerate(prompts):
        seed = wish.seed + index
        made = pipe(
            prompt,
            num_inference_steps=wish.steps,
            guidance_scale=wish.guidance,
            height=resolution,
            width=resolution,
            generator=torch.Generator().manual_seed(seed),
        )
        samples.append(Sample(made.images[0], prompt, seed, wish.steps, wish.guidance))
    return samples


def cover(samples: Sequence[Sample]) -> Image.Image:
    """Up to nine samples side by side, as square as it goes, on a dark sheet."""
    shown = samples[:9]
    columns = min(len(shown), 3 if len(shown) > 4 else 2)
    rows = -(-len(shown) // columns)
    step = COVER_TILE + COVER_GAP
    sheet = Image.new("RGB", (columns * step + COVER_GAP, rows * step + COVER_GAP), COVER_PAPER)
    for index, sample in enumerate(shown):
        row, column = divmod(index, columns)
        tile = sample.image.convert("RGB").resize(
            (COVER_TILE, COVER_TILE), Image.Resampling.LANCZOS
        )
        sheet.paste(tile, (column * step + COVER_GAP, row * step + COVER_GAP))
    return sheet
