"""Least squares of a change on the changes of adapters, from inner products alone.

With D the change and A_i the adapters' changes at strength 1, the strengths s minimise |D - sum s_i A_i|:
G s = b with G_ij = <A_i, A_j> and b_i = <D, A_i> (Frobenius inner products, which add up over layers).
What is left counts as noise of equal size in every element, which gives the strengths' standard errors.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from math import sqrt

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
# A tool may round the change and then the sum, so an error may be two halves of a step.
_ROUNDINGS = 2
# Directions of less than this share of the largest eigenvalue are no directions.
_LEAST_EIGENVALUE = 1e-12


@dataclass(slots=True)
class Products:
    """Of one layer or of many: inner products of D, A_1, ... in this order, `elements` that enter,
    and `rounding`, the sum of squares of the largest errors that rounding D's numbers could make.
    """

    inner: Matrix
    elements: int = 0
    rounding: float = 0.0

    @classmethod
    def none(cls, n: int) -> "Products":
        return cls(np.zeros((n + 1, n + 1)))

    def add(self, other: "Products") -> None:
        self.inner = self.inner + other.inner
        self.elements += other.elements
        self.rounding += other.rounding

    def without(self, adapters: Collection[int]) -> "Products":
        """As if these adapters changed nothing."""
        inner = self.inner.copy()
        for index in adapters:
            inner[index + 1, :] = inner[:, index + 1] = 0
        return Products(inner, self.elements, self.rounding)

    @property
    def norm(self) -> float:
        return sqrt(max(float(self.inner[0, 0]), 0.0))

    @property
    def rounding_share(self) -> float:
        """The most that rounding can be of D, as a share of its squared norm; sums of products of
        float64 are no better than 1e-12.
        """
        whole = float(self.inner[0, 0])
        return _ROUNDINGS**2 * self.rounding / whole + 1e-12 if whole else 0.0


@dataclass(frozen=True, slots=True)
class Fit:
    """The strengths that explain a change best; `errors` are standard errors. `left` is the squared
    norm of what they do not explain, `alone` what each adapter explains that the others do not, both
    as shares of the change's squared norm. An adapter that changes nothing here has strength None.
    """

    strengths: tuple[float | None, ...]
    errors: tuple[float, ...]
    left: float
    alone: tuple[float, ...]
    products: Products = field(repr=False)

    @property
    def is_rounding(self) -> bool:
        """Whether what is left is no more than rounding the checkpoint's numbers leaves."""
        return self.left <= self.products.rounding_share


def fit(products: Products) -> Fit:
    """The best strengths of all adapters together."""
    gram, moments, whole = _parts(products)
    present = [i for i in range(len(moments)) if gram[i, i] > 0]
    strengths = _solve(gram, moments, present)
    left = _left(gram, moments, whole, strengths)
    spread = left / max(products.elements - len(present), 1)
    variances = np.zeros(len(moments))
    if present:
        variances[present] = np.diagonal(_inverse(gram[np.ix_(present, present)])) * spread
    alone = [
        _left(gram, moments, whole, _solve(gram, moments, [j for j in present if j != i])) - left
        if i in present
        else 0.0
        for i in range(len(moments))
    ]
    scale = whole or 1.0
    return Fit(
        tuple(float(strengths[i]) if i in present else None for i in range(len(moments))),
        tuple(float(sqrt(max(v, 0.0))) for v in variances),
        max(left, 0.0) / scale,
        tuple(max(float(its), 0.0) / scale for its in alone),
        products,
    )


def cosine(products: Products, one: int, other: int) -> float:
    """Of two adapters' changes, over everything that either changes."""
    gram, _, _ = _parts(products)
    size = sqrt(float(gram[one, one] * gram[other, other]))
    return float(gram[one, other]) / size if size else 0.0


def _parts(products: Products) -> tuple[Matrix, Matrix, float]:
    inner = products.inner
    return inner[1:, 1:], inner[0, 1:], float(inner[0, 0])


def _solve(gram: Matrix, moments: Matrix, present: Sequence[int]) -> Matrix:
    found = np.zeros(len(moments))
    if present:
        found[present] = _inverse(gram[np.ix_(present, present)]) @ moments[present]
    return found


def _inverse(gram: Matrix) -> Matrix:
    """Scaled to cosines first, so that a weak adapter beside a strong one is not lost."""
    scale = np.sqrt(np.diagonal(gram))
    cosines = gram / np.outer(scale, scale)
    inverse = np.linalg.pinv(cosines, rcond=_LEAST_EIGENVALUE, hermitian=True)
    return np.asarray(inverse / np.outer(scale, scale))


def _left(gram: Matrix, moments: Matrix, whole: float, strengths: Matrix) -> float:
    return whole - float(2 * strengths @ moments - strengths @ gram @ strengths)
