"""DoRA in float64, one row or one input channel after the other.

Liu et al. 2024, arXiv:2402.09353, eq. 5: W' = m (W0 + BA) / ||W0 + BA||, where the norm is that of
one vector. Which vectors is the file's choice: the rows, or everything that sees one input channel.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def rows(weight: Array, delta: Array, magnitude: Array) -> Array:
    """W' with one magnitude for each output; a row of zeros stays one."""
    changed = weight + delta
    for o in range(len(changed)):
        norm = np.sqrt(np.sum(changed[o] ** 2))
        if norm > 0:
            changed[o] = magnitude[o] * changed[o] / norm
    return changed


def channels(weight: Array, delta: Array, magnitude: Array) -> Array:
    """W' with one magnitude for each input channel, over all outputs and the whole kernel."""
    changed = weight + delta
    for i in range(changed.shape[1]):
        norm = np.sqrt(np.sum(changed[:, i] ** 2))
        if norm > 0:
            changed[:, i] = magnitude[i] * changed[:, i] / norm
    return changed
