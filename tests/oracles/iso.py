"""Marczak et al. 2025, Iso-C and Iso-CTS, on dense matrices, for a space of any number of dimensions.

With `dimensions` = min(out, in) this is danielm1405/iso-merging d34010a; with the rank of what the
adapters span, it is restricted to that span.
"""

import numpy as np
from numpy.typing import NDArray

from tests.oracles.directions import orthonormal, rank

Array = NDArray[np.float64]


def common(deltas: list[Array], dimensions: int) -> Array:
    """Iso-C: section 4.1."""
    u, sigma, vt = np.linalg.svd(sum(deltas[1:], deltas[0]), full_matrices=False)
    flat = np.full(dimensions, np.mean(sigma[:dimensions]))
    return np.asarray(u[:, :dimensions] @ np.diag(flat) @ vt[:dimensions])


def common_and_specific(deltas: list[Array], share: float, dimensions: int) -> Array:
    """Iso-CTS: algorithm 1; of adapters whose changes do not depend on each other."""
    n = len(deltas)
    specific = round((dimensions - int(dimensions * share)) / n)
    k = dimensions - n * specific
    u, sigma, vt = np.linalg.svd(sum(deltas[1:], deltas[0]), full_matrices=False)
    us, sigmas, vs = [u[:, :k]], [sigma[:k]], [vt[:k].T]
    for delta in deltas:
        outside = delta - u[:, :k] @ u[:, :k].T @ delta
        u_own, sigma_own, vt_own = np.linalg.svd(outside, full_matrices=False)
        us.append(u_own[:, :specific])
        sigmas.append(sigma_own[:specific])
        vs.append(vt_own[:specific].T)
    flat = np.mean(np.concatenate(sigmas))
    return np.asarray(flat * orthonormal(np.hstack(us)) @ orthonormal(np.hstack(vs)).T)


def span(deltas: list[Array]) -> int:
    """Dimensions of the adapters' span: of the columns or of the rows, whichever are fewer."""
    return min(rank(np.hstack(deltas), deltas), rank(np.vstack(deltas), deltas))
