"""A change that is a low-rank product and needs no base: what most algorithms come down to."""

from math import prod

from jaxtyping import Float
from torch import Tensor

from merge.algorithms.change import Change, Needs
from merge.algorithms.lora import Factors


class LowRank(Change):
    """f(W) - W = scale * up @ down, and perhaps a vector that is added to the bias."""

    needs = Needs.NOTHING
    is_product = True

    def __init__(self, factors: Factors, bias: Float[Tensor, " out"] | None = None) -> None:
        self._factors = factors
        self._bias = bias

    def factors(self) -> Factors:
        return self._factors

    def weight(
        self, first: int, rows: int, base: Float[Tensor, "_ in"] | None
    ) -> Float[Tensor, "rows in"]:
        up, down = self._factors.up[first : first + rows], self._factors.down
        return self._factors.scale * (up @ down)

    def bias(
        self, bias: Float[Tensor, " out"] | None, base: Float[Tensor, "out in"] | None
    ) -> Float[Tensor, " out"] | None:
        return self._bias


def low_rank(
    up: Float[Tensor, "out *rank"],
    down: Float[Tensor, "rank2 *in"],
    scale: float,
    shape: tuple[int, ...],
    bias: Tensor | None = None,
) -> LowRank:
    """Checked against the weight's shape; both factors are flattened from their second dimension.

    So a linear layer and a 1x1 convolution take each other's factors: they hold the same numbers.
    """
    up, down = up.flatten(1), down.flatten(1)
    if up.shape[1] != down.shape[0]:
        raise ValueError(f"up has rank {up.shape[1]} and down has rank {down.shape[0]}")
    check_extent((up.shape[0], down.shape[1]), shape)
    if bias is not None:
        check_bias(bias, shape)
        bias = bias.flatten()
    return LowRank(Factors(up, down, scale), bias)


def to_lora(change: Change) -> Factors:
    """The whole change of the weight as plain LoRA; ValueError where only a dense one is exact."""
    factors = change.factors()
    if factors is None:
        raise ValueError("it is no product of low rank; the full difference is exact")
    return factors


def extent(shape: tuple[int, ...]) -> tuple[int, int]:
    """(out, in * kernel) of the matrix a weight of this shape is; (n, 1) for a vector."""
    return shape[0], prod(shape[1:])


def check_extent(found: tuple[int, int], shape: tuple[int, ...]) -> None:
    if found != extent(shape):
        raise ValueError(f"delta is {found}, base weight is {shape}")


def check_bias(bias: Tensor, shape: tuple[int, ...]) -> None:
    if bias.numel() != shape[0]:
        raise ValueError(f"{bias.numel()} values for the bias of a layer with {shape[0]} outputs")
