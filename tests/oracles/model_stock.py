"""Jang et al. 2024, section 4: angles between all pairs, then the ratio t between average and base."""

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def merged(deltas: list[Array], least: float = 0.0) -> Array:
    n = len(deltas)
    average = sum(deltas[1:], deltas[0]) / n
    if n == 1:
        return average
    cosines = [
        float(np.sum(a * b) / (np.linalg.norm(a) * np.linalg.norm(b)))
        for a, b in combinations(deltas, 2)
    ]
    cosine = max(0.0, sum(cosines) / len(cosines))
    t = n * cosine / (1 + (n - 1) * cosine)
    return np.asarray(max(t, least) * average)
