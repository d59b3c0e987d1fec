"""A bake in float64, and rounding to the formats that checkpoints are stored in.

IEEE 754-2019, section 4.3.1: round to nearest, ties to even.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def baked(weight: Array, deltas: list[Array], strengths: list[float]) -> Array:
    """W' = W + sum of strength times delta, before any rounding."""
    total = weight.astype(np.float64)
    for change, strength in zip(deltas, strengths, strict=True):
        total = total + strength * change.reshape(weight.shape)
    return total


def stored(values: Array, dtype: str) -> NDArray[np.generic]:
    """Bits as they are in the file: float64 -> float32 -> dtype, the path torch takes.

    float16 and float32 as such, bfloat16 as the upper half of a float32 in uint16.
    """
    single = values.astype(np.float32)
    if dtype == "F32":
        return single
    if dtype == "F16":
        return single.astype(np.float16)
    bits = single.view(np.uint32).astype(np.uint64)
    # Half a unit of the last kept place, plus one more where that place is odd.
    bits = bits + 0x7FFF + ((bits >> 16) & 1)
    return (bits >> 16).astype(np.uint16)


def half_unit(values: Array, dtype: str) -> Array:
    """The largest error of one rounding at each value: half the distance between neighbours."""
    digits, smallest = {"F16": (11, -24), "BF16": (8, -133), "F32": (24, -149)}[dtype]
    exponent = np.frexp(np.abs(values))[1]
    return np.ldexp(0.5, np.maximum(exponent - digits, smallest))


def widened(bits: NDArray[np.generic], dtype: str) -> Array:
    """Stored bits back as float64."""
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.astype(np.float64)
