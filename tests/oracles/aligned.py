"""KnOTS and Core Space as their authors' code does them, on whole matrices in float64."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Rule = Callable[[list[Array]], Array]


def knots(changes: list[Array], rule: Rule) -> Array:
    """One dense SVD of all changes side by side; the rule on what belongs to each in S V^T."""
    side_by_side = np.concatenate(changes, axis=1)
    u, values, vt = np.linalg.svd(side_by_side, full_matrices=False)
    found = values > 1e-5 * np.linalg.norm(side_by_side)
    scaled = values[found, None] * vt[found]
    return np.asarray(u[:, found] @ rule(np.split(scaled, len(changes), axis=1)))


def core_space(ups: list[Array], downs: list[Array], rule: Rule) -> Array:
    """Bases from the SVDs of the factors as they are given; the rule on the cores."""
    u, left, _ = np.linalg.svd(np.concatenate(ups, axis=1), full_matrices=False)
    _, right, vt = np.linalg.svd(np.concatenate(downs, axis=0), full_matrices=False)
    u, vt = u[:, left > 1e-5 * left[0]], vt[right > 1e-5 * right[0]]
    cores = [u.T @ up @ down @ vt.T for up, down in zip(ups, downs, strict=True)]
    return np.asarray(u @ rule(cores) @ vt)


def balanced(change: Array, rank: int) -> tuple[Array, Array]:
    """A change split evenly: P sqrt(S) and sqrt(S) Q^T."""
    p, values, qt = np.linalg.svd(change, full_matrices=False)
    root = np.sqrt(values[:rank])
    return p[:, :rank] * root, root[:, None] * qt[:rank]
