"""AdaLoRA from its definition in float64: Zhang et al. 2023, arXiv:2303.10512, eq. 3, P Lambda Q."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def delta(down: Array, values: Array, up: Array, scale: float) -> Array:
    total = np.zeros((up.shape[0], down.shape[1]))
    for r, value in enumerate(values.ravel()):
        total += scale * value * np.outer(up[:, r], down[r])
    return total
