"""He et al. 2026, on dense matrices: a shared basis by alternating eigenproblems, then the sum in it."""

import numpy as np
from numpy.typing import NDArray

from tests.oracles.directions import rank

Array = NDArray[np.float64]


def merged(deltas: list[Array], dimensions: int | None, balance: float) -> Array:
    r = dimensions or max(rank(delta, [delta]) for delta in deltas)
    u, v = basis(balanced(deltas, balance), min(r, *deltas[0].shape))
    total = np.zeros((u.shape[1], v.shape[1]))
    for delta in deltas:
        total = total + u.T @ delta @ v
    return np.asarray(u @ total @ v.T)


def balanced(deltas: list[Array], balance: float) -> list[Array]:
    norms = [float(np.linalg.norm(delta)) for delta in deltas]
    mean = sum(norms) / len(norms)
    return [
        delta / norm * ((1 - balance) * norm + balance * mean)
        for delta, norm in zip(deltas, norms, strict=True)
    ]


def basis(deltas: list[Array], r: int) -> tuple[Array, Array]:
    v = leading([delta.T for delta in deltas], r)
    best = 0.0
    for _ in range(200):
        u = leading([delta @ v for delta in deltas], r)
        v = leading([delta.T @ u for delta in deltas], r)
        energy = kept(deltas, u, v)
        if energy <= best * (1 + 1e-9):
            break
        best = energy
    return u, v


def kept(deltas: list[Array], u: Array, v: Array) -> float:
    return float(sum(np.sum((u.T @ delta @ v) ** 2) for delta in deltas))


def leading(columns: list[Array], r: int) -> Array:
    return np.asarray(np.linalg.svd(np.hstack(columns), full_matrices=False)[0][:, :r])
