"""LoRA: a weight changes by (alpha / rank) * up @ down.

Hu et al. 2021, arXiv:2106.09685, eq. 3; the scale is from section 4.1. The paper's B is `up` and
its A is `down`. For a convolution the kernel belongs to `down` and `up` is 1x1 (LoCon), so with
`down` flattened to (rank, in * kh * kw) the same product gives the whole change, flattened alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt

import torch
from jaxtyping import Float
from torch import Tensor

NAME = "lora"


@dataclass(frozen=True, slots=True)
class Factors:
    """One module's factors, flattened to matrices; `in` counts the kernel of a convolution."""

    up: Float[Tensor, "out rank"]
    down: Float[Tensor, "rank in"]
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def parse(
    down: Float[Tensor, "rank in *kernel"], up: Float[Tensor, "out rank *ones"], scale: float
) -> Factors:
    """Factors from the two tensors of a file; `scale` is alpha / rank, which not every file holds."""
    return Factors(up.flatten(1), down.flatten(1), scale)


def delta(factors: Factors) -> Float[Tensor, "out in"]:
    """The dense change of the weight, in the factors' dtype; for tests and small layers."""
    return factors.scale * (factors.up @ factors.down)


def write(
    factors: Factors, kernel: Sequence[int] = ()
) -> dict[str, Float[Tensor, "a b *kernel"] | Float[Tensor, ""]]:
    """The tensors of a file by role: down, up with the kernel's dimensions, and alpha.

    alpha is float32 whatever the factors are: bfloat16 would turn 257 into 256.
    """
    rank, inner = factors.down.shape
    ones = [1] * len(kernel)
    return {
        "down": factors.down.reshape(rank, inner // prod(kernel), *kernel),
        "up": factors.up.reshape(len(factors.up), rank, *ones),
        "alpha": torch.tensor(factors.scale * rank, dtype=torch.float32),
    }


def transposed(factors: Factors) -> Factors:
    """Factors of the transposed change, for parameters that are stored the other way round."""
    return Factors(factors.down.mT, factors.up.mT, factors.scale)


def norm(factors: Factors) -> float:
    """Frobenius norm of the change, from the two Gram matrices and not from the dense product.

    Computed in float64: a sum whose parts cancel keeps about eight digits of its largest part.
    """
    up, down = factors.up.double(), factors.down.double()
    squared = ((up.mT @ up) * (down @ down.mT)).sum().item()
    return abs(factors.scale) * sqrt(max(squared, 0.0))


def distance(exact: Factors, stored: Mapping[str, Tensor]) -> float:
    """Frobenius norm of what rounding to `stored` (down and up, scale 1) changed in `exact`.

    With d for rounding errors, (up + d_up)(down + d_down) - up down = d_up down + (up + d_up) d_down:
    both terms are small, so nothing cancels and the dtype of the factors is wide enough.
    """
    up = stored["up"].flatten(1).to(exact.up.dtype)
    down = stored["down"].flatten(1).to(exact.down.dtype)
    up_error, down_error = up - exact.up * exact.scale, down - exact.down
    squared = (
        _inner(up_error, exact.down, up_error, exact.down)
        + 2 * _inner(up_error, exact.down, up, down_error)
        + _inner(up, down_error, up, down_error)
    )
    return sqrt(max(squared, 0.0))


def _inner(up: Tensor, down: Tensor, other_up: Tensor, other_down: Tensor) -> float:
    """The inner product of two products of factors, which are never formed."""
    return ((up.mT @ other_up).double() * (down @ other_down.mT)).sum().item()
