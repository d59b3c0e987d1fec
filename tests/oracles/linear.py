"""The linear merge and the nearest lower rank, dense and in float64."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def merged(deltas: list[Array], strengths: list[float]) -> Array:
    """The sum of strength times delta, one after the other."""
    total = np.zeros_like(deltas[0])
    for change, strength in zip(deltas, strengths, strict=True):
        total = total + strength * change
    return total


def nearest(matrix: Array, rank: int) -> Array:
    """The nearest matrix of at most this rank: Eckart & Young 1936, by a full dense SVD."""
    u, s, vt = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    return np.asarray((u * s) @ vt)


def values(matrix: Array) -> Array:
    return np.linalg.svd(matrix.astype(np.float64), compute_uv=False)


def relative_error(matrix: Array, rank: int) -> float:
    """What the nearest matrix of this rank misses, relative to the matrix: the discarded values."""
    s = values(matrix)
    return float(np.sqrt(np.sum(s[rank:] ** 2) / np.sum(s**2)))


def least_error_within(spectra: list[Array], costs: list[int], budget: int) -> float:
    """The least total squared error of any choice of ranks that fits, by trying every choice."""

    def best(module: int, left: int) -> float:
        if module == len(spectra):
            return 0.0
        s, cost = spectra[module], costs[module]
        return min(
            float(np.sum(s[rank:] ** 2)) + best(module + 1, left - rank * cost)
            for rank in range(len(s) + 1)
            if rank * cost <= left
        )

    return best(0, budget)
