"""HiRA in float64. Huang et al., ICLR 2025, eq. 4: W' = W0 + W0 * (B A), elementwise."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def changed(weight: Array, down: Array, up: Array) -> Array:
    rank = down.shape[0]
    a, b = down.reshape(rank, -1), up.reshape(-1, rank)
    flat = weight.reshape(len(weight), -1).copy()
    for o in range(flat.shape[0]):
        for i in range(flat.shape[1]):
            flat[o, i] += flat[o, i] * np.sum(b[o] * a[:, i])
    return flat.reshape(weight.shape)
