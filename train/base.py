"""The base of a run: where it lies, the pipeline in memory, and digests that show it was untouched."""

import hashlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from merge.formats.folders import folder_digest
from train.errors import BadBase, BaseChanged
from train.run import BaseFacts, base_facts


@dataclass(frozen=True, slots=True)
class Base:
    """A Stable Diffusion pipeline with frozen parts, and the digest of each part's tensors."""

    pipe: StableDiffusionPipeline
    facts: BaseFacts
    parts: Mapping[str, str]

    @property
    def unet(self) -> UNet2DConditionModel:
        return self.pipe.unet

    @property
    def vae(self) -> AutoencoderKL:
        return self.pipe.vae

    @property
    def text_encoder(self) -> CLIPTextModel:
        return self.pipe.text_encoder

    @property
    def tokenizer(self) -> CLIPTokenizer:
        return self.pipe.tokenizer

    def autocast(self) -> AbstractContextManager[None]:
        """Arithmetic for a UNet that is not float32; otherwise nothing."""
        unet = self.unet
        return torch.autocast(unet.device.type, unet.dtype, enabled=unet.dtype != torch.float32)

    @property
    def resolution(self) -> int:
        """Pixels of a side of the images this base was made for."""
        return int(self.unet.config.sample_size) * int(self.pipe.vae_scale_factor)

    def noise_scheduler(self) -> DDPMScheduler:
        """The noise levels and prediction type the base was trained with."""
        return DDPMScheduler.from_config(self.pipe.scheduler.config)


def load_base(name: str, folder: Path, device: torch.device, dtype: torch.dtype) -> Base:
    """The pipeline with every part frozen; the UNet in `dtype`, the others in float32."""
    if not folder.is_dir():
        raise BadBase(name, "there is no such folder")
    if not (folder / "model_index.json").is_file():
        raise BadBase(name, "is not a diffusers folder: model_index.json is missing")
    if (folder / "text_encoder_2").exists():
        raise BadBase(name, "has two text encoders (SDXL); this trainer knows pipelines with one")
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        if not (folder / part).is_dir():
            raise BadBase(name, f"has no {part}; this trainer needs a Stable Diffusion pipeline")
    try:
        pipe = StableDiffusionPipeline.from_pretrained(
            folder,
            dtype={"unet": dtype, "default": torch.float32},
            safety_checker=None,
            requires_safety_checker=False,
            local_files_only=True,
        )
    except (OSError, ValueError) as error:
        raise BadBase(name, f"cannot be loaded: {_first_line(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False)
        part.eval()
    pipe.to(device)
    prediction_type = pipe.scheduler.config.prediction_type
    facts = base_facts(_label(name), folder_digest(folder), pipe.unet, prediction_type)
    return Base(pipe, facts, _digests(pipe))


def require_unchanged(base: Base) -> None:
    """Every frozen tensor still has the bytes it was loaded with; adapter tensors do not count."""
    for component, digest in _digests(base.pipe).items():
        if digest != base.parts[component]:
            raise BaseChanged(component)


def _label(name: str) -> str:
    """The name that files carry: a path keeps its last part only, a REF all of it."""
    is_path = name.startswith((".", "/", "~")) or Path(name).is_dir()
    return Path(name).name if is_path else name


def _digests(pipe: StableDiffusionPipeline) -> dict[str, str]:
    parts = {"unet": pipe.unet, "vae": pipe.vae, "text_encoder": pipe.text_encoder}
    return {name: _digest(part) for name, part in parts.items()}


def _digest(module: nn.Module) -> str:
    """SHA-256 over (name, dtype, shape, bytes) of the module's own tensors, in order of names.

    peft keeps a wrapped layer's own weight under `.base_layer.` and adds factors named lora_*.
    """
    tensors = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in module.state_dict().items()
        if ".lora_" not in name
    }
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
