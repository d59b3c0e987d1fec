"""OFT in float64, with whole rotation matrices.

Qiu et al. 2023, arXiv:2306.07280: W' = R W with R block-diagonal, and section 3.2, Cayley's
R = (I + Q)(I - Q)^-1 for Q = -Q^T. How each tool stores Q and limits it is its own format.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def cayley(q: Array) -> Array:
    one = np.eye(len(q))
    return np.asarray((one + q) @ np.linalg.inv(one - q))


def block_diagonal(blocks: list[Array]) -> Array:
    size = sum(len(block) for block in blocks)
    whole, at = np.zeros((size, size)), 0
    for block in blocks:
        whole[at : at + len(block), at : at + len(block)] = block
        at += len(block)
    return whole


def lycoris_rotation(stored: Array, alpha: float | None) -> Array:
    """R of all rows from oft_blocks (n, size, size): Q = B - B^T, clamped to alpha * rows."""
    q = stored - stored.transpose(0, 2, 1)
    norm, limit = np.sqrt(np.sum(q**2)) + 1e-8, (alpha or 0.0) * stored.shape[0] * stored.shape[1]
    if limit > 0 and norm > limit:
        q = q * limit / norm
    return block_diagonal([cayley(block) for block in q])


def kohya_rotation(stored: Array, alpha: float) -> Array:
    """sd-scripts networks/oft.py: the norm becomes at most alpha * rows, 1e-8 on either side."""
    q = stored - stored.transpose(0, 2, 1)
    norm = np.sqrt(np.sum(q**2))
    q = q * (min(norm, alpha * stored.shape[0] * stored.shape[1]) + 1e-8) / (norm + 1e-8)
    return block_diagonal([cayley(block) for block in q])


def rows_rotated(weight: Array, rotation: Array, rescale: Array | None = None) -> Array:
    """W'[m] = sum over p of R[p, m] W[p], then each row times its rescale."""
    flat = weight.reshape(len(weight), -1)
    changed = np.zeros_like(flat)
    for m in range(len(flat)):
        for p in range(len(flat)):
            changed[m] += rotation[p, m] * flat[p]
        if rescale is not None:
            changed[m] *= rescale.reshape(-1)[m]
    return changed.reshape(weight.shape)


def triangle(vector: Array, size: int) -> Array:
    """Q with `vector` in its upper triangle, row by row."""
    q, at = np.zeros((size, size)), 0
    for i in range(size):
        for j in range(i + 1, size):
            q[i, j], q[j, i] = vector[at], -vector[at]
            at += 1
    return q


def five_terms(q: Array) -> Array:
    """The start of the Neumann series of (I + Q)(I - Q)^-1, with its last term halved."""
    return np.asarray(np.eye(len(q)) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q)


def columns_rotated(weight: Array, rotation: Array) -> Array:
    """PEFT: W' = W R^T on the flattened inputs."""
    flat = weight.reshape(len(weight), -1)
    return np.asarray(flat @ rotation.T).reshape(weight.shape)
