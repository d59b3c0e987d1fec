"""Element-wise merge methods on whole matrices in float64, element by element where it matters."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def order(change: Array) -> NDArray[np.intp]:
    """Indices of the elements, largest magnitude first, equal ones in the order of their index."""
    return np.argsort(-np.abs(change).ravel(), kind="stable")


def kept_count(share: float, n: int) -> int:
    return max(1, int(np.floor(share * n + 0.5)))


def trimmed(change: Array, density: float) -> Array:
    kept = np.zeros(change.size)
    largest = order(change)[: kept_count(density, change.size)]
    kept[largest] = change.ravel()[largest]
    return kept.reshape(change.shape)


def without_tails(change: Array, density: float, gamma: float) -> Array:
    n = change.size
    count = kept_count(density, n)
    outliers = min(int(np.floor(gamma * n + 0.5)), n - count)
    chosen = order(change)[outliers : outliers + count]
    kept = np.zeros(n)
    kept[chosen] = change.ravel()[chosen]
    return kept.reshape(change.shape)


def elected(changes: list[Array], vote: str = "mass", combine: str = "mean") -> Array:
    """Yadav et al. 2023, algorithm 1: for every element the sign, then what has it.

    A sum of less than 1e-5 of its terms is a draw.
    """
    result = np.zeros_like(changes[0])
    for index in np.ndindex(*result.shape):
        values = [change[index] for change in changes]
        total = sum(values) if vote == "mass" else sum(np.sign(value) for value in values)
        agreeing = [value for value in values if np.sign(value) == np.sign(total)]
        is_drawn = vote == "mass" and abs(total) <= 1e-5 * sum(abs(value) for value in values)
        if agreeing and total != 0 and not is_drawn:
            result[index] = sum(agreeing) / (len(agreeing) if combine == "mean" else 1)
    return result


def added(changes: list[Array]) -> Array:
    return np.sum(changes, axis=0)


def ties(changes: list[Array], density: float, vote: str = "mass", combine: str = "mean") -> Array:
    return elected([trimmed(change, density) for change in changes], vote, combine)


def dropped(change: Array, uniform: Array, probability: Array) -> Array:
    """Kept where the number drawn is below the probability, and divided by it."""
    return np.where(uniform < probability, change / probability, 0.0)


def della_probabilities(change: Array, density: float, epsilon: float) -> Array:
    """Row by row, from density - epsilon for the smallest to density + epsilon for the largest."""
    found = np.empty_like(change)
    for row, values in enumerate(change):
        largest_first = order(values)
        for place, column in enumerate(largest_first):
            share = 0.5 if len(values) == 1 else 1 - place / (len(values) - 1)
            found[row, column] = density - epsilon + 2 * epsilon * share
    return found
