"""Choi et al. 2024, eq. 6, with the base weight written out and taken off again."""

from math import ceil

import numpy as np
from numpy.typing import NDArray

from tests.oracles.directions import rank
from tests.oracles.linear import nearest

Array = NDArray[np.float64]


def merged(deltas: list[Array], keep: float, scale: float) -> Array:
    base = np.ones_like(deltas[0])
    tuned = [base + delta for delta in deltas]
    average = sum(tuned[1:], tuned[0]) / len(tuned)
    result = average.copy()
    for weight in tuned:
        centred = weight - average
        kept = ceil(round(keep * rank(centred, deltas), 9))
        result = result + scale * nearest(centred, kept)
    return np.asarray(result - base)
