"""What element-wise methods make of several sparse changes: their sum, or what agrees in sign."""

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from merge.methods.elements import Delta, Tiled, read

# (adapter, its tile, the tile's first element) -> the tile made sparse; it may be changed in place.
Sparsify: TypeAlias = Callable[[int, Tensor, int], Tensor]
Combine: TypeAlias = Callable[[Sequence[Tensor]], Tensor]


def merged(deltas: Sequence[Delta], sparsify: Sparsify, combine: Combine, scale: float) -> Delta:
    """scale * combine(sparse changes), computed when its rows are asked for."""
    shape = deltas[0].shape

    def compute(first: int, count: int) -> Tensor:
        element = first * shape[1]
        sparse = [
            sparsify(adapter, read(delta, first, count), element)
            for adapter, delta in enumerate(deltas)
        ]
        return combine(sparse).mul_(scale)

    return Tiled(shape, compute)


def added(tiles: Sequence[Float[Tensor, "count in"]]) -> Float[Tensor, "count in"]:
    """The sum; the first tile becomes it."""
    total, *others = tiles
    for tile in others:
        total += tile
    return total


def elected(
    tiles: Sequence[Float[Tensor, "count in"]],
    vote: Literal["mass", "count"] = "mass",
    combine: Literal["mean", "sum"] = "mean",
) -> Float[Tensor, "count in"]:
    """One sign for each element, then the mean (of as many as agree) or the sum of what has it.

    Yadav et al. 2023, arXiv:2306.01708, algorithm 1, steps 2 and 3. A vote that ends in 0 elects
    nothing and gives 0, as the paper's formula says: so opposite changes cancel, and the negative of
    all inputs gives the negative result. The authors' code takes the sign most elements have in such
    a place, PEFT and mergekit take plus. The tiles are used up.
    """
    ballots = [tile.clone() if vote == "mass" else tile.sign() for tile in tiles]
    sign = added(ballots).sign_()
    total, agreeing = torch.zeros_like(sign), torch.zeros_like(sign)
    for tile in tiles:
        total += tile.mul_(sign).relu_()  # the magnitudes of what agrees, zeros elsewhere
        if combine == "mean":
            agreeing += tile.sign_()
    if combine == "mean":
        total /= agreeing.clamp_(min=1)
    return total.mul_(sign)
