"""Gargiulo et al. 2025, TSV-M, on dense matrices, with k directions of every adapter."""

from math import ceil

import numpy as np
from numpy.typing import NDArray

from tests.oracles.directions import orthonormal, rank

Array = NDArray[np.float64]


def merged(deltas: list[Array], keep: float) -> Array:
    return with_ranks(deltas, [ceil(round(keep * rank(delta, [delta]), 9)) for delta in deltas])


def as_published(deltas: list[Array]) -> Array:
    """AntoAndGar/task_singular_vectors a6c9718: min(out, in) / n directions of each adapter."""
    return with_ranks(deltas, [int(min(deltas[0].shape) / len(deltas))] * len(deltas))


def with_ranks(deltas: list[Array], ranks: list[int]) -> Array:
    us, sigmas, vs = [], [], []
    for delta, k in zip(deltas, ranks, strict=True):
        u, sigma, vt = np.linalg.svd(delta, full_matrices=False)
        us.append(u[:, :k])
        sigmas.append(sigma[:k])
        vs.append(vt[:k].T)
    u, v = orthonormal(np.hstack(us)), orthonormal(np.hstack(vs))
    return np.asarray(u @ np.diag(np.concatenate(sigmas)) @ v.T)
