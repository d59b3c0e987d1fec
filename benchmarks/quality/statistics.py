"""Numbers of many pairs -> a mean with its interval."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_T = {2: 4.303, 5: 2.571, 8: 2.306, 11: 2.201, 14: 2.145, 17: 2.110, 20: 2.086}
"""0.975 quantiles of Student's t by degrees of freedom, for 3 pairs per training seed."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over pairs and half the width of its 95 % interval (Student's t)."""

    mean: float
    half: float

    @property
    def is_apart_from_zero(self) -> bool:
        return abs(self.mean) > self.half

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.half:.2f}"


def estimate(values: Sequence[float]) -> Estimate:
    """Pairs count as independent: no two of them share a trained adapter."""
    n = len(values)
    half = _T[n - 1] * float(np.std(values, ddof=1)) / n**0.5
    return Estimate(float(np.mean(values)), half)


def difference(values: Sequence[float], others: Sequence[float]) -> Estimate:
    """Of the same pairs in the same order, so that what pairs have in common cancels."""
    return estimate([a - b for a, b in zip(values, others, strict=True)])
