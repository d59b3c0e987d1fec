"""Shoemake 1985, section 3.3, on the changes as vectors, with the angle in the plane they span."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def merged(first: Array, second: Array, t: float) -> Array:
    e1 = first / np.linalg.norm(first)
    rest = second - np.sum(second * e1) * e1
    e2 = rest / np.linalg.norm(rest)
    theta = np.arctan2(np.sum(second * e2), np.sum(second * e1))
    return np.asarray(
        np.sin((1 - t) * theta) / np.sin(theta) * first + np.sin(t * theta) / np.sin(theta) * second
    )
