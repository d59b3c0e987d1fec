"""LoHa from its definition, entry by entry in float64.

Hyeon-Woo et al. 2022, arXiv:2108.06098: proposition 1, (X1 Y1^T) o (X2 Y2^T), and proposition 3, the
same of two Tucker products. The scale alpha / rank is LyCORIS'.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def product(a: Array, b: Array) -> Array:
    """Sum over r of a[o, r] b[r, ...]."""
    total = np.zeros((a.shape[0], *b.shape[1:]))
    for o in range(a.shape[0]):
        for r in range(a.shape[1]):
            total[o] += a[o, r] * b[r]
    return total


def tucker(core: Array, a: Array, b: Array) -> Array:
    """Sum over i, j of core[i, j, ...] a[i, o] b[j, n]; a is (rank, out), b is (rank, in)."""
    total = np.zeros((a.shape[1], b.shape[1], *core.shape[2:]))
    for o in range(a.shape[1]):
        for n in range(b.shape[1]):
            for i in range(core.shape[0]):
                for j in range(core.shape[1]):
                    total[o, n] += core[i, j] * a[i, o] * b[j, n]
    return total


def delta(first: Array, second: Array, alpha: float | None, rank: int) -> Array:
    scale = 1.0 if alpha is None else alpha / rank
    return np.asarray(scale * first * second)
