"""What a report says, from dense changes in float64: docs/reports.md has the definitions."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Changes = dict[str, list[Array | None]]  # module -> the change by each input at its strength


def inner(changes: Changes, i: int, j: int) -> dict[str, float]:
    """The inner product of two inputs in every module that both touch."""
    found = {}
    for name, its in changes.items():
        one, other = its[i], its[j]
        if one is not None and other is not None:
            found[name] = float(np.sum(one * other))
    return found


def norm(changes: Changes, i: int) -> float:
    return float(np.sqrt(sum(inner(changes, i, i).values())))


def cosine(changes: Changes, i: int, j: int) -> float:
    return sum(inner(changes, i, j).values()) / (norm(changes, i) * norm(changes, j))


def total(its: list[Array | None]) -> Array:
    return np.asarray(sum(change for change in its if change is not None))


def total_norm(changes: Changes) -> float:
    return float(np.sqrt(sum(np.sum(total(its) ** 2) for its in changes.values())))


def adds_and_cancels(changes: Changes, i: int, j: int) -> tuple[float, float]:
    products = [2 * product for product in inner(changes, i, j).values()]
    return sum(p for p in products if p > 0), sum(p for p in products if p < 0)


def basis(matrix: Array) -> Array:
    """An orthonormal basis of the column space."""
    u, s, _ = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray(u[:, s > 1e-5 * s[0]])


def above_chance(changes: Changes, i: int, j: int, *, rows: bool) -> float:
    """How much the output (or, of rows, the input) spaces share beyond what random ones do."""
    shared = expected = most = 0.0
    for its in changes.values():
        pair = its[i], its[j]
        if pair[0] is None or pair[1] is None:
            continue
        one, other = (basis(change.T if rows else change) for change in pair if change is not None)
        cosines = np.linalg.svd(one.T @ other, compute_uv=False)
        shared += float(np.sum(cosines**2))
        expected += one.shape[1] * other.shape[1] / one.shape[0]
        most += min(one.shape[1], other.shape[1])
    return (shared - expected) / (most - expected)


def leak(changes: Changes, of: int, into: int, share: float) -> tuple[float, float]:
    """(share of the energy where the other is at all, where the other has `share` of its own)."""
    own, others = inner(changes, of, of), inner(changes, into, into)
    whole = sum(own.values())
    core, held = [], 0.0
    for name in sorted(others, key=lambda name: -others[name]):
        core.append(name)
        held += others[name]
        if held >= share * sum(others.values()):
            break
    both = sum(energy for name, energy in own.items() if name in others)
    return both / whole, sum(own.get(name, 0.0) for name in core) / whole


def truncation(changes: Changes, rank: int) -> float:
    """Of the best merge of this rank in every module."""
    left = whole = 0.0
    for its in changes.values():
        values = np.linalg.svd(total(its), compute_uv=False)
        left += float(np.sum(values[rank:] ** 2))
        whole += float(np.sum(values**2))
    return float(np.sqrt(left / whole))
