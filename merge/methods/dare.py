"""DARE: drop elements at random and rescale the rest.

Yu et al. 2023, arXiv:2311.03099: each element is kept with probability `density`
(the paper's 1 - p) and divided by it, so that the expectation is the change itself. mergekit divides
by what brings back the sum of magnitudes of that draw instead.
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from merge.method_parameters import Dare
from merge.methods.consensus import added, elected, mask, merged
from merge.methods.draws import Draws
from merge.methods.elements import Delta


def merge(deltas: Sequence[Delta], parameters: Dare, draws: Draws) -> Delta:
    """The sum of the rescaled changes, or what has the elected sign as in TIES."""

    def sparsify(adapter: int, tile: Tensor, element: int) -> Tensor:
        drawn = draws.uniform(adapter, element, tile.numel()).numpy().reshape(tile.shape)
        return mask(tile, drawn < parameters.density).div_(parameters.density)

    combine = partial(elected, combine=parameters.combine) if parameters.elect else added
    return merged(deltas, sparsify, combine, parameters.scale)
