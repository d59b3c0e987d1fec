"""IA3 in float64. Liu et al. 2022, arXiv:2205.05638, section 3.3: activations times a vector."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def rows(weight: Array, factor: Array) -> Array:
    """The outputs of a layer times `factor`."""
    changed = weight.copy()
    for o in range(weight.shape[0]):
        changed[o] *= factor.reshape(-1)[o]
    return changed


def channels(weight: Array, factor: Array) -> Array:
    """The inputs of a layer times `factor`."""
    changed = weight.copy()
    for i in range(weight.shape[1]):
        changed[:, i] *= factor.reshape(-1)[i]
    return changed
