"""DARE: drop elements at random and rescale the rest.

Yu et al. 2023, arXiv:2311.03099, equations 1 and 2: each element is kept with probability `density`
(the paper's 1 - p) and divided by it, so that the expectation is the change itself. mergekit divides
by what brings back the sum of magnitudes of that draw instead.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from merge.method_parameters import Dare
from merge.methods.consensus import added, elected, merged
from merge.methods.draws import Draws
from merge.methods.elements import Delta


def merge(deltas: Sequence[Delta], parameters: Dare, draws: Draws) -> Delta:
    """The sum of the rescaled changes, or the mean of what has the elected sign as in TIES."""

    def sparsify(adapter: int, tile: Tensor, element: int) -> Tensor:
        drawn = draws.uniform(adapter, element, tile.numel()).numpy().reshape(tile.shape)
        values = tile.numpy()
        np.multiply(values, drawn < parameters.density, out=values)
        return tile.div_(parameters.density)

    combine = elected if parameters.elect else added
    return merged(deltas, sparsify, combine, parameters.scale)
