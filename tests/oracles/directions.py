"""What the dense references of spectral methods share: rank, and the nearest orthonormal matrix."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def rank(matrix: Array, beside: list[Array]) -> int:
    """How many singular values are not rounding, next to the largest of these matrices."""
    values = np.linalg.svd(matrix, compute_uv=False)
    largest = max(np.linalg.norm(other) for other in beside)
    return int(np.sum(values > 1e-9 * largest))


def orthonormal(columns: Array) -> Array:
    """Procrustes: X (X^T X)^(-1/2), with the pseudo-inverse where columns depend on each other."""
    values, vectors = np.linalg.eigh(columns.T @ columns)
    inverse = np.array([0.0 if value < 1e-9 else value**-0.5 for value in values])
    return np.asarray(columns @ (vectors * inverse) @ vectors.T)
