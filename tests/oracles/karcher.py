"""The weighted Karcher mean of directions by gradient descent on the sphere of all the entries.

Buss & Fillmore 2001, algorithm A1, with the exponential and the logarithm written out.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def merged(deltas: list[Array], shares: list[float]) -> Array:
    weights = np.array(shares) / sum(shares)
    norms = [np.linalg.norm(delta) for delta in deltas]
    points = [(delta / norm).ravel() for delta, norm in zip(deltas, norms, strict=True)]
    x = sum(w * p for w, p in zip(weights, points, strict=True))
    x = x / np.linalg.norm(x)
    for _ in range(2000):
        step = sum(w * logarithm(x, p) for w, p in zip(weights, points, strict=True))
        x = exponential(x, step)
        if np.linalg.norm(step) < 1e-13:
            break
    return np.asarray(float(weights @ np.array(norms)) * x).reshape(deltas[0].shape)


def spread(x: Array, deltas: list[Array], shares: list[float]) -> float:
    """Sum of share * angle^2 between x and the deltas: what a Karcher mean makes least."""
    return float(
        sum(
            share
            * np.linalg.norm(
                logarithm(x.ravel() / np.linalg.norm(x), d.ravel() / np.linalg.norm(d))
            )
            ** 2
            for share, d in zip(shares, deltas, strict=True)
        )
    )


def logarithm(x: Array, p: Array) -> Array:
    across = p - np.dot(x, p) * x
    length = np.linalg.norm(across)
    if length == 0:
        return np.zeros_like(x)
    return np.asarray(np.arctan2(length, np.dot(x, p)) * across / length)


def exponential(x: Array, step: Array) -> Array:
    length = np.linalg.norm(step)
    if length == 0:
        return x
    return np.asarray(np.cos(length) * x + np.sin(length) * step / length)
