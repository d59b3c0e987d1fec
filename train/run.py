"""The facts of one finished run, from which the header, the card and metrics.json are written."""

from collections.abc import Mapping
from dataclasses import dataclass

from diffusers import UNet2DConditionModel
from torch import nn

from merge.families import FAMILIES
from train.config import TrainConfig
from train.data import Report


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """A base as others may know it: no path of this machine. `sha256` is merge's folder digest.

    family, base_version (ss_base_model_version) and architecture (ModelSpec) are "unknown" for a UNet
    that no family's table describes.
    """

    label: str
    sha256: str
    family: str
    base_version: str
    architecture: str
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


def base_facts(
    label: str, sha256: str, unet: UNet2DConditionModel, prediction_type: str
) -> BaseFacts:
    """The family is the one whose table lists exactly the layers and shapes of this UNet."""
    layers = {
        name: tuple(module.weight.shape)
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    for family in FAMILIES.values():
        table = family.components.get("unet", {})
        if layers == {name: m.shape for name, m in table.items() if m.takes_adapters}:
            version = family.base_versions[0]
            return BaseFacts(
                label, sha256, family.name, version, family.architecture, prediction_type
            )
    return BaseFacts(label, sha256, "unknown", "unknown", "unknown", prediction_type)
