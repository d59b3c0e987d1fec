"""Li et al. 2026, algorithm 1, one direction and one adapter after the other, on dense matrices."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def merged(deltas: list[Array], floor: float) -> Array:
    total = sum(deltas[1:], deltas[0])
    u, sigma, vt = np.linalg.svd(total, full_matrices=False)
    result = np.zeros_like(total)
    for r in range(len(sigma)):
        answer = u[:, r] @ total  # eq. 4
        times = []
        for delta in deltas:
            own = u[:, r] @ delta
            square = own @ own
            found = 0.0 if square < (1e-9 * np.linalg.norm(delta)) ** 2 else answer @ own / square
            times.append(max(floor, found))  # eq. 8
        gamma = len(deltas) / sum(times)
        result = result + gamma * sigma[r] * np.outer(u[:, r], vt[r])
    return result
