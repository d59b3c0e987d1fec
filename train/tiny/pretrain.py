"""Pre-train the tiny pipeline from nothing and write it as a float16 diffusers folder.

    python -m train.tiny.pretrain OUT [--threads N]

Counted in steps and seeded, so that one machine with one thread count gives one result; the
committed weights came from two threads, in about ten minutes for the VAE and as many for the UNet.
The folder appears only when the saved weights, loaded again, pass every gate.
"""

import argparse
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from train.tiny import render
from train.tiny.generate import generate
from train.tiny.load import load_pipeline, write_sums
from train.tiny.metrics import content_accuracy
from train.tiny.models import (
    TRAIN_TIMESTEPS,
    make_noise_scheduler,
    make_sampler,
    make_text_encoder,
    make_unet,
    make_vae,
)
from train.tiny.render import Scene
from train.tiny.tokenizer import write_tokenizer

log = logging.getLogger(__name__)

SEED = 0
VAE_STEPS = 4000
UNET_STEPS = 4000
VAE_BATCH = 16
UNET_BATCH = 32
N_IMAGES = 4000
LATENT_NOISE = 0.05
"""Noise on the VAE's mean while it trains; sampling its posterior from the first step diverges."""
LEARNING_RATE = 2e-3
CAPTION_DROPOUT = 0.1
EMA_DECAY = 0.998
GATES = {"colour": 0.98, "background": 0.98, "shape": 0.9}
"""Least share of known scenes that the pipeline must paint right."""
GATE_SEEDS = (1, 2)


def pretrain(out: Path, vae_steps: int = VAE_STEPS, unet_steps: int = UNET_STEPS) -> None:
    """Train, save beside `out`, measure what was saved, and only then rename it to `out`."""
    if out.exists():
        raise FileExistsError(f"{out} is already there")
    torch.manual_seed(SEED)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        folder = Path(temporary) / out.name
        tokenizer = write_tokenizer(Path(temporary) / "tokenizer")
        vae = make_vae()
        unet = make_unet()
        text_encoder = make_text_encoder(tokenizer)
        train_vae(vae, vae_steps)
        train_unet(unet, text_encoder, tokenizer, vae, unet_steps)
        pipe = StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=make_sampler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.to(torch.float16).save_pretrained(folder)
        _compute_in_float32(folder)
        write_sums(folder)
        check_gates(load_pipeline(folder))
        os.rename(folder, out)


def _compute_in_float32(folder: Path) -> None:
    """Say float32 in the text encoder's configuration, whose weights stay float16.

    transformers takes the dtype it computes in from there, diffusers computes in float32 unless
    told otherwise; without this a plain `from_pretrained` mixes the two and fails.
    """
    path = folder / "text_encoder" / "config.json"
    config = json.loads(path.read_text()) | {"dtype": "float32"}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


class GateMissed(Exception):
    """The trained pipeline measures below a gate; carries .scores."""

    def __init__(self, scores: dict[str, float]) -> None:
        gates = [f"{name} {scores[name]:.3f} (gate {gate})" for name, gate in GATES.items()]
        super().__init__("the pipeline misses a gate and is not written: " + ", ".join(gates))
        self.scores = scores


def train_vae(vae: AutoencoderKL, steps: int) -> None:
    """Train on known and new scenes alike, then set the scaling factor to 1 / std of the latents."""
    rng = np.random.default_rng(SEED)
    images = to_tensor(render.render_all([_any_scene(rng) for _ in range(N_IMAGES)], SEED))

    def loss() -> Tensor:
        batch = images[torch.randint(len(images), (VAE_BATCH,))]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mean = vae.encode(batch).latent_dist.mean
            decoded = vae.decode(mean + LATENT_NOISE * torch.randn_like(mean)).sample
        error = decoded.float() - batch
        value: Tensor = error.pow(2).mean() + 0.2 * error.abs().mean()
        value = value + 1e-4 * mean.float().pow(2).mean()
        return value

    vae.train()
    for _ in _descend("vae", loss, list(vae.parameters()), steps, weight_decay=0.0):
        pass
    vae.eval().requires_grad_(False)
    vae.register_to_config(scaling_factor=1 / encode(vae, images).std().item())


def train_unet(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    vae: AutoencoderKL,
    steps: int,
) -> None:
    """Train UNet and text encoder together on the known scenes; both end as their average."""
    rng = np.random.default_rng(SEED + 1)
    scenes = [_known_scene(rng) for _ in range(N_IMAGES)]
    latents = encode(vae, to_tensor(render.render_all(scenes, SEED + 1)))
    latents = latents * vae.config.scaling_factor
    tokens = tokenize(tokenizer, [_known_caption(scene, rng) for scene in scenes])
    no_caption = tokenize(tokenizer, [""])
    scheduler = make_noise_scheduler()

    def loss() -> Tensor:
        chosen = torch.randint(len(latents), (UNET_BATCH,))
        dropped = torch.rand(UNET_BATCH, 1) < CAPTION_DROPOUT
        text = text_encoder(torch.where(dropped, no_caption, tokens[chosen])).last_hidden_state
        clean = latents[chosen]
        noise = torch.randn_like(clean)
        times = torch.randint(TRAIN_TIMESTEPS, (UNET_BATCH,))
        predicted = unet(scheduler.add_noise(clean, noise, times), times, text).sample
        return F.mse_loss(predicted, scheduler.get_velocity(clean, noise, times))

    unet.train()
    text_encoder.train()
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    averages = [parameter.detach().clone() for parameter in parameters]
    for step in _descend("unet", loss, parameters, steps, weight_decay=1e-3):
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - min(EMA_DECAY, step / (step + 10)))
    with torch.no_grad():
        for parameter, average in zip(parameters, averages, strict=True):
            parameter.copy_(average)
    unet.eval()
    text_encoder.eval()


def _descend(
    name: str,
    loss: Callable[[], Tensor],
    parameters: list[torch.nn.Parameter],
    steps: int,
    weight_decay: float,
) -> Iterator[int]:
    """AdamW with a short warm-up and a cosine decay; yields the number of each finished step."""
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=weight_decay)
    start = time.monotonic()
    recent: list[float] = []
    for step in range(1, steps + 1):
        done = step / steps
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, done / 0.05) * (1 + math.cos(math.pi * done)) / 2
        value = loss()
        optimizer.zero_grad()
        torch.autograd.backward(value)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        recent.append(value.item())
        if step % 100 == 0 or step == steps:
            seconds = time.monotonic() - start
            log.info("%s %d/%d loss %.4f %.0f s", name, step, steps, np.mean(recent), seconds)
            recent.clear()
        yield step


def to_tensor(images: NDArray[np.uint8]) -> Tensor:
    """(n, height, width, 3) in 0..255 -> (n, 3, height, width) in -1..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """The mean latents, before the scaling factor."""
    with torch.no_grad():
        return torch.cat([vae.encode(part).latent_dist.mean for part in torch.split(images, 100)])


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """(n, MAX_TOKENS)"""
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    return torch.as_tensor(tokens.input_ids)


def _any_scene(rng: np.random.Generator) -> Scene:
    return Scene(
        rng.choice(list(render.SHAPES)),
        rng.choice(list(render.COLOURS)),
        rng.choice(list(render.BACKGROUNDS)),
        "plain" if rng.random() < 0.35 else rng.choice(list(render.STYLES)),
    )


def _known_scene(rng: np.random.Generator) -> Scene:
    """One in five shows a known noun, so that it is seen as often as any other word."""
    background = rng.choice(list(render.BACKGROUNDS))
    style = "plain" if rng.random() < 0.6 else rng.choice(list(render.KNOWN_STYLES))
    if rng.random() < 0.2:
        noun = rng.choice(list(render.KNOWN_NOUNS))
        return render.KNOWN_NOUNS[noun].scene(background, style)
    shape = rng.choice(list(render.KNOWN_SHAPES))
    colour = rng.choice(list(render.KNOWN_COLOURS))
    return Scene(shape, colour, background, style)


def _known_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Scenes that a noun fits are called by it most of the time; plain is said now and then."""
    nouns = [
        word
        for word, noun in render.KNOWN_NOUNS.items()
        if noun.scene(scene.background, scene.style) == scene
    ]
    text = render.caption(scene, nouns[0] if nouns and rng.random() < 0.7 else None)
    if scene.style == "plain" and rng.random() < 0.25:
        return f"{text} in plain style"
    return text


def check_gates(pipe: StableDiffusionPipeline) -> dict[str, float]:
    """Content accuracy on every known plain scene at each seed; raises GateMissed below GATES."""
    scenes = list(render.known_scenes())
    images = np.concatenate(
        [generate(pipe, [render.caption(scene) for scene in scenes], seed) for seed in GATE_SEEDS]
    )
    scores = content_accuracy(images, scenes * len(GATE_SEEDS))
    log.info("measured %s", ", ".join(f"{name} {score:.3f}" for name, score in scores.items()))
    if any(scores[name] < gate for name, gate in GATES.items()):
        raise GateMissed(scores)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description="Pre-train the tiny pipeline.")
    parser.add_argument("out", type=Path, help="folder to create")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    torch.set_num_threads(arguments.threads)
    pretrain(arguments.out)


if __name__ == "__main__":
    main()
