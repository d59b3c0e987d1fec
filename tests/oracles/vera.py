"""VeRA from its definition in float64: Kopiczko et al. 2024, arXiv:2310.11454, eq. 2."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def delta(b: Array, d: Array, up: Array, down: Array, shape: tuple[int, int]) -> Array:
    """Lambda_b B Lambda_d A, of shared B and A the part that fits the layer."""
    total = np.zeros(shape)
    for o in range(shape[0]):
        for i in range(shape[1]):
            for r in range(len(d)):
                total[o, i] += b[o] * up[o, r] * d[r] * down[r, i]
    return total
