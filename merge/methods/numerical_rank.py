"""What counts as zero, for methods that look at a direction and not at how strong it is.

A direction that is zero on paper (an adapter given twice, a rank that never learned anything,
changes that cancel) comes out of float32 arithmetic with about 1e-7 of the largest one's strength.
A method that divides by such a number, or gives all directions one strength, would make noise as
strong as what was learned.
"""

from collections.abc import Sequence
from math import ceil

import torch
from jaxtyping import Float
from torch import Tensor

from merge.algorithms.lora import Factors, norm

# Of the largest. The same for float64, so that `numerics` does not decide which directions count.
NEGLIGIBLE = 1e-5
# Of the factors' norms. float32 leaves 1e-7 of what cancels, and the norm itself is known to 1e-8.
_CANCELLED = 1e-6


def present(cores: Sequence[Float[Tensor, "k l"]]) -> list[Float[Tensor, "k l"]]:
    """The cores of those adapters that change this layer: methods count and average only these."""
    return [core for core in cores if core.any()]


def is_nothing(part: Factors) -> bool:
    """Whether the factors cancel each other, so that what is left of their product is rounding.

    Where nothing cancels, the product's norm is at least that of the factors' / sqrt(rank).
    """
    up, down = (torch.linalg.vector_norm(its.double()).item() for its in (part.up, part.down))
    return bool(norm(Factors(part.up, part.down)) <= _CANCELLED * up * down)


def rank_of(values: Float[Tensor, " j"], scale: float) -> int:
    """How many of the singular values are more than noise beside a change of norm `scale`."""
    return int((values > NEGLIGIBLE * scale).sum())


def part_of(rank: int, share: float) -> int:
    """This share of a rank, rounded up; 0.28 of 25 is 7, where binary fractions make it a bit more."""
    return ceil(share * rank - 1e-9)


def polar(columns: Float[Tensor, "k n"]) -> tuple[Float[Tensor, "k n"], bool]:
    """The nearest matrix with orthonormal columns, U V^T of the SVD, and whether there is one.

    Columns, of norm 1, that say the same twice have no nearest one: those directions stay zero.
    """
    u, values, vh = torch.linalg.svd(columns, full_matrices=False)
    rank = rank_of(values, 1.0)
    return u[:, :rank] @ vh[:rank], rank == columns.shape[1]
