"""Images and captions -> latents and text embeddings, each computed once and kept by content."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from merge.formats.reader import TensorFile
from merge.formats.writer import write_file
from train.config import Dataset
from train.errors import BadDataset

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
EXIF_ORIENTATION = 0x0112

Pixels = NDArray[np.uint8]
"""(height, width, 3), RGB."""


@dataclass(frozen=True, slots=True)
class Example:
    """One image with its caption; `digest` is the SHA-256 of the image's bytes as they came."""

    name: str
    caption: str
    digest: str
    pixels: Callable[[int], Pixels]


@dataclass(frozen=True, slots=True)
class Report:
    """What was found in a dataset, for the event log and the file's metadata."""

    examples: tuple[Example, ...]
    warnings: tuple[str, ...]

    def fingerprint(self) -> str:
        """SHA-256 over the sorted pairs of image and caption digests; names and order are out."""
        lines = sorted(
            f"{e.digest} {hashlib.sha256(e.caption.encode()).hexdigest()}\n" for e in self.examples
        )
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def tag_counts(self) -> dict[str, int]:
        """Comma-separated parts of the captions, as kohya counts them for ss_tag_frequency."""
        parts = (part.strip().lower() for e in self.examples for part in e.caption.split(","))
        return dict(Counter(part for part in parts if part).most_common())


def read_folder(dataset: Dataset, folder: Path, triggers: Sequence[str]) -> Report:
    """Every image of the folder with the caption that will be used; raises BadDataset."""
    if not folder.is_dir():
        raise BadDataset(str(folder), "there is no such folder")
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise BadDataset(str(folder), f"holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    uncaptioned = [p.name for p in paths if not dataset.caption and not _caption_file(p)]
    if uncaptioned:
        raise BadDataset(
            str(folder),
            f"{len(uncaptioned)} of {len(paths)} images have no .txt caption, such as "
            f"{uncaptioned[0]}; write them or set dataset.caption",
        )
    warnings: list[str] = []
    examples = []
    for path in paths:
        caption = (_caption_file(path) or dataset.caption or "").strip()
        if not caption:
            raise BadDataset(str(path), "its caption is empty")
        warnings += _check_image(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        examples.append(Example(path.name, caption, digest, partial(read_pixels, path)))
    return Report(tuple(examples), (*warnings, *_check_together(examples, triggers, str(folder))))


def read_pixels(path: Path, resolution: int) -> Pixels:
    """The image as a viewer shows it: EXIF rotation applied, alpha over white, centre square."""
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
        if "A" in upright.getbands() or "transparency" in upright.info:
            rgba = upright.convert("RGBA")
            white = Image.new("RGBA", rgba.size, "white")
            upright = Image.alpha_composite(white, rgba)
        square = ImageOps.fit(
            upright.convert("RGB"), (resolution, resolution), Image.Resampling.LANCZOS
        )
        return np.asarray(square, dtype=np.uint8)


class Cache:
    """Tensors by the SHA-256 of everything they depend on, one safetensors file each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: Sequence[str], compute: Callable[[], Tensor]) -> Tensor:
        """The tensor of this key, float32; computed and stored at the first call."""
        digest = hashlib.sha256("\0".join(key).encode()).hexdigest()
        path = self.folder / f"{digest}.safetensors"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_file(path, {"value": compute().float().contiguous()}, {})
        with TensorFile(path) as file:
            return file.read_tensor("value")


@torch.no_grad()
def encode_images(
    examples: Sequence[Example], vae: AutoencoderKL, vae_digest: str, resolution: int, cache: Cache
) -> Tensor:
    """(n, channels, height, width) scaled latents: the mean of the VAE's posterior, in float32.

    float32 because Stable Diffusion's VAEs overflow in float16.
    """
    scale = vae.config.scaling_factor

    def encode(example: Example) -> Tensor:
        pixels = torch.from_numpy(example.pixels(resolution).copy()).permute(2, 0, 1)[None]
        image = pixels.to(vae.device, torch.float32) / 127.5 - 1
        return torch.as_tensor(vae.encode(image).latent_dist.mode()[0] * scale).cpu()

    latents = []
    for example in examples:
        key = ("latent", vae_digest, str(resolution), example.digest)
        latent = cache.get(key, partial(encode, example))
        if not torch.isfinite(latent).all():
            raise BadDataset(example.name, "the VAE turns this image into NaN or Inf")
        latents.append(latent)
    return torch.stack(latents)


@torch.no_grad()
def encode_captions(
    captions: Sequence[str],
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    text_digest: str,
    cache: Cache,
) -> dict[str, Tensor]:
    """Caption -> (tokens, width), the text encoder's last hidden state."""

    def encode(caption: str) -> Tensor:
        ids = tokenizer(caption, padding="max_length", truncation=True, return_tensors="pt")
        hidden = text_encoder(ids.input_ids.to(text_encoder.device)).last_hidden_state
        return torch.as_tensor(hidden[0]).cpu()

    key = ("text", text_digest, str(tokenizer.model_max_length))
    return {
        caption: cache.get((*key, caption), partial(encode, caption))
        for caption in dict.fromkeys(captions)
    }


def _caption_file(path: Path) -> str | None:
    text = path.with_suffix(".txt")
    return text.read_text(encoding="utf-8").strip() if text.is_file() else None


def _check_image(path: Path) -> list[str]:
    try:
        with Image.open(path) as image:
            image.load()
            rotated = image.getexif().get(EXIF_ORIENTATION, 1) != 1
            transparent = "A" in image.getbands() or "transparency" in image.info
    except (UnidentifiedImageError, OSError) as error:
        raise BadDataset(str(path), f"is not a readable image: {error}") from error
    notes = []
    if rotated:
        notes.append(f"{path.name}: turned upright as its EXIF data says")
    if transparent:
        notes.append(f"{path.name}: transparency laid over white")
    return notes


def _check_together(examples: Sequence[Example], triggers: Sequence[str], where: str) -> list[str]:
    """Copies, and captions without a trigger; when no caption has one, the run is pointless."""
    silent = [e.name for e in examples if not any(trigger in e.caption for trigger in triggers)]
    if len(silent) == len(examples):
        names = " or ".join(repr(trigger) for trigger in triggers)
        raise BadDataset(where, f"no caption contains the trigger {names}")
    notes = [f"{name}: its caption contains no trigger" for name in silent]
    seen: dict[str, str] = {}
    for example in examples:
        first = seen.setdefault(example.digest, example.name)
        if first != example.name:
            notes.append(f"{example.name}: the same image as {first}")
    return notes
