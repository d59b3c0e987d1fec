"""DELLA: as DARE, but large elements of a row are kept with a higher probability than small ones.

Deep et al. 2024, arXiv:2406.11617 (MagPrune): the elements of each row are ranked by
magnitude, and the probability to be kept grows evenly with the rank from density - epsilon to
density + epsilon (half the paper's epsilon). What is kept is divided by its own probability, so
that the expectation is the change itself; mergekit divides all by one number instead. The authors'
code (https://github.com/declare-lab/della at 8067515) divides 0 by 0 for rows of one element, whose
probability is `density` here.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from merge.method_parameters import Della
from merge.methods.consensus import added, elected, mask, merged
from merge.methods.draws import Draws
from merge.methods.elements import Delta


def merge(deltas: Sequence[Delta], parameters: Della, draws: Draws) -> Delta:
    """The sum of the rescaled changes, or what has the elected sign as in TIES."""

    def sparsify(adapter: int, tile: Tensor, element: int) -> Tensor:
        chances = _probabilities(tile, parameters)
        drawn = draws.uniform(adapter, element, tile.numel()).numpy().reshape(tile.shape)
        return mask(tile, drawn < chances).div_(torch.from_numpy(chances))

    combine = partial(elected, combine=parameters.combine) if parameters.elect else added
    return merged(deltas, sparsify, combine, parameters.scale)


def _probabilities(tile: Float[Tensor, "count in"], parameters: Della) -> NDArray[np.floating]:
    """Of each element, by its rank in its row; of equal magnitudes the first ranks highest."""
    columns = tile.shape[1]
    if columns == 1:
        return np.full(tile.shape, parameters.density, dtype=tile.numpy().dtype)
    magnitudes = tile.abs().neg_().numpy()
    order = magnitudes.argsort(1)
    # Sorting without regard to ties is five times as fast, and few rows have any.
    ordered = np.take_along_axis(magnitudes, order, 1)
    tied = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != 0)).any(1)
    order[tied] = magnitudes[tied].argsort(1, kind="stable")
    highest, lowest = (
        parameters.density + parameters.epsilon,
        parameters.density - parameters.epsilon,
    )
    by_rank = np.linspace(highest, lowest, columns).clip(max=1.0).astype(magnitudes.dtype)
    np.put_along_axis(magnitudes, order, np.broadcast_to(by_rank, tile.shape), 1)
    return magnitudes
