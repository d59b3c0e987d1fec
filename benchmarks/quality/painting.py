"""Prompts -> pictures, by the tiny pipeline with a change in the weights of its UNet."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from train.tiny import metrics
from train.tiny.generate import generate
from train.tiny.load import load_pipeline

from .scores import Asked, prompts

STEPS = 10
"""Sampler steps. 20, which training uses, move the scores by 0.02 and take twice the time."""

SEED = 11
"""Of the noise; the same for all pairs and variants, so that differences are of the weights."""

UNET = Path("unet") / "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True, slots=True)
class Change:
    """What is done to the base: adapters at their strengths, or a UNet's weights in its place."""

    adapters: tuple[tuple[Path, float], ...] = ()
    unet: Path | None = None
    is_live: bool = False
    """Adapters beside the weights, as diffusers stacks them; otherwise they are fused."""


class Painter:
    """One pipeline for all pictures; every change is undone by loading the base's weights again."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._pipe: StableDiffusionPipeline = load_pipeline()
        self._base = {key: value.clone() for key, value in self._pipe.unet.state_dict().items()}

    def paint(self, change: Change, asked: Sequence[Asked]) -> metrics.Images:
        """(n, 64, 64, 3), one picture for each prompt."""
        with self._changed(change), torch.no_grad():
            return generate(self._pipe, prompts(asked), SEED, steps=STEPS)

    @contextmanager
    def _changed(self, change: Change) -> Iterator[None]:
        unet = self._pipe.unet
        if change.unet is not None:
            unet.load_state_dict({key: v.float() for key, v in load_file(change.unet).items()})
        names = [f"input{index}" for index in range(len(change.adapters))]
        for name, (path, _) in zip(names, change.adapters, strict=True):
            self._pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
        if names:
            self._pipe.set_adapters(names, [strength for _, strength in change.adapters])
            if not change.is_live:
                self._pipe.fuse_lora(adapter_names=names)
        try:
            yield
        finally:
            if names:
                self._pipe.unload_lora_weights()
            unet.load_state_dict(self._base)
