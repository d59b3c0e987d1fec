"""Factors of every additive layout with the change they must make, by an oracle of their own."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.oracles import lora

Array = NDArray[np.float64]

# Linear, square, 1x1, 3x3 and 1-D convolutions; no two dimensions of one are equal unless meant.
KINDS = {
    "linear": (6, 8),
    "square": (6, 6),
    "conv1x1": (6, 4, 1, 1),
    "conv3x3": (8, 6, 3, 3),
    "conv1d": (6, 4, 3),
}
ALPHAS = (None, 2.0, 0.0, -1.5)


@dataclass(frozen=True)
class Case:
    """`delta` and `bias` are f(W) - W and f(b) - b; `rank` is None where no product is exact."""

    name: str
    layout: str
    tensors: Mapping[str, torch.Tensor]
    shape: tuple[int, ...]
    delta: Array
    rank: int | None
    bias: Array | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    base: torch.Tensor | None = None  # W as a matrix, where `delta` depends on it


class Maker:
    """Random float64 tensors from one seed."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64)


def alpha_of(value: float | None) -> dict[str, torch.Tensor]:
    return {} if value is None else {"alpha": torch.tensor(value, dtype=torch.float64)}


def array(tensor: torch.Tensor) -> Array:
    return np.asarray(tensor.numpy())


def lora_cases() -> Iterator[Case]:
    for kind, shape in KINDS.items():
        for alpha in ALPHAS:
            make, (out, inner, *kernel) = Maker(1), shape
            down, up = make(3, inner, *kernel), make(out, 3, *[1] * len(kernel))
            change = lora.delta(array(down), array(up), alpha)
            tensors = {"down": down, "up": up, **alpha_of(alpha)}
            yield Case(f"lora {kind} alpha {alpha}", "lora", tensors, shape, change, 3)
    make = Maker(2)
    down, up = make(5, 4), make(6, 5)
    change = lora.delta(array(down), array(up), None)
    plain = {"down": down, "up": up, "alpha": torch.tensor([2.0])}
    yield Case(
        "lora facts over alpha", "lora", plain, (6, 4), 0.3 * change, 5, facts={"scale": 0.3}
    )
    scaled = {**plain, "scale": torch.tensor([0.7], dtype=torch.float64)}
    yield Case("lora scale over alpha", "lora", scaled, (6, 4), 0.7 * change, 5)
    learned = {**plain, "scalar": torch.tensor(-0.5, dtype=torch.float64)}
    yield Case("lora scalar times alpha / rank", "lora", learned, (6, 4), -0.2 * change, 5)
    yield Case(
        "lora linear on a 1x1", "lora", plain, (6, 4, 1, 1), 0.4 * change[..., None, None], 5
    )
    yield Case("lora of an attention", "lora-mha", plain, (6, 4), 0.4 * change, 5)
    # DyLoRA of LyCORIS stores a convolution's up as a matrix.
    conv = make(5, 4, 3, 3)
    yield Case(
        "lora up without ones",
        "lora",
        {"down": conv, "up": up},
        (6, 4, 3, 3),
        lora.delta(array(conv), array(up), None),
        5,
    )
    biased = {**plain, "up_bias": make(6)}
    yield Case(
        "lora bias", "lora", biased, (6, 4), 0.4 * change, 5, bias=0.4 * array(biased["up_bias"])
    )
    for alpha in ALPHAS:
        core = {"down": make(3, 4, 1, 1), "mid": make(3, 3, 3, 2), "up": make(6, 3, 1, 1)}
        change = lora.tucker(*(array(core[role]) for role in ("down", "mid", "up")), alpha)
        tensors = {**core, **alpha_of(alpha)}
        yield Case(f"lora tucker alpha {alpha}", "lora", tensors, (6, 4, 3, 2), change, 3)
    sparse = {
        **plain,
        "bias_indices": torch.tensor([[0, 5, 5], [1, 2, 2]], dtype=torch.int16),
        "bias_values": torch.tensor([3.0, 4.0, 5.0], dtype=torch.float64),
        "bias_size": torch.tensor([6, 4], dtype=torch.int16),
    }
    residual = np.zeros((6, 4))
    residual[0, 1], residual[5, 2] = 3.0, 9.0  # two values at one place add up
    change = lora.delta(array(down), array(up), None)
    yield Case("lora residual", "lora", sparse, (6, 4), 0.4 * (change + residual), None)


CASES = [*lora_cases()]
