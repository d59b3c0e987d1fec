"""8-bit floats from their definition: OCP 8-bit Floating Point Specification (OFP8), revision 1.0.

E4M3: bias 7, no infinity, NaN is S.1111.111. E5M2: bias 15, infinity and NaN as in IEEE 754.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Codes = NDArray[np.uint8]
_FORMATS = {"F8_E4M3": (3, 7), "F8_E5M2": (2, 15)}  # bits of the fraction, bias


def value(code: int, dtype: str) -> float:
    """The number behind one byte."""
    n_fraction, bias = _FORMATS[dtype]
    sign = -1.0 if code & 0x80 else 1.0
    exponent, fraction = (code & 0x7F) >> n_fraction, code & ((1 << n_fraction) - 1)
    if dtype == "F8_E4M3" and code & 0x7F == 0x7F:
        return float("nan")
    if dtype == "F8_E5M2" and exponent == 0x1F:
        return float("nan") if fraction else sign * float("inf")
    if exponent == 0:
        return sign * float(fraction) * 2.0 ** (1 - bias - n_fraction)
    return sign * (1 + fraction / (1 << n_fraction)) * 2.0 ** (exponent - bias)


@cache
def positive(dtype: str) -> Array:
    """The values of codes 0, 1, 2 ... that are finite, which rise with the code."""
    values = [value(code, dtype) for code in range(0x80)]
    return np.array([v for v in values if np.isfinite(v)])


def decoded(codes: Codes, dtype: str) -> Array:
    return np.array([value(int(code), dtype) for code in codes.ravel()]).reshape(codes.shape)


def nearest(values: Array, dtype: str) -> Codes:
    """The code of the nearest value, of two equally near ones the even code; all must fit."""
    table = positive(dtype)
    sizes = np.abs(values).ravel()
    above = np.clip(np.searchsorted(table, sizes), 1, len(table) - 1)
    low, high = sizes - table[above - 1], table[above] - sizes
    is_even = (above - 1) % 2 == 0
    down = (low < high) | ((low == high) & is_even)
    codes = np.where(down, above - 1, above).astype(np.uint8)
    return (codes | np.where(np.signbit(values.ravel()), 0x80, 0).astype(np.uint8)).reshape(
        values.shape
    )
