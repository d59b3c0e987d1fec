"""Which layers get an adapter, and the adapter itself: LoRA pairs on a frozen UNet, through peft."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn

from train.errors import BadBase, NoGradient
from train.presets import PRESETS

ADAPTER = "default"


@dataclass(frozen=True, slots=True)
class Pair:
    """The two factors of one module: `down` (rank, in[, kh, kw]) and `up` (out, rank[, 1, 1])."""

    module: str
    down: nn.Parameter
    up: nn.Parameter


@dataclass(frozen=True, slots=True)
class Adapter:
    """The trainable pairs in the order of the UNet's modules."""

    pairs: tuple[Pair, ...]
    rank: int
    alpha: float

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for pair in self.pairs:
            yield f"{pair.module}.down", pair.down
            yield f"{pair.module}.up", pair.up

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.named_parameters()]

    def count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


def target_modules(unet: nn.Module, preset: str) -> list[str]:
    """Dotted paths of the linear and convolution layers that the preset names, in module order."""
    pattern = re.compile(PRESETS[preset].pattern)
    layers = nn.Linear if not PRESETS[preset].convolutions else (nn.Linear, nn.Conv2d)
    return [
        name
        for name, module in unet.named_modules()
        if isinstance(module, layers) and pattern.fullmatch(name)
    ]


def inject(unet: UNet2DConditionModel, preset: str, rank: int, alpha: float) -> Adapter:
    """Freeze the UNet and put a pair on every target: `down` random, `up` zero, so nothing changes.

    The factors are float32 whatever the base is. The global generator decides `down`:
    seed it first.
    """
    modules = target_modules(unet, preset)
    if not modules:
        raise BadBase(type(unet).__name__, f"preset {preset} names no layer of this UNet")
    unet.requires_grad_(False)
    # Gaussian as in diffusers' own training scripts; the default starts convolutions too small.
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=modules, init_lora_weights="gaussian"
    )
    unet.add_adapter(config, adapter_name=ADAPTER)
    layers = dict(unet.named_modules())
    pairs = []
    for name in modules:
        layer = layers[name]
        down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        down.float()
        up.float()
        pairs.append(Pair(name, down.weight, up.weight))
    trainable = {id(p) for p in unet.parameters() if p.requires_grad}
    adapter = Adapter(tuple(pairs), rank, alpha)
    assert trainable == {id(p) for p in adapter.parameters()}, "only the adapter may be trainable"
    return adapter


def require_gradients(adapter: Adapter) -> None:
    """After the first backward pass every `up` must have a gradient; `down` has none while up = 0."""
    silent = [
        pair.module for pair in adapter.pairs if pair.up.grad is None or not pair.up.grad.any()
    ]
    if silent:
        raise NoGradient(silent)


def untouched(adapter: Adapter) -> list[str]:
    """Modules whose delta is still zero."""
    return [pair.module for pair in adapter.pairs if not pair.up.any()]


@torch.no_grad()
def round_to(adapter: Adapter, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> (down, up) in the dtype of the file; the live factors take the rounded values.

    What is measured and painted afterwards is then exactly what the file holds.
    """
    factors = {}
    for pair in adapter.pairs:
        down, up = (p.detach().to("cpu", dtype).contiguous() for p in (pair.down, pair.up))
        pair.down.copy_(down)
        pair.up.copy_(up)
        factors[pair.module] = (down, up)
    return factors
