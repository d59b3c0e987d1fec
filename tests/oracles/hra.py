"""HRA in float64, one whole reflection matrix after the other.

Yuan et al. 2024, arXiv:2405.17484, eq. 6: W' = W H_1 ... H_r, H_i = I - 2 u_i u_i^T, ||u_i|| = 1.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def reflected(weight: Array, columns: Array) -> Array:
    changed = weight.reshape(len(weight), -1)
    for i in range(columns.shape[1]):
        u = columns[:, i] / np.sqrt(np.sum(columns[:, i] ** 2))
        changed = changed @ (np.eye(len(u)) - 2 * np.outer(u, u))
    return changed.reshape(weight.shape)


def orthonormal(columns: Array) -> Array:
    """Gram-Schmidt in the order of the columns."""
    q = np.zeros_like(columns)
    for i in range(columns.shape[1]):
        u = columns[:, i].copy()
        for j in range(i):
            u = u - np.sum(q[:, j] * columns[:, i]) * q[:, j]
        q[:, i] = u / np.sqrt(np.sum(u**2))
    return q
