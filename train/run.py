"""The facts of one finished run, from which the header, the card and metrics.json are written."""

from collections.abc import Mapping
from dataclasses import dataclass

from diffusers import UNet2DConditionModel

from train.config import TrainConfig
from train.data import Report


@dataclass(frozen=True, slots=True)
class Family:
    """How the field's files name a kind of base: kohya's ss_base_model_version, ModelSpec's id."""

    name: str
    ss_base_model_version: str
    modelspec_architecture: str


UNKNOWN = Family("unknown", "unknown", "unknown")

# By cross-attention width and block channels, which no two of these share.
FAMILIES: Mapping[tuple[int, tuple[int, ...]], Family] = {
    (768, (320, 640, 1280, 1280)): Family("sd15", "sd_v1", "stable-diffusion-v1"),
    (1024, (320, 640, 1280, 1280)): Family("sd2", "sd_v2", "stable-diffusion-v2-512"),
    (64, (48, 96)): Family("tiny-sd", "tiny-sd", "tiny-sd"),
}


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """A base as others may know it: no path of this machine. `sha256` is merge's folder digest."""

    label: str
    sha256: str
    family: Family
    prediction_type: str


@dataclass(frozen=True, slots=True)
class Run:
    """What was asked, what it was trained on, and what came out; times are Unix seconds."""

    config: TrainConfig
    triggers: tuple[str, ...]
    base: BaseFacts
    report: Report
    resolution: int
    precision: str
    trainable: int
    total: int
    last_loss: float
    scores: Mapping[str, float]
    started: float
    finished: float

    @property
    def alpha(self) -> float:
        return self.config.effective_alpha


def family_of(unet: UNet2DConditionModel) -> Family:
    """The family whose UNet has this width, or UNKNOWN."""
    config = unet.config
    return FAMILIES.get((config.cross_attention_dim, tuple(config.block_out_channels)), UNKNOWN)
